"""Messages quote files that are not trusted."""

from __future__ import annotations

from runtime.common.errors import LONGEST_MESSAGE, KitError, brief, in_conversation


def test_a_message_is_bounded_and_printable():
    message = str(KitError("a\x1b[2J\n\ud800" + "x" * 5000 + "; remedy."))
    assert len(message) <= LONGEST_MESSAGE
    assert message.startswith("a\\x1b[2J\\n\\ud800xx") and message.endswith("x; remedy.")
    assert str(in_conversation(KitError("naïve 日本 🙂"), 3)) == "conversation 3: naïve 日本 🙂"


def test_a_value_is_described_briefly_at_any_depth():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    for value in (nested, "x" * 10**6, list(range(10**6)), {str(number): "y" * 999 for number in range(999)}, 10**4000):
        assert len(brief(value)) < 1000
