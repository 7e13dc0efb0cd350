"""Byte sizes are formatted and parsed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.common.command import run_command
from runtime.common.errors import ConversationError
from runtime.common.terminal import GIB, CommandConsole, format_size, parse_size, print_table, progress_line


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GiB", 20 * GIB), ("1.5 GB", 1_500_000_000), ("512KiB", 512 << 10), (" 7 ", 7)]
    + [(text, 0) for text in ("", "-5GiB", "1.2.3GiB", "GiB", "5 gib", "1e9", "٣GiB")],
)
def test_parse_size(text, expected):
    assert parse_size(text) == expected


@given(st.integers(1, 1 << 50))
def test_formatted_sizes_parse_back(count):
    text = format_size(count)
    number, unit = text.split()
    rounding = 0.05 * parse_size(f"1{unit}") + 1  # one decimal, and whole bytes when it is read back
    assert abs(parse_size(text) - count) <= rounding
    assert unit == "KiB" or float(number) >= 1


def test_format_size():
    assert (
        format_size(400) == "0.4 KiB" and format_size(GIB - 1) == "1024.0 MiB" and format_size(1.5 * GIB) == "1.5 GiB"
    )


EVIL = "a\x1b[2J\x07\r\x9b31m\u202eb\x00\ud800 [red]:smile:"
SHOWN = r"a\x1b[2J\x07\r\x9b31m\u202eb\x00\ud800 [red]:smile:"


def test_control_characters_are_printed_as_escapes_wherever_they_stand(capfd):
    console = CommandConsole()
    console.print(EVIL)
    print_table([("name", "value"), (EVIL, "1")], console, title=EVIL)
    console.print(f"two lines\n\tand a tab, {EVIL}", style="bold")
    with progress_line(console, "label"):
        console.print(EVIL)
    printed = capfd.readouterr().err
    assert printed.replace("\n", "").replace("\t", "").isprintable()
    assert printed.count(SHOWN) == 5


def test_an_error_cannot_write_to_the_terminal(capfd):
    def run(options, console):
        raise ConversationError(EVIL)

    assert run_command(lambda argv: None, run, lambda options: "", []) == 2
    assert capfd.readouterr().err == f"error: {SHOWN}\n"
