"""Names of images, as Docker and containerd read and write them (github.com/distribution/reference, "Grammar")."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import BadReference

DOCKER_HUB = "docker.io"
_OFFICIAL = "library/"
_NAME_BYTES_MAX = 255
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A full name. ``domain``: the registry; ``path``: the repository in it; ``tag``, ``digest``: which image of it, at least one of them."""

    domain: str
    path: str
    tag: str | None = "latest"
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """From what people write: ``debian``, ``localhost:5000/a/b:1``, ``repository@sha256:…``. Raises BadReference."""
        if not isinstance(text, str) or not text:
            raise BadReference("an image's name cannot be empty")
        rest, at, digest = text.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            raise BadReference(f"{text!r} has something after @ that is no sha256 digest")
        name, tag = _split_tag(rest)
        if tag is not None and not _TAG.fullmatch(tag):
            raise BadReference(f"{text!r} has a tag that cannot be: up to 128 of A-Z a-z 0-9 . _ -, beginning with none of . -")
        domain, path = _split_domain(name)
        if not _DOMAIN.fullmatch(domain):
            raise BadReference(f"{text!r} begins with {domain!r}, which is no host")
        if not _PATH.fullmatch(path):
            why = "it has upper-case letters" if path != path.lower() else "up to 255 of a-z 0-9 . _ - /, with a letter or digit on both sides of each . _ - /"
            raise BadReference(f"{text!r} is not the name of an image: {why}")
        if _ID.fullmatch(rest):
            raise BadReference(f"{text!r} is an image's id, not a name")
        if len(f"{domain}/{path}") > _NAME_BYTES_MAX:
            raise BadReference(f"the name {text[:40]!r}… has more than {_NAME_BYTES_MAX} characters")
        return cls(domain, path, tag or (None if digest else "latest"), digest or None)

    @property
    def name(self) -> str:
        """The repository, with its registry."""
        return f"{self.domain}/{self.path}"

    def __str__(self) -> str:
        return self.name + self._suffix

    @property
    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    @property
    def familiar(self) -> str:
        """As short as people write it."""
        name = self.path.removeprefix(_OFFICIAL) if self.domain == DOCKER_HUB else self.name
        return name + self._suffix


def _split_tag(text: str) -> tuple[str, str | None]:
    name, colon, tag = text.rpartition(":")
    return (name, tag) if colon and "/" not in tag else (text, None)


def _split_domain(name: str) -> tuple[str, str]:
    """What stands before the first slash is a host if it looks like one; otherwise Docker Hub is meant."""
    first, slash, rest = name.partition("/")
    if slash and (any(character in first for character in ".:[") or first == "localhost" or first != first.lower()):
        return ("docker.io" if first == "index.docker.io" else first), rest
    return DOCKER_HUB, name if slash else f"{_OFFICIAL}{name}"
