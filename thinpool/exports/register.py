"""The register: what layers are used for and where NBD is served, in ``run/uses.json``, for the process that comes after this one.

It says what cannot be seen from the kernel's tables, and these say what of it is true: an entry whose device is not there any more is
nothing, and a device without an entry belongs to nobody. It is written before anybody learns of a use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_NAME = "uses.json"


@dataclass(frozen=True, slots=True)
class SavedUse:
    """A use; ``owner``: the identity of the process whose end ends it (:func:`.owners.process_identity`), or nothing."""

    layer_id: int
    purpose: str
    owner: str
    mountpoint: str | None
    device: str


@dataclass(frozen=True, slots=True)
class SavedNbd:
    """An address where NBD is served, and with what TLS."""

    address: str
    certificates: str | None
    keys: str | None
    verify_peer: bool


@dataclass(frozen=True, slots=True)
class Register:
    """All of it."""

    uses: Sequence[SavedUse] = field(default_factory=list)
    nbd: Sequence[SavedNbd] = field(default_factory=list)

    @staticmethod
    def path(run_directory: str) -> Path:
        """Where it is."""
        return Path(run_directory, _NAME)

    def write(self, run_directory: str) -> None:
        """Replaces what is there. Raises OSError."""
        path = self.path(run_directory)
        new = path.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(json.dumps(asdict(self)))
        os.replace(new, path)

    @classmethod
    def remove(cls, run_directory: str) -> None:
        """Nothing is used any more."""
        cls.path(run_directory).unlink(missing_ok=True)

    @classmethod
    def read(cls, run_directory: str) -> Register:
        """What is there; nothing where there is no register."""
        try:
            data = json.loads(cls.path(run_directory).read_text())
        except FileNotFoundError:
            return cls()
        return cls([SavedUse(**use) for use in data["uses"]], [SavedNbd(**nbd) for nbd in data["nbd"]])
