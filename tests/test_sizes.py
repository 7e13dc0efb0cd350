"""Bytes in words and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.sizes import GIB, parse_size, show_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GiB", 20 * GIB), ("1.5 GB", 1_500_000_000), ("512KiB", 512 << 10), (" 7 ", 7)]
    + [(text, 0) for text in ("", "-5GiB", "1.2.3GiB", "GiB", "5 gib", "1e9", "٣GiB")],
)
def test_sizes_are_read_whole_or_not_at_all(text, expected):
    assert parse_size(text) == expected


@given(st.integers(1, 1 << 50))
def test_what_is_shown_reads_back_to_its_last_digit(count):
    text = show_size(count)
    number, unit = text.split()
    assert abs(parse_size(text) - count) <= 0.05001 * parse_size(f"1{unit}")
    assert unit == "KiB" or float(number) >= 1


def test_what_is_small_is_not_nothing():
    assert show_size(400) == "0.4 KiB" and show_size(GIB - 1) == "1024.0 MiB" and show_size(1.5 * GIB) == "1.5 GiB"
