"""The names of a pool: which layers there are, whose children they are, and the documents about them.

A document is bytes under a text key, for what the modules above know of layers: images, tags, containers. Layers and documents are
kept in memory as a whole (a few hundred bytes to a few KiB each); what changed since the last freeze is handed to
the commit together with the engine's records, so that names and maps never disagree (I8). The pool's lock is held
by whoever calls.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import BadName, DamagedError, LayerExists, LayerNotFound

DIGEST_KINDS = ("diff", "chain", "content")
"""What names a sealed layer by its content: an image layer's OCI DiffID and ChainID, and the Merkle digest of its blocks."""
PARTIAL_LABEL = "thinpool.partial"
"""On layers that an import is still filling; found at the next opening, they are deleted."""
TRASH_LABEL = "thinpool.trash"
"""On layers in the trash: when they go for good, in seconds since 1970."""
HELD_LABEL = "thinpool.held"
"""On holds: the name of the metadata backup whose chunks they keep (:mod:`thinpool.holds`). Hidden where layers are listed."""
HELD_LAYER_LABEL = "thinpool.held.layer"
"""On holds: the id of the layer that it is of."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,254}")
_KEY_BYTES_MAX = 511  # LMDB's


@dataclass(slots=True)
class LayerRecord:
    """What the pool knows of a layer besides its map. ``origin``: the name its parent had when it was made; ``digests``: what
    its content is, by the kinds of :data:`DIGEST_KINDS`; ``limits``: those of :class:`~thinpool.api.Limits` that are not 0; ``checksums``:
    the chunks in which it differs from the nearest sealed layer above have theirs."""

    name: str
    parent: int | None
    origin: str | None
    created: float
    labels: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    checksums: bool = False

    def as_json(self) -> dict[str, Any]:
        """The stored form (docs/FORMAT.md, "Layers")."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, stored: Any) -> LayerRecord:
        """Of the stored form, of which other fields are passed over. Raises DamagedError where it makes no sense."""
        try:
            record = cls(**{name: stored[name] for name in cls.__slots__ if name in stored})
            pairs = [*record.labels.items(), *record.digests.items()]
            texts = [record.name, "" if record.origin is None else record.origin, *(text for pair in pairs for text in pair), *record.limits]
            numbers = [record.created, 0 if record.parent is None else record.parent, *record.limits.values()]
            if (
                all(isinstance(text, str) for text in texts)
                and isinstance(record.checksums, bool)
                and all(isinstance(number, int | float) for number in numbers)
            ):
                return record
        except (TypeError, AttributeError):
            pass
        raise DamagedError("damaged metadata: the record of a layer makes no sense")


def check_name(name: str) -> str:
    """The name, if a layer can have it. Raises :class:`~thinpool.errors.BadName`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadName(f"not a layer name: {name!r} (up to 255 of A-Z a-z 0-9 . _ : / @ + -, beginning with a letter or digit)")
    return name


def _time(text: str) -> float:
    """A time in a label; what is none has not come yet."""
    try:
        return float(text)
    except ValueError:
        return math.inf


class Catalog:
    """All layer records, by id, by name and by digest; all documents, by key."""

    def __init__(self, layers: Iterable[tuple[int, Mapping[str, Any]]], documents: Iterable[tuple[str, bytes]] = ()) -> None:
        self._records: dict[int, LayerRecord] = {}
        self._ids: dict[str, int] = {}
        self._children: dict[int, set[int]] = {}
        self._digests: dict[tuple[str, str], set[int]] = {}
        self._changed: dict[int, bool] = {}
        self._documents = dict(documents)
        self._documents_changed: dict[str, bool] = {}
        for layer_id, stored in layers:
            self._insert(layer_id, LayerRecord.from_json(stored))
        # Later than any id that was given before: one whose layer was deleted, or lost with a killed process, is not given again.
        self._next_id = max(max(self._records, default=0) + 1, time.time_ns() // 1000)

    def _insert(self, layer_id: int, record: LayerRecord) -> None:
        self._records[layer_id] = record
        self._ids[record.name] = layer_id
        if record.parent is not None:
            self._children.setdefault(record.parent, set()).add(layer_id)
        for digest in record.digests.items():
            self._digests.setdefault(digest, set()).add(layer_id)

    def new_id(self) -> int:
        """An id that no layer of this pool has had."""
        self._next_id += 1
        return self._next_id - 1

    def find(self, name: str) -> int:
        """The id of the layer of that name. Raises :class:`~thinpool.errors.LayerNotFound`."""
        try:
            return self._ids[name]
        except (KeyError, TypeError):
            raise LayerNotFound(f"no layer named {name!r}") from None

    def require_free(self, name: str) -> None:
        """Raises :class:`~thinpool.errors.BadName` or :class:`~thinpool.errors.LayerExists` where the name cannot be given."""
        if check_name(name) in self._ids:
            raise LayerExists(f"a layer named {name!r} exists already")

    def get(self, layer_id: int) -> LayerRecord | None:
        return self._records.get(layer_id)

    def ids(self, label: str | None = None) -> list[int]:
        """All ids but those of holds, or those of layers that have the label; oldest first."""
        return sorted(layer_id for layer_id, record in self._records.items() if (HELD_LABEL not in record.labels if label is None else label in record.labels))

    def limited(self) -> list[int]:
        """The ids of layers that have limits."""
        return [layer_id for layer_id, record in self._records.items() if record.limits]

    def trash(self, now: float = math.inf) -> list[int]:
        """The ids of layers in the trash, or those whose time is up."""
        return [layer_id for layer_id in self.ids(TRASH_LABEL) if _time(self._records[layer_id].labels[TRASH_LABEL]) <= now]

    def holds(self) -> dict[str, list[int]]:
        """The ids of holds, by the metadata backup whose they are."""
        found: dict[str, list[int]] = {}
        for layer_id in self.ids(HELD_LABEL):
            found.setdefault(self._records[layer_id].labels[HELD_LABEL], []).append(layer_id)
        return found

    def names(self) -> list[tuple[int, str]]:
        """Id and name of each layer but holds, oldest first."""
        return sorted((layer_id, record.name) for layer_id, record in self._records.items() if HELD_LABEL not in record.labels)

    def parents(self, layer_id: int) -> list[int]:
        """The layer's parent, if it has one still."""
        record = self._records.get(layer_id)
        return [] if record is None or record.parent is None else [record.parent]

    def children(self, layer_id: int) -> list[int]:
        return sorted(self._children.get(layer_id, ()))

    def add(self, layer_id: int, record: LayerRecord) -> None:
        self._insert(layer_id, record)
        self._changed[layer_id] = True

    def rename(self, layer_id: int, name: str) -> None:
        self.require_free(name)
        record = self._records[layer_id]
        del self._ids[record.name]
        record.name = name
        self._ids[name] = layer_id
        self._changed[layer_id] = True

    def set_labels(self, layer_id: int, labels: Mapping[str, str]) -> None:
        self._records[layer_id].labels = dict(labels)
        self._changed[layer_id] = True

    def set_checksums(self, layer_id: int) -> None:
        """They are made."""
        self._records[layer_id].checksums = True
        self._changed[layer_id] = True

    def set_limits(self, layer_id: int, limits: Mapping[str, int]) -> None:
        self._records[layer_id].limits = dict(limits)
        self._changed[layer_id] = True

    def set_digests(self, layer_id: int, digests: Mapping[str, str]) -> None:
        """Adds digests, by kind, to those that the layer has."""
        record = self._records[layer_id]
        self._forget_digests(layer_id, record)
        record.digests = {**record.digests, **digests}
        for digest in record.digests.items():
            self._digests.setdefault(digest, set()).add(layer_id)
        self._changed[layer_id] = True

    def _forget_digests(self, layer_id: int, record: LayerRecord) -> None:
        for digest in record.digests.items():
            ids = self._digests[digest]
            ids.discard(layer_id)
            if not ids:
                del self._digests[digest]

    def with_digest(self, kind: str, digest: str) -> list[int]:
        """The layers with that digest, oldest first."""
        return sorted(self._digests.get((kind, digest), ()))

    def document(self, key: str) -> bytes | None:
        return self._documents.get(key)

    def documents(self, prefix: str) -> list[tuple[str, bytes]]:
        """Keys and contents of the documents whose key begins so, in the order of keys."""
        return sorted((key, content) for key, content in self._documents.items() if key.startswith(prefix))

    def put_document(self, key: str, content: bytes | None) -> None:
        """Stores a document; ``None`` removes it. Raises :class:`~thinpool.errors.BadName` for a key that is too long."""
        if not 0 < len(key.encode()) <= _KEY_BYTES_MAX:
            raise BadName(f"{key!r} is too long: a document's key has up to {_KEY_BYTES_MAX} bytes")
        if content is None:
            if self._documents.pop(key, None) is None:
                return
        else:
            self._documents[key] = content
        self._documents_changed[key] = True

    def remove(self, layer_id: int) -> None:
        """Forgets a layer; its children have no parent from now on, only the name of their origin."""
        record = self._records.pop(layer_id)
        del self._ids[record.name]
        self._forget_digests(layer_id, record)
        if record.parent is not None:
            self._children.get(record.parent, set()).discard(layer_id)
        for child in self._children.pop(layer_id, ()):
            self._records[child].parent = None
            self._changed[child] = True
        self._changed[layer_id] = True

    def take_changes(self) -> tuple[dict[int, dict[str, Any] | None], dict[str, bytes | None]]:
        """Layer records and documents changed since the last call, as they are stored; ``None``: deleted."""
        changed, self._changed = self._changed, {}
        layers = {layer_id: record.as_json() if (record := self._records.get(layer_id)) else None for layer_id in changed}
        documents = {key: self._documents.get(key) for key in self._documents_changed}
        self._documents_changed = {}
        return layers, documents
