"""Sizes as people write them: ``"4K"``, ``"1.5T"``, and back."""

from __future__ import annotations

import re
from decimal import Decimal

from .errors import BadSize

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50, "E": 1 << 60}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTPE]?)(?:i?B)?\s*", re.IGNORECASE | re.ASCII)

_TYPE_ERROR = "a size is a number of bytes or text like 4K, 10G or 1.5T, not {!r}"


def parse_size(value: int | str) -> int:
    """Bytes of a size given as a number, or as text in binary units (``K`` is 1,024).

    Raises :class:`~thinpool.errors.BadSize` for what is no size, is negative, or is no whole number of bytes.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise BadSize(_TYPE_ERROR.format(value))
    if isinstance(value, int):
        if value < 0:
            raise BadSize(f"a size cannot be negative: {value}")
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise BadSize(_TYPE_ERROR.format(value))
    size = Decimal(match[1]) * _UNITS[match[2].upper()]
    if size != int(size):
        raise BadSize(f"not a whole number of bytes: {value!r}")
    return int(size)


def format_size(size_bytes: int) -> str:
    """A size for people: three significant digits and a binary unit (``"1.5G"``, ``"0"``)."""
    value = float(size_bytes)
    for unit in ("", "K", "M", "G", "T", "P"):
        if abs(value) < 1024 or unit == "P":
            break
        value /= 1024
    text = f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + unit
