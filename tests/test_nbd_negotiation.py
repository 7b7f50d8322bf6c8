"""A fuzzer on NBD's negotiation: options well and badly formed, in any order, with bytes changed. Whatever comes, it ends in an agreement or
a hang-up, and every option until then got its replies. ``./dev fuzz`` runs it for long, and its counterpart in C (tests/fuzz/)."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import thinpool
from thinpool.exports.nbd.handshake import Agreed, Handshake, HangUp

SIZE = 1 << 20
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_CONTEXTS, SET_CONTEXTS = 1, 2, 3, 5, 6, 7, 8, 9, 10
ACK, SERVER, INFORMATION, CONTEXT, ERROR = 1, 2, 3, 4, 1 << 31
ANSWERS = {LIST: SERVER, INFO: INFORMATION, GO: INFORMATION, LIST_CONTEXTS: CONTEXT, SET_CONTEXTS: CONTEXT}
NAMES = [b"disk", b"base", b"", b"nothing", b"d\xc3\xafsk", b"\xff\xfe", b"disk\0", b"x" * 5000]
QUERIES = [
    b"base:allocation",
    b"base:",
    b"thinpool:",
    b"thinpool:changed-since:base",
    b"thinpool:changed-since:disk",
    b"thinpool:changed-since:",
    b"\xff",
    b"x" * 70,
]

names, numbers = st.sampled_from(NAMES), st.integers(0, 0xFFFF)


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def information(name: bytes, wanted: list[int]) -> bytes:
    return text(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def contexts(name: bytes, queries: list[bytes]) -> bytes:
    return text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries))


def option(kind: int, data: bytes) -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", kind, len(data)) + data


well_formed = st.one_of(
    st.builds(option, st.sampled_from([LIST, STRUCTURED, STARTTLS, ABORT]), st.just(b"")),
    st.builds(option, st.just(EXPORT_NAME), names),
    st.builds(option, st.sampled_from([INFO, GO]), st.builds(information, names, st.lists(st.integers(0, 5) | numbers, max_size=6))),
    st.builds(option, st.sampled_from([LIST_CONTEXTS, SET_CONTEXTS]), st.builds(contexts, names, st.lists(st.sampled_from(QUERIES), max_size=5))),
)
any_data = st.binary(max_size=60) | st.builds(bytes, st.sampled_from([65536, 65537, 1 << 18]))
badly_formed = st.builds(option, st.integers(0, 12) | st.integers(0, 0xFFFFFFFF), any_data)


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    said = draw(st.sampled_from([3, 1, 3, 3, 0, 0xFFFF])).to_bytes(4, "big")
    said += b"".join(draw(st.lists(well_formed | badly_formed, max_size=8)))
    changed = bytearray(said)
    for at, value in draw(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=3)):
        changed[at % len(changed)] = value
    return bytes(changed[: draw(st.sampled_from([len(changed)] * 3 + [len(changed) // 2, len(changed) - 1]))])


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[thinpool.Pool]:
    with thinpool.Pool.create(tmp_path_factory.mktemp("negotiation") / "pool") as pool:
        pool.create_layer("base", SIZE).seal()
        pool.layer("base").clone("disk")
        yield pool


def negotiate(pool: thinpool.Pool, said: bytes, *, claim: Callable[[thinpool.Layer], None], tls_required: bool = False) -> tuple[Agreed | None, bytes]:
    """What was agreed on, if anything, and all that the server said."""
    ours, theirs = socket.socketpair()
    heard = bytearray()

    def listen() -> None:
        with suppress(OSError):
            while data := theirs.recv(1 << 16):
                heard.extend(data)

    def say() -> None:
        with suppress(OSError):
            theirs.sendall(said)
            theirs.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=listen), threading.Thread(target=say)]
    for thread in threads:
        thread.start()
    agreed = None
    with suppress(HangUp, OSError), ours:
        agreed = Handshake(ours, pool, claim=claim, secure=None, tls_required=tls_required).run()
    for thread in threads:
        thread.join()
    theirs.close()
    return agreed, bytes(heard)


def check_replies(heard: bytes, *, tls_required: bool) -> None:
    """Each is whole, has a kind that its option may have, and none follows an option's last one but of another option."""
    assert heard[:16] == b"NBDMAGICIHAVEOPT" and heard[16:18] == b"\x00\x03"
    at = 18
    while at < len(heard):
        magic, kind, answer, length = struct.unpack_from(">QIII", heard, at)
        assert magic == 0x3E889045565A9 and at + 20 + length <= len(heard)
        assert answer == ACK or answer & ERROR or answer == ANSWERS[kind]
        assert not tls_required or kind == ABORT or answer & ERROR
        at += 20 + length


def examples(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz-examples"))


@pytest.mark.parametrize("tls_required", [False, True])
def test_whatever_a_client_says(pool: thinpool.Pool, request: pytest.FixtureRequest, tls_required: bool) -> None:
    @settings(max_examples=examples(request), suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
    @given(conversations())
    def check(said: bytes) -> None:
        claimed: list[thinpool.Layer] = []
        agreed, heard = negotiate(pool, said, claim=claimed.append, tls_required=tls_required)
        if agreed is None:
            check_replies(heard, tls_required=tls_required)
            return
        assert not tls_required and agreed.layer.name in ("base", "disk")
        assert agreed.structured or not agreed.contexts
        assert claimed == [agreed.layer]
        assert all(since is None or since.sealed for _, since in agreed.contexts)
        old_end = struct.pack(">Q", SIZE)  # EXPORT_NAME ends with the size in place of a reply
        check_replies(heard[: heard.rindex(old_end)] if not heard.endswith(struct.pack(">QIII", 0x3E889045565A9, GO, ACK, 0)) else heard, tls_required=False)

    check()


def test_a_layer_that_is_in_use_is_refused_by_name(pool: thinpool.Pool) -> None:
    def claim(layer: thinpool.Layer) -> None:
        raise thinpool.LayerBusy(f"layer {layer.name!r} is in use already: a loop device")

    said = struct.pack(">I", 3) + option(GO, information(b"disk", [])) + option(INFO, information(b"disk", [])) + option(ABORT, b"")
    agreed, heard = negotiate(pool, said, claim=claim)
    check_replies(heard, tls_required=False)
    assert agreed is None
    assert b"layer 'disk' is in use already: a loop device" in heard
    assert heard.count(struct.pack(">QII", 0x3E889045565A9, INFO, ACK)) == 1, "what only asks needs no claim"
    agreed, heard = negotiate(pool, struct.pack(">I", 3) + option(EXPORT_NAME, b"disk"), claim=claim)
    assert (agreed, len(heard)) == (None, 18), "the old way to choose has no error"
