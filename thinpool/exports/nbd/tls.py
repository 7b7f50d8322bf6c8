"""TLS for NBD: certificates or pre-shared keys where QEMU and nbdkit keep them too, and bytes between TLS and the C core."""

from __future__ import annotations

import hmac
import select
import socket
import ssl
from pathlib import Path

from ...errors import BadAddress

_PIECE_BYTES = 256 << 10


def tls_context(certificates: Path | None, keys: Path | None, *, verify_peer: bool) -> ssl.SSLContext | None:
    """Of a directory with ``server-cert.pem``, ``server-key.pem`` and, to verify clients, ``ca-cert.pem``; or of a file of pre-shared keys,
    a line ``user:hexadecimal`` each (Python 3.13 and later). ``None``: of neither. Raises BadAddress."""
    if certificates is None and keys is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if certificates is not None:
            context.load_cert_chain(certificates / "server-cert.pem", certificates / "server-key.pem")
            if verify_peer:
                context.load_verify_locations(certificates / "ca-cert.pem")
                context.verify_mode = ssl.CERT_REQUIRED
        if keys is not None:
            _use_keys(context, keys)
    except OSError as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise BadAddress(f"cannot use the TLS files in {certificates or keys}: {reason or error}") from error
    return context


def _use_keys(context: ssl.SSLContext, file: Path) -> None:
    if not hasattr(context, "set_psk_server_callback"):
        raise BadAddress("pre-shared keys need Python 3.13 or later: use certificates")
    known = {}
    for line in file.read_text(errors="replace").splitlines():
        user, colon, key = line.strip().partition(":")
        if user and not user.startswith("#"):
            try:
                known[user] = bytes.fromhex(key)
            except ValueError:
                colon = ""
            if not colon or not known[user]:
                raise BadAddress(f"{file}: a line is user:hexadecimal")
    context.set_ciphers("ALL:PSK:!aNULL:!eNULL")
    context.set_psk_server_callback(lambda identity: next((key for user, key in known.items() if hmac.compare_digest(user, identity or "")), b""))


def pump(secure: ssl.SSLSocket, plain: socket.socket) -> None:
    """Moves bytes between the two, both ways, until either ends. One thread for both: a TLS connection is not for two at once."""
    secure.setblocking(False)
    plain.setblocking(False)
    inward, outward = bytearray(), bytearray()
    reading = True
    while True:
        # What TLS holds already is not seen by poll().
        progress = False
        if len(inward) < _PIECE_BYTES:
            try:
                data = secure.recv(_PIECE_BYTES)
                if not data:
                    return
                inward += data
                progress = True
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
        if reading and len(outward) < _PIECE_BYTES:
            try:
                data = plain.recv(_PIECE_BYTES)
                reading = bool(data)
                outward += data
                progress = True
            except BlockingIOError:
                pass
        progress |= _put(plain, inward) | _put(secure, outward)
        if not reading and not outward:
            return
        if not progress:
            _wait(secure, plain, inward=bool(inward), outward=bool(outward), reading=reading)


def _put(target: socket.socket, data: bytearray) -> bool:
    if not data:
        return False
    try:
        sent = target.send(data)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return False
    del data[:sent]
    return sent > 0


def _wait(secure: socket.socket, plain: socket.socket, *, inward: bool, outward: bool, reading: bool) -> None:
    poll = select.poll()
    poll.register(secure, (0 if inward else select.POLLIN) | (select.POLLOUT if outward else 0))
    poll.register(plain, (select.POLLIN if reading and not outward else 0) | (select.POLLOUT if inward else 0))
    poll.poll()
