from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

from runtime.batch.formats import encode_csv, encode_jsonl
from runtime.batch.row import InputRow, make_output_record
from runtime.common.errors import ConversationError
from runtime.conversations.rendering import RenderedConversation, Renderer
from tests.conversations.test_conversation import ALMOST_ROWS, JSON_VALUES
from tests.helpers.tiny_score import assistant, user

QUESTION = [user("Q")]
TALK = [user("1"), assistant("2"), user("3")]


@pytest.fixture(scope="module")
def renderer(tiny_checkpoint) -> Renderer:
    return Renderer.from_directory(tiny_checkpoint, 64)


@pytest.mark.parametrize(
    ("row", "kind", "conversations"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "pair", [[*QUESTION, assistant(x)] for x in "ab"]),
        (
            {"chosen": [*TALK, assistant("a")], "rejected": [*TALK, assistant("b")]},
            "pair",
            [[*TALK, assistant("a")], [*TALK, assistant("b")]],
        ),
        (
            {"prompt": QUESTION, "responses": ["a", [assistant("b")], [*TALK, assistant("c")]]},
            "responses",
            [[*QUESTION, assistant("a")], [*QUESTION, assistant("b")], [*TALK, assistant("c")]],
        ),
        ({"prompt": "Q", "responses": ["a"], "chosen": None}, "responses", [[*QUESTION, assistant("a")]]),
        (
            {"responses": [[*QUESTION, assistant("a")], [*TALK, assistant("b")]]},
            "responses",
            [[*QUESTION, assistant("a")], [*TALK, assistant("b")]],
        ),
        ({"messages": [*TALK, assistant("a")]}, "conversation", [[*TALK, assistant("a")]]),
        (
            {"prompt": "Q", "chosen": "a", "rejected": "b", "responses": ["c"], "messages": TALK},
            "pair",
            [[*QUESTION, assistant(x)] for x in "ab"],
        ),
    ],
)
def test_every_shape_says_what_is_to_be_scored(row, kind, conversations):
    read = InputRow.read(row, "f:1")
    assert (read.kind, read.conversations, read.error) == (kind, conversations, "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "f:1: the row has the keys 'question' but no 'answer'"),
        ({}, "f:1: the row has no keys"),
        (3, "f:1: the row is a number 3"),
        ({"prompt": "Q", "responses": "a"}, "f:1: responses is text 'a'; a list of responses"),
        ({"prompt": "Q", "responses": []}, "f:1: responses is empty"),
        ({"prompt": "Q", "responses": ["a", " "]}, r"f:1: responses\[1\]: the response is blank"),
        ({"prompt": "Q", "responses": ["a", 7]}, r"f:1: responses\[1\] is a number 7; text or a list"),
        ({"responses": ["a"]}, r"f:1: responses\[0\]: no turn is the user's"),
        ({"prompt": " ", "responses": ["a"]}, "f:1: the prompt is blank"),
        ({"prompt": "Q", "responses": [[user("x")]]}, r"f:1: responses\[0\]: the last turn is the user's"),
        ({"messages": [user("Q"), assistant("A")], "id": [1]}, "f:1: id is a list .* text or a number"),
        ({"messages": [user("Q"), assistant("A")], "id": float("inf")}, "f:1: id is a number inf"),
        (ConversationError("f:1: not JSON"), "f:1: not JSON"),
    ],
)
def test_a_fault_stays_with_the_row_and_names_its_place(row, message):
    read = InputRow.read(row, "f:1")
    with pytest.raises(ConversationError, match=f"^{message}"):
        raise ConversationError(read.error)
    assert read.conversations == []


@pytest.mark.parametrize(
    ("given", "kept"),
    [("x", "x"), (7, 7), (1.5, 1.5), (None, None), (float("nan"), None), (True, True), ("\ud800", "\\ud800")],
)
def test_id_and_category_are_kept(given, kept):
    read = InputRow.read({"prompt": "Q", "chosen": "a", "rejected": "b", "id": given, "subset": "maths"}, "f:1")
    assert (read.id, read.category) == (kept, "maths")


def test_a_broken_row_keeps_its_id():
    assert InputRow.read({"id": "x", "messages": []}, "f:1").id == "x"


def test_rendering_is_the_renderer_s(renderer):
    row = InputRow.read({"prompt": "Q", "chosen": "a", "rejected": "bb"}, "f:1")
    row.render(renderer, truncate=False)
    expected = [renderer.render([*QUESTION, assistant(text)]) for text in ("a", "bb")]
    assert row.rendered == expected
    assert row.tokens == sum(len(rendered.token_ids) for rendered in expected)
    assert row.conversations == []  # the text is not held on to


def test_one_conversation_that_is_too_long_fails_the_row_by_name(renderer):
    row = InputRow.read({"prompt": "Q", "responses": ["a", "b" * 99]}, "f:1")
    row.render(renderer, truncate=False)
    assert row.error.startswith("f:1: responses[1]: 115 tokens, but the model has 64 positions")
    assert (row.rendered, row.tokens) == ([], 0)


def test_what_was_dropped_is_said_of_the_response_it_was_dropped_for(renderer):
    talk = [user("x" * 20), assistant("y"), user("Q")]
    row = InputRow.read({"prompt": talk, "chosen": "a", "rejected": "b" * 30}, "f:1")
    row.render(renderer, truncate=True)
    assert row.error == ""
    assert row.warnings() == ["rejected: truncated: the oldest 2 turns were dropped"]


def test_what_holds_for_all_is_said_once():
    text = "non-empty system prompt"
    row = InputRow(
        "f:1",
        "responses",
        rendered=[RenderedConversation([1], 0, [text]), RenderedConversation([1], 0, [text, "other"])],
        names=["responses[0]", "responses[1]"],
    )
    assert row.warnings() == [text, "responses[1]: other"]


def test_a_template_s_refusal_has_the_place_too(renderer):
    row = InputRow("f:1")
    row.mark_failed(ConversationError("the chat template refuses this conversation"))
    assert row.error == "f:1: the chat template refuses this conversation"


def test_the_canonical_bytes_tell_rows_apart():
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    rows = [pair, {**pair, "chosen": "c"}, {**pair, "id": 1}, {**pair, "id": "1"}, {**pair, "category": "x"}, 3, 4]
    rows.append({"prompt": "Q", "responses": ["a", "b"]})
    seen = {InputRow.read(row, "f:1").canonical() for row in rows}
    assert len(seen | {InputRow.read(pair, "f:2").canonical()}) == len(rows) + 1
    assert InputRow.read({**pair, "unknown": "x"}, "f:1").canonical() in seen
    assert InputRow.read({**pair, "label": 1}, "f:1").canonical() not in seen


@settings(deadline=None)
@given(JSON_VALUES | ALMOST_ROWS)
def test_whatever_a_row_holds_it_gives_a_record_that_can_be_written(renderer, row):
    input_row = InputRow.read(row, "f\udcff:1")
    input_row.canonical()
    input_row.render(renderer, truncate=False)
    record = make_output_record(input_row, [0.5] * len(input_row.rendered))
    assert json.loads(encode_jsonl([record])) == record
    encode_csv([record])
    assert ("error" in record) != ("scores" in record)


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({"helpfulness": 4, "verbosity": 1.0}, {"helpfulness": 4, "verbosity": 1.0}),
        ({"label": True, "winner": "model_a"}, {"label": True, "winner": "model_a"}),
        ({"scores": [True, False], "overall_preference": -3}, {"scores": [True, False], "overall_preference": -3}),
        ({"id": 3, "category": "c", "note": "text", "label": "x" * 201, "meta": {"a": 1}, "vector": [0.5] * 65}, {}),
        ({"x": float("nan"), "y": None, "z": []}, {}),
    ],
)
def test_labels_are_kept_and_texts_are_not(renderer, more, labels):
    row = InputRow.read({"prompt": "Q", "chosen": "a", "rejected": "b", **more}, "f:1")
    row.render(renderer, truncate=False)
    record = make_output_record(row, [1.0, 0.0])
    assert record.get("labels", {}) == labels
    assert json.loads(encode_jsonl([record])) == record
