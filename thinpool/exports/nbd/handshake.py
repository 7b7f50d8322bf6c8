"""The negotiation of an NBD connection, in fixed newstyle (github.com/NetworkBlockDevice/nbd, doc/proto.md).

::

    greeting --client flags--> OPTIONS --EXPORT_NAME, GO--> agreed (csrc/nbd.c goes on)
                                |  ^
       STARTTLS: the same again |  | every other option
              over TLS          +--+--ABORT, or what is no NBD at all--> ended

A client's mistake is answered with the error that the protocol has for it; what cannot be answered ends the connection (:class:`HangUp`).
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ...catalog import PARTIAL_LABEL
from ...errors import LayerNotFound, ThinpoolError

if TYPE_CHECKING:
    from ...layer import Layer

_MAGIC, _OPTION_MAGIC, _REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_EXPORT_NAME, _ABORT, _LIST, _STARTTLS, _INFO, _GO, _STRUCTURED_REPLY, _LIST_META_CONTEXT, _SET_META_CONTEXT = 1, 2, 3, 5, 6, 7, 8, 9, 10
_ACK, _SERVER, _INFORMATION, _META_CONTEXT = 1, 2, 3, 4
_ERROR = 1 << 31
_UNSUPPORTED, _POLICY, _INVALID, _TLS_REQUIRED, _UNKNOWN, _TOO_BIG = (_ERROR | number for number in (1, 2, 3, 5, 6, 9))
_INFO_EXPORT, _INFO_NAME, _INFO_DESCRIPTION, _INFO_BLOCK_SIZE = range(4)
# Transmission flags.
_HAS_FLAGS, _READ_ONLY, _FLUSH, _FUA, _TRIM, _ZEROES, _DF, _MULTI_CONN, _CACHE, _FAST_ZERO = (1 << bit for bit in (0, 1, 2, 3, 5, 6, 7, 8, 10, 11))

PAYLOAD_BYTES_MAX = 32 << 20
_PREFERRED_BYTES = 4096
_OPTION_BYTES_MAX = 64 << 10
_SKIPPED_BYTES_MAX = 1 << 20  # of an option that is too long, read and thrown away
_NAME_BYTES_MAX = 4096
_CONTEXTS_MAX = 64
_SECONDS_MAX = 30.0  # for the whole negotiation

ALLOCATION = "base:allocation"
CHANGED_SINCE = "thinpool:changed-since:"


class HangUp(Exception):
    """The connection is to end."""


class Exports(Protocol):
    """What is offered."""

    def layers(self) -> Sequence[Layer]: ...
    def layer(self, name: str) -> Layer: ...


@dataclass(slots=True)
class Agreed:
    """What was negotiated. ``contexts``: id and the layer since which changes are told (``None``: allocation)."""

    layer: Layer
    structured: bool = False
    contexts: list[tuple[int, Layer | None]] = field(default_factory=list)


def relatives(layer: Layer) -> list[Layer]:
    """Sealed layers that a ``changed-since`` is listed for: its ancestors, and the snapshots of them and of itself."""
    found: list[Layer] = []
    one: Layer | None = layer
    while one is not None:
        found += [other for other in (one, *one.children) if other.sealed and other != layer and other not in found]
        one = one.parent
    return found


class Handshake:
    """One connection's.

    ``claim`` keeps a layer for the client, before it is told that it has it; raises ThinpoolError. ``secure`` makes a TLS connection of a socket;
    ``None``: there is no TLS.
    """

    def __init__(
        self,
        connection: socket.socket,
        exports: Exports,
        *,
        claim: Callable[[Layer], None],
        secure: Callable[[socket.socket], ssl.SSLSocket] | None,
        tls_required: bool,
    ) -> None:
        self.connection = connection  # over TLS from STARTTLS on
        self._exports, self._claim = exports, claim
        self._secure, self._tls_required = secure, tls_required
        self._deadline = time.monotonic() + _SECONDS_MAX
        self._structured = False
        self._contexts: tuple[str, list[tuple[int, Layer | None]]] = ("", [])

    # --- bytes ---

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise HangUp("too slow")
            self.connection.settimeout(left)
            piece = self.connection.recv(min(length - len(data), _OPTION_BYTES_MAX))
            if not piece:
                raise HangUp("hung up")
            data += piece
        return bytes(data)

    def _send(self, data: bytes) -> None:
        self.connection.settimeout(max(0.001, self._deadline - time.monotonic()))
        self.connection.sendall(data)

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._send(struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(data)) + data)

    def _refuse(self, option: int, kind: int, why: str) -> None:
        self._reply(option, kind, why.encode()[:_NAME_BYTES_MAX])

    # --- the negotiation ---

    def run(self) -> Agreed:
        """To its end. Raises HangUp, OSError."""
        self._send(struct.pack(">QQH", _MAGIC, _OPTION_MAGIC, _FIXED_NEWSTYLE | _NO_ZEROES))
        (flags,) = struct.unpack(">I", self._receive(4))
        if flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES) or not flags & _FIXED_NEWSTYLE:
            raise HangUp("unknown flags")
        while True:
            magic, option, length = struct.unpack(">QII", self._receive(16))
            if magic != _OPTION_MAGIC:
                raise HangUp("not NBD")
            data = self._option_data(option, length)
            if data is None:
                continue
            if option == _EXPORT_NAME:
                return self._old_end(data, zeroes=not flags & _NO_ZEROES)
            if option == _ABORT:
                self._reply(option, _ACK)
                raise HangUp("aborted")
            agreed = self._answer(option, data)
            if agreed is not None:
                return agreed

    def _option_data(self, option: int, length: int) -> bytes | None:
        if length <= _OPTION_BYTES_MAX:
            return self._receive(length)
        if length > _SKIPPED_BYTES_MAX or option == _EXPORT_NAME:
            raise HangUp("an option that is too long")
        self._receive(length)
        self._refuse(option, _TOO_BIG, f"an option has at most {_OPTION_BYTES_MAX} bytes")
        return None

    def _answer(self, option: int, data: bytes) -> Agreed | None:
        encrypted = isinstance(self.connection, ssl.SSLSocket)
        if option == _STARTTLS:
            self._start_tls(data, encrypted=encrypted)
        elif self._tls_required and not encrypted:
            self._refuse(option, _TLS_REQUIRED, "this server wants TLS")
        elif option == _LIST:
            self._list(data)
        elif option in (_INFO, _GO):
            return self._go(option, data)
        elif option == _STRUCTURED_REPLY:
            self._structured = self._structured or not data
            self._refuse(option, _INVALID, "this option has no data") if data else self._reply(option, _ACK)
        elif option in (_LIST_META_CONTEXT, _SET_META_CONTEXT):
            self._meta_context(option, data)
        else:
            self._refuse(option, _UNSUPPORTED, "not known here")
        return None

    def _start_tls(self, data: bytes, *, encrypted: bool) -> None:
        if data or encrypted:
            self._refuse(_STARTTLS, _INVALID, "this option has no data" if data else "TLS is there already")
        elif self._secure is None:
            self._refuse(_STARTTLS, _POLICY, "this server has no TLS")
        else:
            self._reply(_STARTTLS, _ACK)
            self.connection = self._secure(self.connection)
            self._structured, self._contexts = False, ("", [])  # what was said in the clear counts no more

    def _list(self, data: bytes) -> None:
        if data:
            self._refuse(_LIST, _INVALID, "this option has no data")
            return
        for layer in self._exports.layers():
            if PARTIAL_LABEL not in layer.labels:
                name = layer.name.encode()
                self._reply(_LIST, _SERVER, struct.pack(">I", len(name)) + name)
        self._reply(_LIST, _ACK)

    # --- the end of it ---

    def _find(self, option: int, name: str) -> Layer | None:
        try:
            layer = self._exports.layer(name)
            if PARTIAL_LABEL not in layer.labels:
                if option in (_GO, _EXPORT_NAME):
                    self._claim(layer)
                return layer
            why = f"layer {name!r} is still being imported"
        except LayerNotFound:
            why = f"no layer named {name!r}" if name else "which layer? Its name is the export's"
        except ThinpoolError as error:
            why = str(error)
        if option == _EXPORT_NAME:
            raise HangUp(why)
        self._refuse(option, _UNKNOWN, why)
        return None

    def _flags(self, layer: Layer) -> int:
        flags = _HAS_FLAGS | _FLUSH | _FUA | _TRIM | _ZEROES | _MULTI_CONN | _CACHE | _FAST_ZERO
        return flags | (_READ_ONLY if layer.sealed or layer.pool.read_only else 0) | (_DF if self._structured else 0)

    def _agreed(self, layer: Layer) -> Agreed:
        name, contexts = self._contexts
        return Agreed(layer, self._structured, contexts if name == layer.name and self._structured else [])

    def _old_end(self, data: bytes, *, zeroes: bool) -> Agreed:
        if self._tls_required and not isinstance(self.connection, ssl.SSLSocket):
            raise HangUp("no TLS")
        layer = self._find(_EXPORT_NAME, data.decode(errors="replace"))
        assert layer is not None
        self._send(struct.pack(">QH", layer.size, self._flags(layer)) + bytes(124 if zeroes else 0))
        return self._agreed(layer)

    def _go(self, option: int, data: bytes) -> Agreed | None:
        request = _Reader(data)
        name, wanted = request.text(), [request.number(">H") for _ in range(request.number(">H"))]
        if not request.is_whole():
            self._refuse(option, _INVALID, "damaged")
            return None
        layer = self._find(option, name)
        if layer is None:
            return None
        kinds = {_INFO_NAME: layer.name.encode(), _INFO_DESCRIPTION: b"a sealed layer" if layer.sealed else b"a writable layer"}
        for kind, text in kinds.items():
            if kind in wanted:
                self._reply(option, _INFORMATION, struct.pack(">H", kind) + text)
        if _INFO_BLOCK_SIZE in wanted:
            self._reply(option, _INFORMATION, struct.pack(">HIII", _INFO_BLOCK_SIZE, 1, _PREFERRED_BYTES, PAYLOAD_BYTES_MAX))
        self._reply(option, _INFORMATION, struct.pack(">HQH", _INFO_EXPORT, layer.size, self._flags(layer)))
        self._reply(option, _ACK)
        return self._agreed(layer) if option == _GO else None

    # --- metadata contexts ---

    def _meta_context(self, option: int, data: bytes) -> None:
        request = _Reader(data)
        name, queries = request.text(), [request.text() for _ in range(min(request.number(">I"), _OPTION_BYTES_MAX))]
        if not request.is_whole() or not self._structured:
            self._refuse(option, _INVALID, "structured replies come first" if request.is_whole() else "damaged")
            return
        layer = self._find(option, name)
        if layer is None:
            return
        listing = option == _LIST_META_CONTEXT
        chosen: dict[str, Layer | None] = {}
        for query in queries if queries or not listing else ("base:", "thinpool:"):
            chosen |= self._matching(layer, query, listing=listing)
        if len(chosen) > _CONTEXTS_MAX:
            self._refuse(option, _TOO_BIG, f"at most {_CONTEXTS_MAX} contexts")
            return
        contexts = list(enumerate(chosen.items(), 1))
        for number, (context, _) in contexts:
            self._reply(option, _META_CONTEXT, struct.pack(">I", 0 if listing else number) + context.encode())
        self._reply(option, _ACK)
        if not listing:
            self._contexts = (layer.name, [(number, since) for number, (_, since) in contexts])

    def _matching(self, layer: Layer, query: str, *, listing: bool) -> dict[str, Layer | None]:
        """The contexts that a query names; what ends in a colon names several, and only when they are listed."""
        if query == ALLOCATION or (listing and query == "base:"):
            return {ALLOCATION: None}
        if listing and query in ("thinpool:", CHANGED_SINCE):
            return {f"{CHANGED_SINCE}{one.name}": one for one in relatives(layer)[:_CONTEXTS_MAX]}
        if query.startswith(CHANGED_SINCE):
            try:
                since = self._exports.layer(query.removeprefix(CHANGED_SINCE))
            except ThinpoolError:
                return {}
            return {query: since} if since.sealed and PARTIAL_LABEL not in since.labels else {}
        return {}


class _Reader:
    """An option's data, taken apart; reading past the end gives nothing and makes it damaged."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def _take(self, length: int) -> bytes:
        piece = self._data[self._at : self._at + length]
        self._at += length
        return piece

    def number(self, form: str) -> int:
        piece = self._take(struct.calcsize(form))
        return int(struct.unpack(form, piece)[0]) if len(piece) == struct.calcsize(form) else 0

    def text(self) -> str:
        length = self.number(">I")
        if length > _NAME_BYTES_MAX:
            self._at = len(self._data) + 1
        return self._take(min(length, _NAME_BYTES_MAX)).decode(errors="replace")

    def is_whole(self) -> bool:
        """All was there, and nothing besides."""
        return self._at == len(self._data)
