"""Every known format of rows gives the conversations of the same data in the `messages` form."""

from __future__ import annotations

import json

import pytest

from runtime.common.errors import ConfigurationError, ConversationError
from runtime.conversations.rendering import Renderer
from runtime.conversations.rows.context import RowOptions
from runtime.conversations.rows.recognise import read_row
from tests.conversations.test_conversation import assistant, system, user

Q = "Why is the sky blue?"
GOOD, BAD, WORSE = "Air scatters blue.", "It is not.", "No."
MESSAGES = [user(Q)]
TALK = [user("Hi"), assistant("Hello"), user(Q)]
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: " + Q + "\n\nAssistant:"
CHATML = f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n"


def gpt(text):
    return {"from": "gpt", "value": text}


HUMAN = {"from": "human", "value": Q}
PAIR = {"chosen": GOOD, "rejected": BAD}
ORDER = [GOOD, BAD]
HELPSTEER3 = {"context": TALK, "response1": BAD, "response2": GOOD}
PPE = {"prompt": Q, "response_1": GOOD, "response_2": BAD, "question_id": "1"}
RECOGNISED = [
    ({"prompt": Q, **PAIR}, "pair", MESSAGES, ORDER),
    ({"prompt": MESSAGES, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]}, "pair", MESSAGES, ORDER),
    (
        {
            "prompt": Q,
            "messages": [*MESSAGES, assistant(GOOD)],
            "chosen": [*MESSAGES, assistant(GOOD)],
            "rejected": [*MESSAGES, assistant(BAD)],
        },
        "pair",
        MESSAGES,
        ORDER,
    ),
    ({"chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)], "source": "x"}, "pair", TALK, ORDER),
    ({"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"}, "hh-rlhf", TALK, ORDER),
    ({"prompt": HH, "chosen": f" {GOOD}", "rejected": f" {BAD}"}, "pair", TALK, ORDER),
    ({"prompt": HH, "chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"}, "pair", TALK, ORDER),
    ({"prompt": CHATML, **PAIR}, "pair", MESSAGES, ORDER),
    ({"prompt": CHATML, "chosen": CHATML + GOOD + "<|im_end|>", "rejected": CHATML + BAD}, "pair", MESSAGES, ORDER),
    ({"prompt": json.dumps(MESSAGES), **PAIR}, "pair", MESSAGES, ORDER),
    ({"prompt": repr(MESSAGES), **PAIR}, "pair", MESSAGES, ORDER),
    ({"question": Q, "system": "Be kind.", **PAIR}, "pair", [system("Be kind."), *MESSAGES], ORDER),
    ({"messages": MESSAGES, **PAIR}, "pair", MESSAGES, ORDER),
    ({"instruction": Q, "input": "Say it.", **PAIR}, "pair", [user(f"{Q}\nSay it.")], ORDER),
    ({"instruction": Q, "input": "", "output": ORDER}, "llama-factory-pair", MESSAGES, ORDER),
    ({"conversations": [HUMAN], "chosen": gpt(GOOD), "rejected": gpt(BAD)}, "sharegpt-pair", MESSAGES, ORDER),
    ({"instruction": Q, "chosen_response": GOOD, "rejected_response": BAD}, "distilabel", MESSAGES, ORDER),
    (
        {"prompt": Q, "chosen": [GOOD], "rejected": [BAD, WORSE], "num_correct": 1},
        "rewardbench-2",
        MESSAGES,
        [GOOD, BAD, WORSE],
    ),
    (
        {"prompt": Q, "chosen": list("abc"), "rejected": list("xyz"), "domain": "x"},
        "rm-bench",
        MESSAGES,
        list("abcxyz"),
    ),
    ({"messages": [*TALK, assistant(GOOD)], "rejected_response": BAD}, "ms-swift", TALK, ORDER),
    ({"messages": [*TALK, assistant(GOOD)], "rejected_response": [BAD, WORSE]}, "ms-swift", TALK, [GOOD, BAD, WORSE]),
    (
        {"messages": [*TALK, assistant(GOOD)], "rejected_messages": [*TALK, assistant(BAD)]},
        "ms-swift-messages",
        TALK,
        ORDER,
    ),
    (
        {"query": Q, "response": GOOD, "rejected_response": BAD, "history": [["Hi", "Hello"]]},
        "ms-swift-query",
        TALK,
        ORDER,
    ),
    ({**HELPSTEER3, "overall_preference": 2}, "helpsteer3", TALK, ORDER),
    ({**HELPSTEER3, "overall_preference": -1}, "helpsteer3", TALK, [BAD, GOOD]),
    ({**HELPSTEER3, "overall_preference": 0}, "helpsteer3", TALK, [BAD, GOOD]),
    ({**PPE, "preference_strength": -3}, "helpsteer2-preference", MESSAGES, ORDER),
    ({"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1}, "pku-saferlhf", MESSAGES, ORDER),
    ({"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}, "shp", MESSAGES, ORDER),
    ({**PPE, "winner": "model_b"}, "ppe", MESSAGES, [BAD, GOOD]),
    ({**PPE, "winner": "tie (bothbad)"}, "ppe", MESSAGES, ORDER),
    ({**PPE, "scores": [True, False], "sampled_conflict_pairs": [[1, 0]]}, "ppe-best-of-k", MESSAGES, ORDER),
    ({"question": Q, "response_A": BAD, "response_B": GOOD, "label": "B>A"}, "judgebench", MESSAGES, ORDER),
    (
        {"conversation_a": [*TALK, assistant(BAD)], "conversation_b": [*TALK, assistant(GOOD)], "winner": "model_b"},
        "arena",
        TALK,
        ORDER,
    ),
    ({"question": Q, "response_j": GOOD, "response_k": BAD}, "stack-exchange", MESSAGES, ORDER),
    (
        {"conversation_input": TALK, "chosen": {"answer": GOOD, "llm_name": "a"}, "reject": {"answer": BAD}},
        "rmb-pair",
        TALK,
        ORDER,
    ),
    (
        {"conversation_input": TALK, "bon_best": {"answer": GOOD}, "loser_list": [{"answer": BAD}, {"answer": WORSE}]},
        "rmb-best-of-n",
        TALK,
        [GOOD, BAD, WORSE],
    ),
    (
        {"prompt": HH + " ", "answers": [{"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}]},
        "nectar",
        TALK,
        [BAD, GOOD],
    ),
    (
        {"instruction": Q, "completions": [{"response": GOOD, "model": "m"}, {"response": BAD}]},
        "completions",
        MESSAGES,
        ORDER,
    ),
    (
        {"prompt": Q, "responses": [{"text": GOOD}, {"message": assistant(BAD), "index": 1}]},
        "responses",
        MESSAGES,
        ORDER,
    ),
    ({"conversations": [HUMAN, gpt(GOOD)]}, "sharegpt", MESSAGES, [GOOD]),
    (
        {"conversation": [{"human": Q, "assistant": GOOD}], "system": "S"},
        "ms-swift-conversation",
        [system("S"), *MESSAGES],
        [GOOD],
    ),
    ({"messages": repr([*TALK, assistant(GOOD)])}, "messages", TALK, [GOOD]),
    (
        {
            "messages": [
                {"role": "developer", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": Q[:5]}, {"type": "text", "text": Q[5:]}]},
                assistant(GOOD),
            ]
        },
        "messages",
        [system("S"), *MESSAGES],
        [GOOD],
    ),
    (
        {"prompt": f"Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n{Q}", "response": GOOD, "helpfulness": 4},
        "helpsteer2",
        TALK,
        [GOOD],
    ),
    ({"prompt": Q, "completion": GOOD, "label": True}, "kto", MESSAGES, [GOOD]),
    ({"instruction": Q, "input": "", "output": GOOD}, "alpaca", MESSAGES, [GOOD]),
    ({"question": Q, "answer": GOOD}, "question-answer", MESSAGES, [GOOD]),
    ({"query": Q, "response": GOOD}, "query-response", MESSAGES, [GOOD]),
    ({"prompt": Q, "response": GOOD}, "prompt-response", MESSAGES, [GOOD]),
]


@pytest.fixture(scope="module")
def renderer(tiny_checkpoint) -> Renderer:
    return Renderer.from_directory(tiny_checkpoint, 1024)


@pytest.mark.parametrize(("row", "name", "prompt", "responses"), RECOGNISED, ids=lambda value: str(value)[:30])
def test_a_format_is_recognised_and_renders_as_messages(renderer, row, name, prompt, responses):
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
    nectar = next(row for row, name, *_ in RECOGNISED if name == "nectar")
    assert read_row(nectar).preferences == [(1, 0)]
    tie = read_row({**HELPSTEER3, "overall_preference": 0})
    assert tie.tied and not tie.preferences and "equally good" in tie.warnings[0]


TOOL = {"role": "tool", "content": "21 degrees"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": Q}]}
UNTRAINED = [
    ({"messages": [user(Q), CALL, TOOL, assistant(GOOD)]}, "tool calls"),
    ({"messages": [user(Q), TOOL, assistant(GOOD)]}, "the role 'tool'"),
    ({"messages": [IMAGE, assistant(GOOD)]}, "a part of type 'image_url'"),
    ({"prompt": Q, "images": ["a.png"], **PAIR}, "the row has images"),
]


@pytest.mark.parametrize(("row", "what"), UNTRAINED)
def test_what_the_model_was_not_trained_on_is_refused_by_name_or_rendered_with_a_warning(renderer, row, what):
    with pytest.raises(ConversationError, match=f"^f:1: .*{what}.*--lenient"):
        read_row(row, "f:1")
    reading = read_row(row, "f:1", RowOptions(lenient=True))
    assert any(what in text for text in reading.warnings)
    renderer.render(reading.conversations[0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "the keys 'text', which no known format has.*--columns"),
        ({"prompt": Q, "chosen": GOOD}, "no 'rejected'; the nearest format is pair"),
        ({"prompt": Q, "response_1": GOOD, "response_2": BAD}, "the nearest format is"),
        ({"prompt": Q, "question": "Other?", **PAIR}, "from 'prompt' and from 'question', which differ; .*--columns"),
        (
            {"messages": [user(Q), assistant(GOOD)], "conversations": [HUMAN, gpt(BAD)]},
            r"as messages \('messages'\) and as sharegpt \('conversations'\), which differ; .*--format",
        ),
        ({**PPE, "winner": "nobody"}, "winner is text 'nobody', which names neither"),
        ({"messages": "[{'role': 'user', 'content': f()}]"}, "begins like messages, but is neither JSON nor Python"),
        ({"prompt": "[{'role': 'user' 'content'", **PAIR}, "prompt is text that begins like messages"),
        ({"messages": [user(Q), assistant(GOOD)], "system": "a" * 3, "tools": [{}]}, "the row has tools"),
        ({"prompt": [system("a"), user(Q)], "system": "b", **PAIR}, "system column and the system turn .* differ"),
        ({"prompt": Q, "chosen": 3, "rejected": BAD}, "chosen is a number 3; text or a list"),
    ],
)
def test_other_rows_are_refused_with_a_short_reason(row, message):
    with pytest.raises(ConversationError, match=message) as caught:
        read_row(row, "f:1")
    assert str(caught.value).startswith("f:1: ") and len(str(caught.value)) < 400


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
