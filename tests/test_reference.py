"""Names of images, read and written as Docker does; credentials as its configuration has them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from thinpool.api import Credentials
from thinpool.errors import BadReference, ImportFailed
from thinpool.images.credentials import credentials_for
from thinpool.images.oci import Descriptor, Platform, chain_ids, select_platform
from thinpool.images.reference import Reference

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("debian", "docker.io/library/debian:latest", "debian:latest"),
        ("debian:12", "docker.io/library/debian:12", "debian:12"),
        ("me/app", "docker.io/me/app:latest", "me/app:latest"),
        ("index.docker.io/me/app:x", "docker.io/me/app:x", "me/app:x"),
        ("localhost/a", "localhost/a:latest", "localhost/a:latest"),
        ("localhost:5000/a/b_c:1.0", "localhost:5000/a/b_c:1.0", "localhost:5000/a/b_c:1.0"),
        ("[::1]:5000/a", "[::1]:5000/a:latest", "[::1]:5000/a:latest"),
        (f"host.example/a@{DIGEST}", f"host.example/a@{DIGEST}", f"host.example/a@{DIGEST}"),
        (f"a:1@{DIGEST}", f"docker.io/library/a:1@{DIGEST}", f"a:1@{DIGEST}"),
    ],
)
def test_read_and_written_as_docker_does(text: str, full: str, familiar: str) -> None:
    reference = Reference.parse(text)
    assert (str(reference), reference.familiar) == (full, familiar)
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize("text", ["", "Debian", "a//b", "a:", "a:-x", "a@sha256:12", "a b", "../a", "a/../b", "-a", "a" * 300, "f" * 64, "a:b/c:d:e"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(BadReference):
        Reference.parse(text)


def test_chain_ids_are_the_specifications() -> None:
    """The value for one layer is its DiffID; for more, the hash of the chain and the next, as containerd computes it."""
    import hashlib

    first, second = DIGEST, "sha256:" + "b" * 64
    assert chain_ids([first]) == [first]
    assert chain_ids([first, second])[1] == "sha256:" + hashlib.sha256(f"{first} {second}".encode()).hexdigest()


def test_platforms() -> None:
    def manifest(platform: str) -> Descriptor:
        return Descriptor("application/vnd.oci.image.manifest.v1+json", DIGEST, 1, {"is": platform}, Platform.parse(platform))

    there = [manifest(platform) for platform in ("linux/amd64", "linux/arm64/v8", "linux/arm/v6", "linux/arm/v7")]
    for wanted, found in {"linux/arm64": "linux/arm64/v8", "linux/arm/v7": "linux/arm/v7", "linux/arm/v8": "linux/arm/v7", "linux/arm": "linux/arm/v7"}.items():
        assert select_platform(there, wanted).annotations["is"] == found
    with pytest.raises(ImportFailed, match="linux/s390x, only for linux/amd64"):
        select_platform(there, "linux/s390x")
    with pytest.raises(ImportFailed, match="not a platform"):
        select_platform(there, "arm64")


def test_credentials_of_dockers_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    assert credentials_for("a.example", path) is None
    auth = base64.b64encode(b"me:se:cret").decode()
    helper = tmp_path / "docker-credential-test"
    helper.write_text('#!/bin/sh\nread host\n[ "$host" = c.example ] && echo \'{"Username": "helped", "Secret": "s"}\' || exit 1\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    auths = {"https://index.docker.io/v1/": {"auth": auth}, "a.example": {"auth": auth}, "b.example": {"identitytoken": "t"}, "d.example": {"auth": "%"}}
    path.write_text(json.dumps({"auths": auths, "credHelpers": {"c.example": "test"}}))
    assert credentials_for("docker.io", path) == credentials_for("a.example", path) == Credentials("me", "se:cret")
    assert credentials_for("b.example", path) == Credentials(identity_token="t")
    assert credentials_for("c.example", path) == Credentials("helped", "s")
    assert credentials_for("nobody.example", path) is None
    with pytest.raises(ImportFailed, match="not base64"):
        credentials_for("d.example", path)
    path.write_text("{")
    with pytest.raises(ImportFailed, match="cannot read"):
        credentials_for("a.example", path)
