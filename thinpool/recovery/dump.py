"""Metadata as JSON lines, and back: ``dump``, ``restore``, ``pack``.

One line each, in this order: the head; every live map node, once, however many layers share it; every layer; every document; the checksums of
each 128 chunks that have any, packed. Counts and free space are not in it, for they follow. Arrays of numbers are runs ``[place, first, count]``
of numbers that grow by one.
"""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from ..catalog import LayerRecord, check_name
from ..engine import CHECKSUM, MAP, NODE, STATE
from ..errors import DamagedError, FormatError
from ..metadata import DOCUMENT, Metadata, unframe
from ..poolfiles import PoolFiles
from ..records import Record
from .check import read_tables
from .nodes import LayerMap
from .records import CHECKSUM_VALUES, FANOUT, LEVELS_MAX, NodeReader, key_of, make_page, new_page, of_varints, read_page
from .repair import Repair, make_anew, take_alone
from .report import Report
from .stored import StoredState

VERSION = 1
_BATCH = 4096
_VALUE_MAX, _SIZE_MAX = 2**56, 2**60
_PACKED = struct.Struct(f"<{CHECKSUM_VALUES}I")
_Runs = list[list[int]]


def dump(path: Path, *, anonymous: bool = False) -> Iterator[str]:
    """The lines of a pool's metadata, of one committed state; the pool may be in use. Raises DamagedError where it is not whole.

    ``anonymous``: without names, labels, digests and documents; what is damaged is then left out, and the head says how much that is.
    """
    files = PoolFiles(path)
    files.require_pool()
    damage: list[str] = []
    with StoredState(files.meta, damage.append) as state:
        yield from _Dump(state, damage, anonymous=anonymous).lines()


class _Dump:
    def __init__(self, state: StoredState, damage: list[str], *, anonymous: bool) -> None:
        self._state, self._anonymous = state, anonymous
        report = Report("full")
        self._tables = read_tables(state, report)
        self._documents = list(state.items(DOCUMENT))
        self._damage = report.corruptions + len(damage)
        if self._damage and not anonymous:
            first = damage[0] if damage else report.problems[0].message
            raise DamagedError(f"the metadata is damaged ({first}): repair it first")

    def lines(self) -> Iterator[str]:
        state, tables = self._state, self._tables
        table, counters = tables.nodes, tables.counters
        head: dict[str, Any] = {"thinpool_dump": VERSION, "pool": tables.pool, "next_node": counters.next_node, "pages": counters.pages, "txn": counters.txn}
        if self._anonymous:
            head |= {"pool": tables.pool | {"uuid": ""}, "anonymous": True, "damage": self._damage}
        yield _line(head)
        live = bytearray(len(table.ids))
        for layer in tables.maps.values():
            if layer.root and (root := table.find(layer.root)) >= 0:
                table.reach(root, live)
        reader = NodeReader(tables.pool["chunk_size"])
        for key, value in state.items_again(NODE):
            node_id = int.from_bytes(key, "big")
            if (place := table.find(node_id)) >= 0 and live[place] and reader.read(node_id, value, splits=True):
                splits = [[position, own, _runs(blocks)] for position, own, blocks in reader.splits()]
                yield _line({"node": node_id, "level": reader.level, "entries": _runs(reader.entries()), **({"splits": splits} if splits else {})})
        for number, layer in sorted(tables.maps.items()):
            known = tables.layers.get(number, {})
            if self._anonymous:
                known = {"name": f"layer-{number}", "parent": known.get("parent"), "origin": None, "created": 0, "labels": {}, "digests": {}}
            yield _line({"layer": number, "root": layer.root, "height": layer.height, "size": layer.size, "sealed": layer.sealed, "record": known})
        for key, value in () if self._anonymous else self._documents:
            if not key.startswith(b"digest/"):  # those that are not done are begun anew
                yield _line({"document": key.decode(), "content": _text(unframe(DOCUMENT, key, value))})
        values = new_page()
        for number, checksums in () if self._anonymous else state.numbered(CHECKSUM):
            if not read_page(CHECKSUM, number, checksums, values):
                raise DamagedError(f"the metadata is damaged (checksums {number}): repair it first")
            yield _line({"checksums": number, "packed": base64.b64encode(_PACKED.pack(*values[0:CHECKSUM_VALUES])).decode()})


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n"


def _text(content: bytes) -> str | dict[str, str]:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def _runs(values: Sequence[int]) -> _Runs:
    """What is not 0."""
    if values[0] and values[-1] == values[0] + len(values) - 1 and list(values) == list(range(values[0], values[0] + len(values))):
        return [[0, values[0], len(values)]]
    runs: _Runs = []
    for place, value in enumerate(values):
        if not value:
            continue
        if runs and runs[-1][0] + runs[-1][2] == place and runs[-1][1] + runs[-1][2] == value:
            runs[-1][2] += 1
        else:
            runs.append([place, value, 1])
    return runs


def _values(runs: _Runs, count: int) -> list[int]:
    values = [0] * count
    for place, first, length in runs:
        if not (place >= 0 and 0 < length <= count - place and 0 < first < _VALUE_MAX - length):
            raise ValueError("a run that is out of place")
        values[place : place + length] = range(first, first + length)
    return values


def restore(path: Path, source: IO[bytes]) -> Repair:
    """Puts the layers and maps of a dump in the place of a pool's metadata, which is kept; counts and space are made anew.

    ``path`` has the data file that the dump's pool had. Raises FormatError where it is no dump, and as a repair does.
    """
    files = PoolFiles(path)
    with ExitStack() as undo:
        undo.callback(files.close)
        take_alone(files)
        loaded = files.path / "meta.loaded"
        shutil.rmtree(loaded, ignore_errors=True)
        loaded.mkdir(mode=0o700)
        undo.callback(shutil.rmtree, loaded, ignore_errors=True)
        _load(source, loaded)
        done = Repair(Report("full"))
        make_anew(files, loaded, done)
    return done


def _load(source: IO[bytes], into: Path) -> None:
    """The dump's records in an environment of their own."""
    lines = _lines(source)
    try:
        head = json.loads(next(lines, b"{}"))
        if head.get("thinpool_dump") != VERSION:
            raise ValueError("its first line is not that of a dump of this version")
        store = Metadata(into, create=True)
        try:
            store.put_pool(head["pool"])
            store.pool_record()  # whether it makes sense
            layers: dict[int, dict[str, Any]] = {}
            documents: dict[str, bytes] = {}
            reader, batch = NodeReader(head["pool"]["chunk_size"]), list[Record]()
            for line in lines:
                item = json.loads(line)
                if "node" in item:
                    batch.append((NODE, key_of(item["node"]), _node(item, reader)))
                elif "layer" in item:
                    check_name(LayerRecord.from_json(item["record"]).name)
                    layers[item["layer"]] = item["record"]
                    if not (0 <= item["height"] <= LEVELS_MAX and 0 < item["size"] <= _SIZE_MAX):
                        raise ValueError(f"layer {item['layer']} makes no sense")
                    numbers = [item[name] for name in LayerMap.__slots__ if name != "mapped_refs"]
                    batch.append((MAP, key_of(item["layer"]), of_varints(MAP, key_of(item["layer"]), [*numbers[:3], 0, *numbers[3:]])))
                elif "document" in item:
                    content = item["content"]
                    documents[item["document"]] = content.encode() if isinstance(content, str) else base64.b64decode(content["base64"])
                elif "checksums" in item:
                    number, values = item["checksums"], _PACKED.unpack(base64.b64decode(item["packed"]))
                    batch.append((CHECKSUM, key_of(number), make_page(CHECKSUM, number, values)))
                if len(batch) == _BATCH:
                    store.commit(batch, {}, {}, {})
                    batch = []
            if len({record["name"] for record in layers.values()}) != len(layers):
                raise ValueError("two layers have the same name")
            batch.append((STATE, key_of(0), of_varints(STATE, key_of(0), (head["next_node"], head["pages"], 0, 0, head["txn"]))))
            store.commit(batch, layers, {}, documents)
        finally:
            store.close()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, EOFError, struct.error, gzip.BadGzipFile, DamagedError) as error:
        raise FormatError(f"not a dump of thinpool's, or a damaged one: {error}") from error


def _lines(source: IO[bytes]) -> Iterator[bytes]:
    begin = source.read(2)
    if begin == b"\x1f\x8b":
        source.seek(0)
        yield from gzip.GzipFile(fileobj=source)
        return
    yield begin + source.readline()
    yield from source


def _node(item: dict[str, Any], reader: NodeReader) -> bytes:
    splits = [(position, own, _values(blocks, reader.blocks)) for position, own, blocks in item.get("splits", ())]
    if not (0 <= item["level"] < LEVELS_MAX and len(splits) <= FANOUT and all(0 <= split[0] < FANOUT for split in splits)):
        raise ValueError(f"node {item['node']} makes no sense")
    return reader.make(item["node"], item["level"], _values(item["entries"], FANOUT), splits)
