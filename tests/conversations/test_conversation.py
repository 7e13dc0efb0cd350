from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import EmptyConversationError, PreferencePair, check_conversation
from runtime.conversations.row_shapes import parse_row


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


EXPECTED = PreferencePair([user("Q")], [assistant("good")], [assistant("bad")], "maths", "f:1")
GOOD, BAD = [assistant("good")], [assistant("bad")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("Q")], "chosen": GOOD, "rejected": BAD},
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"prompt": [user("Q")], "chosen": "good", "rejected": BAD},
        {"chosen": [user("Q"), *GOOD], "rejected": [user("Q"), *BAD]},
        {"prompt": None, "chosen": [user("Q"), *GOOD], "rejected": [user("Q"), *BAD], "messages": None},
        {"prompt": [], "chosen": [user("Q"), *GOOD], "rejected": [user("Q"), *BAD]},
        {
            "prompt": "Q",
            "chosen": [user("Q"), *GOOD],
            "rejected": [user("Q"), *BAD],
            "messages": [user("Q"), *GOOD],
        },
    ],
    ids=["explicit", "text", "mixed", "implicit", "null-prompt", "empty-prompt", "ultrafeedback"],
)
def test_every_shape_of_one_pair_reads_the_same(row):
    assert parse_row({**row, "category": "maths"}, "f:1") == EXPECTED
    assert parse_row({**row, "subset": "maths", "id": 7}, "f:1") == EXPECTED


def test_implicit_prompt_is_the_longest_common_beginning():
    shared = [system("S"), user("1"), assistant("2"), user("3")]
    pair = parse_row({"chosen": [*shared, *GOOD], "rejected": [*shared, *BAD, user("more"), assistant("x")]})
    assert pair.prompt == shared
    assert pair.chosen_conversation == [*shared, *GOOD]
    assert pair.rejected == [*BAD, user("more"), assistant("x")]


def test_identical_responses_keep_their_last_turn():
    pair = parse_row({"chosen": [user("Q"), *GOOD], "rejected": [user("Q"), *GOOD]})
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("Q")], GOOD, GOOD)


def test_prompt_that_ends_with_an_answer_is_continued():
    row = {
        "prompt": [user("Q"), assistant("A")],
        "chosen": [user("again"), *GOOD],
        "rejected": [user("again"), *BAD],
    }
    assert parse_row(row).chosen_conversation == [user("Q"), assistant("A"), user("again"), *GOOD]


def test_messages_alone_are_a_conversation_without_their_extra_keys():
    assert parse_row({"messages": [{**user("Q"), "name": "x"}, assistant("A")]}) == [
        user("Q"),
        assistant("A"),
    ]


def test_id_depends_on_text_only():
    text = b'[[["user","Q"]],[["assistant","good"]],[["assistant","bad"]]]'
    other = PreferencePair(EXPECTED.prompt, EXPECTED.chosen, EXPECTED.rejected, "code", "elsewhere")
    assert other.id == EXPECTED.id == hashlib.sha256(text).hexdigest()[:16]
    assert PreferencePair(EXPECTED.prompt, EXPECTED.rejected, EXPECTED.chosen).id != EXPECTED.id
    moved = PreferencePair([], [user("Q"), *GOOD], BAD)
    assert moved.id != EXPECTED.id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, r"f\.jsonl:9: the row is a number 3; an object such as"),
        ({}, "no keys"),
        ({"question": "x"}, "the keys 'question' but no 'answer'; the nearest format is question-answer"),
        ({"chosen": "x"}, "no 'rejected'"),
        ({"chosen": "x", "rejected": None}, "no 'rejected'"),
        ({"chosen": "x", "rejected": "y"}, "share no first turn"),
        ({"prompt": 1, "chosen": "x", "rejected": "y"}, "prompt is a number 1; text or a list"),
        ({"prompt": {"role": "user"}, "chosen": "x", "rejected": "y"}, "prompt is an object"),
        (
            {"prompt": "Q", "chosen": [user("Q2"), user("Q3")], "rejected": [user("Q2"), *BAD]},
            "chosen: the last turn",
        ),
        ({"messages": "x"}, "messages is text 'x'"),
        ({"messages": [user("x")]}, "last turn is the user's"),
        ({"messages": [assistant("x")]}, "no turn is the user's"),
        ({"messages": [user("x"), system("s"), assistant("y")]}, r"messages\[1\] is a system turn"),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            r"messages\[0\] has role text 'human'; one of system",
        ),
        ({"messages": [{"from": "human", "value": "x"}]}, "the last turn is the user's"),
        (
            {"messages": [user("x"), {"role": "assistant", "content": None}]},
            r"messages\[1\] is null; text|content of",
        ),
        (
            {"messages": [user("x"), assistant("ab\ud800")]},
            r"has an unpaired surrogate.*'\\ud800'.* 2;",
        ),
    ],
)
def test_faults_name_the_place_the_value_and_the_remedy(row, message):
    with pytest.raises(ConversationError, match=message) as caught:
        parse_row(row, "f.jsonl:9")
    assert str(caught.value).startswith("f.jsonl:9: ")
    assert not isinstance(caught.value, EmptyConversationError)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": " \n", "rejected": "x"},
        {"prompt": "Q", "chosen": "x", "rejected": ""},
        {"prompt": " ", "chosen": "x", "rejected": "y"},
        {"prompt": "Q", "chosen": [], "rejected": "y"},
        {"messages": []},
        {"messages": [user("Q"), assistant("\u3000")]},
    ],
)
def test_blank_rows_have_their_own_error(row):
    with pytest.raises(EmptyConversationError):
        parse_row(row)


@pytest.mark.parametrize("messages", [None, [], {}, "text", [user("x")], [1], [[user("x")]]])
def test_check_conversation_refuses_what_is_not_one(messages):
    with pytest.raises(ConversationError):
        check_conversation(messages, "request")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ALMOST_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | JSON_VALUES},
        optional={"content": JSON_VALUES},
    ),
    max_size=4,
)
ALMOST_ROWS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("prompt", "chosen", "rejected", "messages", "category", "subset"), ALMOST_MESSAGES | JSON_VALUES
    ),
)


@settings(deadline=None)
@given(JSON_VALUES | ALMOST_ROWS)
@example({"prompt": "Q", "chosen": "x", "rejected": "y", "category": "\ud800"})
def test_whatever_a_row_holds_the_result_is_a_conversation_or_a_conversation_error(row):
    try:
        parsed = parse_row(row, "f:1")
    except ConversationError as error:
        str(error).encode()
        return
    if isinstance(parsed, PreferencePair):
        check_conversation(parsed.chosen_conversation)
        check_conversation(parsed.rejected_conversation)
        parsed.category.encode()
        json.dumps(parsed.id)
    else:
        check_conversation(parsed)


def test_deeply_nested_rows_are_described_not_followed():
    value: list = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ConversationError, match="a list"):
        parse_row({"messages": [value]})
