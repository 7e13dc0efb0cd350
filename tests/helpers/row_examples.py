"""Rows as they are found: the shapes that are read, and those that are refused.

`tests/conversations/test_rows.py` tests them; docs/row-formats.md shows them, written by
`python -m tests.helpers.row_examples > docs/row-formats.md`.
"""

from __future__ import annotations

import json
from typing import Any

from runtime.common.errors import ConversationError
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
    ("TRL, texts", {"prompt": Q, **PAIR}, "pair", MESSAGES, ORDER),
    (
        "TRL, messages",
        {"prompt": MESSAGES, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
        "pair",
        MESSAGES,
        ORDER,
    ),
    (
        "UltraFeedback, binarized: both whole conversations",
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
    (
        "Skywork, Tulu, OLMo mixes: no prompt column",
        {"chosen": [*TALK, assistant(GOOD)], "rejected": [*TALK, assistant(BAD)], "source": "x"},
        "pair",
        TALK,
        ORDER,
    ),
    ("Anthropic hh-rlhf: transcripts", {"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"}, "hh-rlhf", TALK, ORDER),
    (
        "a transcript as prompt, responses apart",
        {"prompt": HH, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        "pair",
        TALK,
        ORDER,
    ),
    (
        "a transcript as prompt, repeated in the responses",
        {"prompt": HH, "chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"},
        "pair",
        TALK,
        ORDER,
    ),
    ("a prompt in ChatML", {"prompt": CHATML, **PAIR}, "pair", MESSAGES, ORDER),
    (
        "a prompt in ChatML, repeated in the responses",
        {"prompt": CHATML, "chosen": CHATML + GOOD + "<|im_end|>", "rejected": CHATML + BAD},
        "pair",
        MESSAGES,
        ORDER,
    ),
    ("a prompt of messages as JSON text", {"prompt": json.dumps(MESSAGES), **PAIR}, "pair", MESSAGES, ORDER),
    ("a prompt of messages as Python's repr", {"prompt": repr(MESSAGES), **PAIR}, "pair", MESSAGES, ORDER),
    (
        "Orca pairs: `system` beside `question`",
        {"question": Q, "system": "Be kind.", **PAIR},
        "pair",
        [system("Be kind."), *MESSAGES],
        ORDER,
    ),
    ("`messages` as the prompt of a pair", {"messages": MESSAGES, **PAIR}, "pair", MESSAGES, ORDER),
    (
        "LLaMA-Factory, instruction and input",
        {"instruction": Q, "input": "Say it.", **PAIR},
        "pair",
        [user(f"{Q}\nSay it.")],
        ORDER,
    ),
    (
        "LLaMA-Factory, a list of two outputs",
        {"instruction": Q, "input": "", "output": ORDER},
        "llama-factory-pair",
        MESSAGES,
        ORDER,
    ),
    (
        "LLaMA-Factory, ShareGPT turns",
        {"conversations": [HUMAN], "chosen": gpt(GOOD), "rejected": gpt(BAD)},
        "sharegpt-pair",
        MESSAGES,
        ORDER,
    ),
    (
        "distilabel, Argilla",
        {"instruction": Q, "chosen_response": GOOD, "rejected_response": BAD},
        "distilabel",
        MESSAGES,
        ORDER,
    ),
    (
        "RewardBench 2",
        {"prompt": Q, "chosen": [GOOD], "rejected": [BAD, WORSE], "num_correct": 1},
        "rewardbench-2",
        MESSAGES,
        [GOOD, BAD, WORSE],
    ),
    (
        "RM-Bench, three styles a side",
        {"prompt": Q, "chosen": list("abc"), "rejected": list("xyz"), "domain": "x"},
        "rm-bench",
        MESSAGES,
        list("abcxyz"),
    ),
    (
        "ms-swift, `rejected_response`",
        {"messages": [*TALK, assistant(GOOD)], "rejected_response": BAD},
        "ms-swift",
        TALK,
        ORDER,
    ),
    (
        "ms-swift, a list of rejected responses",
        {"messages": [*TALK, assistant(GOOD)], "rejected_response": [BAD, WORSE]},
        "ms-swift",
        TALK,
        [GOOD, BAD, WORSE],
    ),
    (
        "ms-swift, `rejected_messages`",
        {"messages": [*TALK, assistant(GOOD)], "rejected_messages": [*TALK, assistant(BAD)]},
        "ms-swift-messages",
        TALK,
        ORDER,
    ),
    (
        "ms-swift, `query` and `history`",
        {"query": Q, "response": GOOD, "rejected_response": BAD, "history": [["Hi", "Hello"]]},
        "ms-swift-query",
        TALK,
        ORDER,
    ),
    ("HelpSteer3, prefers the second", {**HELPSTEER3, "overall_preference": 2}, "helpsteer3", TALK, ORDER),
    ("HelpSteer3, prefers the first", {**HELPSTEER3, "overall_preference": -1}, "helpsteer3", TALK, [BAD, GOOD]),
    ("HelpSteer3, a tie", {**HELPSTEER3, "overall_preference": 0}, "helpsteer3", TALK, [BAD, GOOD]),
    ("HelpSteer2, preferences", {**PPE, "preference_strength": -3}, "helpsteer2-preference", MESSAGES, ORDER),
    (
        "PKU-SafeRLHF",
        {"prompt": Q, "response_0": BAD, "response_1": GOOD, "better_response_id": 1},
        "pku-saferlhf",
        MESSAGES,
        ORDER,
    ),
    ("SHP", {"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}, "shp", MESSAGES, ORDER),
    ("PPE, human preferences", {**PPE, "winner": "model_b"}, "ppe", MESSAGES, [BAD, GOOD]),
    ("PPE, a tie", {**PPE, "winner": "tie (bothbad)"}, "ppe", MESSAGES, ORDER),
    (
        "PPE, best of K",
        {**PPE, "scores": [True, False], "sampled_conflict_pairs": [[1, 0]]},
        "ppe-best-of-k",
        MESSAGES,
        ORDER,
    ),
    (
        "JudgeBench",
        {"question": Q, "response_A": BAD, "response_B": GOOD, "label": "B>A"},
        "judgebench",
        MESSAGES,
        ORDER,
    ),
    (
        "Chatbot Arena",
        {"conversation_a": [*TALK, assistant(BAD)], "conversation_b": [*TALK, assistant(GOOD)], "winner": "model_b"},
        "arena",
        TALK,
        ORDER,
    ),
    ("StackExchange pairs", {"question": Q, "response_j": GOOD, "response_k": BAD}, "stack-exchange", MESSAGES, ORDER),
    (
        "RMB, pairs",
        {"conversation_input": TALK, "chosen": {"answer": GOOD, "llm_name": "a"}, "reject": {"answer": BAD}},
        "rmb-pair",
        TALK,
        ORDER,
    ),
    (
        "RMB, best of N",
        {"conversation_input": TALK, "bon_best": {"answer": GOOD}, "loser_list": [{"answer": BAD}, {"answer": WORSE}]},
        "rmb-best-of-n",
        TALK,
        [GOOD, BAD, WORSE],
    ),
    (
        "Nectar",
        {"prompt": HH + " ", "answers": [{"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}]},
        "nectar",
        TALK,
        [BAD, GOOD],
    ),
    (
        "UltraFeedback, completions with their models",
        {"instruction": Q, "completions": [{"response": GOOD, "model": "m"}, {"response": BAD}]},
        "completions",
        MESSAGES,
        ORDER,
    ),
    (
        "choices of OpenAI's API",
        {"prompt": Q, "responses": [{"text": GOOD}, {"message": assistant(BAD), "index": 1}]},
        "responses",
        MESSAGES,
        ORDER,
    ),
    ("ShareGPT", {"conversations": [HUMAN, gpt(GOOD)]}, "sharegpt", MESSAGES, [GOOD]),
    (
        "ms-swift, question and answer in one object",
        {"conversation": [{"human": Q, "assistant": GOOD}], "system": "S"},
        "ms-swift-conversation",
        [system("S"), *MESSAGES],
        [GOOD],
    ),
    ("messages as Python's repr", {"messages": repr([*TALK, assistant(GOOD)])}, "messages", TALK, [GOOD]),
    (
        "OpenAI: `developer`, and content as text parts",
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
        "HelpSteer2: `<extra_id_1>` turns, attributes",
        {"prompt": f"Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n{Q}", "response": GOOD, "helpfulness": 4},
        "helpsteer2",
        TALK,
        [GOOD],
    ),
    ("KTO", {"prompt": Q, "completion": GOOD, "label": True}, "kto", MESSAGES, [GOOD]),
    ("Alpaca", {"instruction": Q, "input": "", "output": GOOD}, "alpaca", MESSAGES, [GOOD]),
    ("question and answer", {"question": Q, "answer": GOOD}, "question-answer", MESSAGES, [GOOD]),
    ("query and response", {"query": Q, "response": GOOD}, "query-response", MESSAGES, [GOOD]),
    ("prompt and response", {"prompt": Q, "response": GOOD}, "prompt-response", MESSAGES, [GOOD]),
    ("RewardBench", {"prompt": Q, **PAIR, "subset": "chat", "id": 3}, "pair", MESSAGES, ORDER),
    (
        "a prompt in Gemma's template",
        {"prompt": f"<start_of_turn>user\n{Q}<end_of_turn>\n", **PAIR},
        "pair",
        MESSAGES,
        ORDER,
    ),
    ("a prompt in Mistral's template", {"prompt": f"<s>[INST] {Q} [/INST]", **PAIR}, "pair", MESSAGES, ORDER),
    ("TRL, prompt and completion", {"prompt": Q, "completion": GOOD}, "prompt-completion", MESSAGES, [GOOD]),
    ("answers without ranks", {"prompt": Q, "answers": ORDER}, "answers", MESSAGES, ORDER),
    ("history as messages", {"prompt": Q, "history": TALK[:2], **PAIR}, "pair", TALK, ORDER),
]

TOOL = {"role": "tool", "content": "21 degrees"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": Q}]}
REFUSED = [
    ("OpenAI, tool calls", {"messages": [user(Q), CALL, TOOL, assistant(GOOD)]}, "tool calls"),
    ("OpenAI, a tool's answer", {"messages": [user(Q), TOOL, assistant(GOOD)]}, "the role 'tool'"),
    ("OpenAI, an image", {"messages": [IMAGE, assistant(GOOD)]}, "a part of type 'image_url'"),
    ("a column of images", {"prompt": Q, "images": ["a.png"], **PAIR}, "the row has images"),
    ("a column of tools", {"messages": [user(Q), assistant(GOOD)], "tools": [{}]}, "the row has tools"),
    ("a text", {"text": "x"}, "the keys 'text', which fit no known format.*--columns"),
    ("half a pair", {"prompt": Q, "chosen": GOOD}, "no 'rejected'; the nearest format is pair"),
    ("two responses and no preference", {"prompt": Q, "response_1": GOOD, "response_2": BAD}, "the nearest format is"),
    (
        "two prompts",
        {"prompt": Q, "question": "Other?", **PAIR},
        "from 'prompt' and from 'question', which differ; .*--columns",
    ),
    (
        "two conversations",
        {"messages": [user(Q), assistant(GOOD)], "conversations": [HUMAN, gpt(BAD)]},
        r"as messages \('messages'\) and as sharegpt \('conversations'\), which differ; .*--format",
    ),
    (
        "history beside messages",
        {"messages": [user(Q), assistant(GOOD)], "history": [["Hi", "Hello"]]},
        "the row has messages and history; move the turns",
    ),
    ("an unknown verdict", {**PPE, "winner": "nobody"}, "winner is text 'nobody', which names neither"),
    (
        "messages as code",
        {"messages": "[{'role': 'user', 'content': f()}]"},
        "begins like messages, but is neither JSON nor Python",
    ),
    (
        "messages as damaged text",
        {"prompt": "[{'role': 'user' 'content'", **PAIR},
        "prompt is text that begins like messages",
    ),
    (
        "two system prompts",
        {"prompt": [system("a"), user(Q)], "system": "b", **PAIR},
        "system column and the system turn .* differ",
    ),
    ("a number as response", {"prompt": Q, "chosen": 3, "rejected": BAD}, "chosen is a number 3; text or a list"),
    (
        "an unknown template",
        {"prompt": f"<|turn|>user\n{Q}", **PAIR},
        "'<|turn|>', a token of a chat template that is not known".replace("|", "[|]"),
    ),
    ("a pair without its prompt", PAIR, "share no first turn that could be the prompt"),
    ("a blank response", {"prompt": Q, "chosen": " ", "rejected": BAD}, "chosen: the response is blank"),
]


def keys_of(row: dict[str, Any]) -> str:
    """The keys of a row, each with the kind of its value."""
    return ", ".join(f"`{key}`{_kind(value)}" for key, value in row.items())


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return ""
    if isinstance(value, list):
        return " (messages)" if value and isinstance(value[0], dict) and "content" in value[0] else " (list)"
    return " (object)" if isinstance(value, dict) else f" ({json.dumps(value)})"


def reason(row: dict[str, Any]) -> str:
    """Why a row is refused."""
    try:
        read_row(row)
    except ConversationError as error:
        return str(error)
    raise AssertionError(row)


def document() -> str:
    """docs/row-formats.md."""
    lines = [
        "# Row formats",
        "",
        "Written by `python -m tests.helpers.row_examples`; the tests compare it with what the code does.",
        "[scoring.md](scoring.md#score-a-file) explains the formats and `--format`, `--columns` and `--lenient`.",
        "",
        "## Rows that are read",
        "",
        "The scores of each row equal those of the same conversations as `messages`, bit for bit.",
        "",
        "| rows of | keys | format | conversations |",
        "|---|---|---|---|",
        *(
            f"| {name} | {keys_of(row)} | `{format}` | {len(responses)} |"
            for name, row, format, _, responses in RECOGNISED
        ),
        "",
        "## Rows that are refused",
        "",
        "| rows with | keys | message |",
        "|---|---|---|",
        *(f"| {name} | {keys_of(row)} | {reason(row).replace('|', chr(92) + '|')} |" for name, row, _ in REFUSED),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(document(), end="")
