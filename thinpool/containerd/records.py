"""What is kept of a snapshot: a record in the labels of its layer, and so in the same commits.

=======================================  =================================================================================
label of the layer                       what
=======================================  =================================================================================
``thinpool.snapshot``                    the record, as JSON
``thinpool.snapshot.parent=`` *key*      empty; by its name the snapshots of a parent are found
``thinpool.snapshot.ref=`` *ChainID*     empty; by its name the snapshots that hold an image layer are found
``thinpool.filesystem``                  ``ext4`` or ``xfs``
=======================================  =================================================================================

The layer's name is ``containerd/`` and the key, so a key is there once. A snapshot that was removed while somebody still had its
device open is named ``containerd-removed/…`` until it can be deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ..filesystems.blank import FILESYSTEM_LABEL

SNAPSHOT_LABEL = "thinpool.snapshot"
REF_LABEL = "containerd.io/snapshot.ref"
"""containerd's label for the ChainID that a snapshot holds, or is to hold."""
_PREFIX, _REMOVED_PREFIX = "containerd/", "containerd-removed/"
_NAME_MAX = 255  # of layers
_UNUSUAL = re.compile(r"[^A-Za-z0-9._:/@-]")


def layer_name(key: str) -> str:
    """The name of the layer of a snapshot: the key, other bytes than a layer's name has as ``+XX``; a digest in place of a long one."""
    escaped = _UNUSUAL.sub(lambda match: "".join(f"+{byte:02X}" for byte in match[0].encode()), key)
    name = _PREFIX + escaped
    return name if len(name) <= _NAME_MAX else f"{_PREFIX}+{hashlib.sha256(key.encode()).hexdigest()}"


def removed_name() -> str:
    """A name for the layer of a snapshot that is no more."""
    return _REMOVED_PREFIX + uuid.uuid4().hex


def is_removed(name: str) -> bool:
    """Whether a layer's name is one of these."""
    return name.startswith(_REMOVED_PREFIX)


def parent_label(key: str) -> str:
    """The label of the layers of a snapshot's children."""
    return f"{SNAPSHOT_LABEL}.parent={key}"


def ref_label(chain_id: str) -> str:
    """The label of the layers of snapshots that hold an image layer."""
    return f"{SNAPSHOT_LABEL}.ref={chain_id}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot. ``kind``: ``active``, ``view`` or ``committed``; ``parent``: a key, or empty; times in nanoseconds since 1970; ``labels``: as
    they were given; ``filesystem``: ``ext4`` or ``xfs``."""

    key: str
    kind: str
    parent: str
    created: int
    updated: int
    labels: Mapping[str, str]
    filesystem: str

    def as_labels(self) -> dict[str, str]:
        """The labels of its layer."""
        labels = {SNAPSHOT_LABEL: json.dumps(asdict(self)), FILESYSTEM_LABEL: self.filesystem}
        if self.parent:
            labels[parent_label(self.parent)] = ""
        if self.kind == "committed" and REF_LABEL in self.labels:
            labels[ref_label(self.labels[REF_LABEL])] = ""
        return labels

    @classmethod
    def from_labels(cls, labels: Mapping[str, str]) -> Snapshot | None:
        """What :meth:`as_labels` made; ``None``: they are not a snapshot's."""
        stored = labels.get(SNAPSHOT_LABEL)
        return None if stored is None else cls(**json.loads(stored))

    def field(self, path: Sequence[str]) -> str | None:
        """A field by its path, for filters."""
        match path:
            case ["name"]:
                return self.key
            case ["kind"]:
                return self.kind
            case ["parent"]:
                return self.parent
            case ["labels", *rest]:
                return self.labels.get(".".join(rest))
        return None
