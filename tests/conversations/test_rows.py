"""Every known format of rows gives the conversations of the same data in the `messages` form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runtime.common.errors import ConfigurationError, ConversationError
from runtime.conversations.rendering import Renderer
from runtime.conversations.rows.context import RowOptions
from runtime.conversations.rows.recognise import read_row
from runtime.conversations.rows.shapes import FORMATS
from runtime.scorer import Scorer
from tests.conversations.test_conversation import assistant, system, user
from tests.helpers.row_examples import (
    BAD,
    GOOD,
    HELPSTEER3,
    HUMAN,
    PAIR,
    RECOGNISED,
    REFUSED,
    TALK,
    Q,
    document,
    gpt,
    reason,
)


@pytest.fixture(scope="module")
def renderer(tiny_checkpoint) -> Renderer:
    return Renderer.from_directory(tiny_checkpoint, 1024)


@pytest.mark.parametrize(("what", "row", "name", "prompt", "responses"), RECOGNISED, ids=[row[0] for row in RECOGNISED])
def test_a_format_is_recognised_and_renders_as_messages(renderer, what, row, name, prompt, responses):
    reading = read_row(row, "f:1")
    assert reading.format == name
    expected = [renderer.render([*prompt, assistant(text)]).token_ids for text in responses]
    assert [renderer.render(each).token_ids for each in reading.conversations] == expected
    assert read_row(row, "f:1", RowOptions(format=name)).conversations == reading.conversations


def test_every_preference_of_a_row_is_kept():
    six = {"prompt": Q, "chosen": list("abc"), "rejected": list("xyz"), "num_correct": 3}
    assert read_row(six).format == "rewardbench-2"
    by_lists = read_row({"prompt": Q, "chosen": ["a", "b"], "rejected": ["x", "y"]})
    assert by_lists.preferences == [(0, 2), (0, 3), (1, 2), (1, 3)]
    nectar = next(row for _, row, name, *_ in RECOGNISED if name == "nectar")
    assert read_row(nectar).preferences == [(1, 0)]
    tie = read_row({**HELPSTEER3, "overall_preference": 0})
    assert tie.tied and not tie.preferences and "equally good" in tie.warnings[0]


@pytest.mark.parametrize(("name", "row", "message"), REFUSED, ids=[each[0] for each in REFUSED])
def test_other_rows_are_refused_with_a_short_reason(name, row, message):
    with pytest.raises(ConversationError, match=f"^f:1: .*{message}") as caught:
        read_row(row, "f:1")
    assert len(str(caught.value)) < 360  # three lines


@pytest.mark.parametrize(("name", "row", "what"), REFUSED[:4], ids=[each[0] for each in REFUSED[:4]])
def test_what_the_model_was_not_trained_on_is_rendered_with_a_warning_on_request(renderer, name, row, what):
    assert "--lenient" in reason(row)
    reading = read_row(row, "f:1", RowOptions(lenient=True))
    assert any(what in text for text in reading.warnings)
    renderer.render(reading.conversations[0])


def test_scores_are_those_of_messages_bit_for_bit(tiny_checkpoint):
    scorer = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float32")
    found, expected = [], []
    for _, row, _, prompt, responses in RECOGNISED:
        found += read_row(row).conversations
        expected += [read_row({"messages": [*prompt, assistant(text)]}).conversations[0] for text in responses]
    assert torch.equal(scorer.score(found), scorer.score(expected))


def test_the_document_shows_these_rows():
    assert len(RECOGNISED) + len(REFUSED) >= 60 and {each[2] for each in RECOGNISED} == set(FORMATS)
    path = Path(__file__).parents[2] / "docs" / "row-formats.md"
    assert path.read_text() == document(), "python -m tests.helpers.row_examples > docs/row-formats.md"


HISTORY = [["Hi", "Hello"]]


@pytest.mark.parametrize("history", [HISTORY, TALK[:2], repr(TALK[:2])])
def test_history_is_the_turns_before_a_prompt_and_is_not_dropped_beside_messages(history):
    assert read_row({"prompt": Q, "history": history, **PAIR}).prompt == TALK
    whole = {"messages": [system("S"), *TALK, assistant(GOOD)], "history": history}
    assert read_row(whole).conversations == [whole["messages"]]
    for row in ({"messages": [user(Q), assistant(GOOD)]}, {"conversations": [HUMAN, gpt(GOOD)]}):
        (key,) = row
        with pytest.raises(ConversationError, match=f"f:1: the row has {key} and history; move the turns"):
            read_row({**row, "history": history}, "f:1")
    with pytest.raises(ConversationError, match="history is text 'earlier'; a list of"):
        read_row({"prompt": Q, "history": "earlier", **PAIR})


def test_the_format_and_the_columns_can_be_given():
    row = {"messages": [user(Q), assistant(GOOD)], "conversations": [HUMAN, gpt(BAD)]}
    assert read_row(row, options=RowOptions(format="sharegpt")).responses == [[assistant(BAD)]]
    columns = RowOptions(columns={"prompt": "q", "chosen": "a", "rejected": "b"})
    assert read_row({"q": Q, "a": GOOD, "b": BAD}, options=columns).format == "pair"
    with pytest.raises(ConversationError, match="no 'b', which --columns names"):
        read_row({"q": Q, "a": GOOD}, options=columns)
    with pytest.raises(ConfigurationError, match="--format is 'x'; one of"):
        read_row(row, options=RowOptions(format="x"))


@pytest.mark.parametrize(
    ("row", "warning"),
    [
        ({"prompt": Q, "chosen": f"{Q} {GOOD}", "rejected": BAD}, "chosen begins with the prompt"),
        ({"prompt": Q, "chosen": "User: other\nAssistant: x", "rejected": BAD}, "chosen begins like a transcript"),
        ({"prompt": "What does [/INST] mean?", **PAIR}, r"prompt has '\[/INST\]'"),
    ],
)
def test_what_may_be_structure_is_text_with_a_warning(row, warning):
    reading = read_row(row)
    assert len(reading.warnings) == 1
    with pytest.raises(AssertionError, match=warning):
        raise AssertionError(reading.warnings[0])
