"""Generic netlink (include/uapi/linux/netlink.h, genetlink.h): requests to parts of the kernel that are known by name."""

from __future__ import annotations

import os
import socket
import struct

_PROTOCOL, _ERROR = 16, 2  # NETLINK_GENERIC, NLMSG_ERROR
_REQUEST_ACK = 1 | 4
_HEAD = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_GENERIC = struct.Struct("=BBxx")  # struct genlmsghdr: command, version
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 3, 1, 2

Attributes = dict[int, bytes]


def encode(attributes: Attributes) -> bytes:
    """Attributes as they are sent, also within another."""
    return b"".join(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4) for kind, value in attributes.items())


def _decode(data: bytes) -> Attributes:
    found = {}
    while data:
        length, kind = _ATTRIBUTE.unpack_from(data)
        found[kind] = data[_ATTRIBUTE.size : length]
        data = data[(length + 3) // 4 * 4 :]
    return found


def ask(family: str, command: int, attributes: Attributes) -> Attributes:
    """Asks for something; what is answered. Raises OSError: FileNotFoundError where the kernel, or this network namespace, has no such family."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _PROTOCOL) as connection:
        known = _ask(connection, _CONTROL, _GET_FAMILY, {_FAMILY_NAME: family.encode() + b"\0"})
        (number,) = struct.unpack("=H", known[_FAMILY_ID])
        return _ask(connection, number, command, attributes)


def _ask(connection: socket.socket, family: int, command: int, attributes: Attributes) -> Attributes:
    body = _GENERIC.pack(command, 1) + encode(attributes)
    connection.send(_HEAD.pack(_HEAD.size + len(body), family, _REQUEST_ACK, 0, 0) + body)
    answer: Attributes = {}
    while True:  # until it is acknowledged
        data = connection.recv(1 << 16)
        while data:
            length, kind = _HEAD.unpack_from(data)[:2]
            if kind == _ERROR:
                (error,) = struct.unpack_from("=i", data, _HEAD.size)
                if error != 0:
                    raise OSError(-error, os.strerror(-error))
                return answer
            answer = _decode(data[_HEAD.size + _GENERIC.size : length])
            data = data[(length + 3) // 4 * 4 :]
