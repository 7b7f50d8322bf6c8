"""A client of containerd's snapshot service, for tests: what containerd itself sends."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import grpc

from thinpool.containerd.messages import SERVICE, classes

_ANSWERS = {name: f"{name}SnapshotResponse" for name in ("Prepare", "View", "Stat", "Update")} | {"Mounts": "MountsResponse", "Usage": "UsageResponse"}
_REQUESTS = {name: f"{name}SnapshotRequest" for name in ("Prepare", "View", "Commit", "Remove", "Stat", "Update")}


class Client:
    """Calls by name, with the fields of the request; a context manager."""

    def __init__(self, address: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{address}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def __call__(self, call: str, /, **fields: Any) -> Any:
        """The answer; waits until the service is there."""
        request = classes[_REQUESTS.get(call, f"{call}Request")](**fields)
        answer = classes[_ANSWERS.get(call, "Empty")]
        method = self._channel.unary_unary(f"/{SERVICE}/{call}", lambda message: message.SerializeToString(), answer.FromString)
        return method(request, timeout=60, wait_for_ready=True)

    def fails(self, call: str, /, **fields: Any) -> tuple[str, str]:
        """The name of the code that the call fails with, and the message."""
        try:
            self(call, **fields)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        raise AssertionError(f"{call} {fields} did not fail")

    def list(self, *filters: str) -> list[Any]:
        """All snapshots that match."""
        method = self._channel.unary_stream(f"/{SERVICE}/List", lambda message: message.SerializeToString(), classes["ListSnapshotsResponse"].FromString)
        return [info for answer in method(classes["ListSnapshotsRequest"](filters=filters), timeout=60, wait_for_ready=True) for info in answer.info]

    def names(self, *filters: str) -> set[str]:
        """Their names."""
        return {info.name for info in self.list(*filters)}

    def device(self, call: str, /, **fields: Any) -> str:
        """The device that is to be mounted."""
        (mount,) = self(call, **fields).mounts
        return str(mount.source)

    @contextmanager
    def mounted(self, directory: Path, call: str = "Mounts", /, *, add: str = "", **fields: Any) -> Iterator[Path]:
        """A snapshot's file system, mounted as the service says, and with one option more."""
        (mount,) = self(call, **fields).mounts
        directory.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", mount.type, "-o", ",".join([*mount.options, *filter(None, [add])]), mount.source, directory], check=True)
        try:
            yield directory
        finally:
            subprocess.run(["umount", directory], check=True)

    def commit(self, name: str, directory: Path, parent: str = "", **files: bytes) -> None:
        """A committed snapshot with some files more than its parent."""
        with self.mounted(directory, "Prepare", key=f"{name}-active", parent=parent) as root:
            for file, content in files.items():
                (root / file).write_bytes(content)
        self("Commit", key=f"{name}-active", name=name)

    def remove_all(self) -> None:
        """Takes away what there is: the latest first, for children are made after their parents."""
        for info in sorted(self.list(), key=lambda info: info.created_at.ToNanoseconds(), reverse=True):
            self("Remove", key=info.name)
