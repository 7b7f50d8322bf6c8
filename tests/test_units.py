"""Sizes, as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinpool import BadSize
from thinpool.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("0", 0),
        ("512", 512),
        ("4K", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("4KB", 4096),
        (" 10 G ", 10 << 30),
        ("1.5T", 3 << 39),
        ("0.5K", 512),
        ("1E", 1 << 60),
        ("100B", 100),
    ],
)
def test_sizes_are_understood(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", -1, "1.2.3", "1 2", "4X", "1e3", "0x10", "1.3", "0.0001K", "١K", 1.5, None, True, b"4K", "4K\n4K"])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(BadSize):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (1, "1"), (1023, "1023"), (1024, "1K"), (1536, "1.5K"), (10 << 30, "10G"), (100 << 30, "100G"), (1 << 60, "1024P")]
)
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 62))
def test_what_is_written_reads_back_about_the_same(size: int) -> None:
    text = format_size(size)
    number, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    read = float(number) * 1024 ** " KMGTP".index(unit or " ")
    assert abs(read - size) <= max(size * 0.01, 0.5)
