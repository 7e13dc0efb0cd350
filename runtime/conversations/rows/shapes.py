"""The table of row formats: the keys that each one needs, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runtime.conversations.rows.readers import (
    Read,
    Row,
    arena_verdict,
    choice_of,
    is_ranked,
    is_texts,
    messages_reader,
    pair_reader,
    read_best_of_n,
    read_chosen_first,
    read_lists,
    read_nectar,
    read_numbered,
    read_swift,
    responses_reader,
    sign_of,
    single_reader,
    two_sided,
)


@dataclass(frozen=True)
class Shape:
    """A format of rows.

    Attributes:
        name: for `--format`.
        needs: keys that a row must have.
        read: reads the row.
        rank: formats of a higher rank are preferred: 2 states a preference, 1 has N responses, 0 one conversation.
        applies: a further condition on the values.
    """

    name: str
    needs: tuple[str, ...]
    read: Read
    rank: int
    applies: Callable[[Row], bool] = lambda row: True


SHAPES = (
    Shape(
        "hh-rlhf",
        ("chosen", "rejected"),
        pair_reader(),
        2,
        lambda row: (
            not row.get("prompt")
            and all(isinstance(row[key], str) and row[key].startswith("\n\nHuman:") for key in ("chosen", "rejected"))
        ),
    ),
    Shape(
        "rm-bench",
        ("chosen", "rejected"),
        read_lists,
        2,
        lambda row: (
            is_texts(row["chosen"])
            and is_texts(row["rejected"])
            and len(row["chosen"]) == len(row["rejected"]) == 3
            and "num_correct" not in row
        ),
    ),
    Shape(
        "rewardbench-2",
        ("chosen", "rejected"),
        read_lists,
        2,
        lambda row: is_texts(row["chosen"]) and is_texts(row["rejected"]),
    ),
    Shape(
        "sharegpt-pair", ("conversations", "chosen", "rejected"), pair_reader("chosen", "rejected", "conversations"), 2
    ),
    Shape("pair", ("chosen", "rejected"), pair_reader(), 2),
    Shape(
        "rmb-pair", ("conversation_input", "chosen", "reject"), pair_reader("chosen", "reject", "conversation_input"), 2
    ),
    Shape("rmb-best-of-n", ("conversation_input", "bon_best", "loser_list"), read_best_of_n, 2),
    Shape(
        "distilabel", ("chosen_response", "rejected_response"), pair_reader("chosen_response", "rejected_response"), 2
    ),
    Shape("ms-swift-messages", ("messages", "rejected_messages"), read_swift, 2),
    Shape("ms-swift", ("messages", "rejected_response"), read_swift, 2),
    Shape(
        "ms-swift-query", ("query", "response", "rejected_response"), pair_reader("response", "rejected_response"), 2
    ),
    Shape(
        "llama-factory-pair",
        ("instruction", "output"),
        read_chosen_first,
        2,
        lambda row: is_texts(row["output"]) and len(row["output"]) == 2,
    ),
    Shape(
        "helpsteer3",
        ("context", "response1", "response2", "overall_preference"),
        two_sided("response1", "response2", "overall_preference", sign_of, "context"),
        2,
    ),
    Shape(
        "helpsteer2-preference",
        ("response_1", "response_2", "preference_strength"),
        two_sided("response_1", "response_2", "preference_strength", sign_of),
        2,
    ),
    Shape(
        "pku-saferlhf",
        ("response_0", "response_1", "better_response_id"),
        two_sided("response_0", "response_1", "better_response_id", choice_of(0, 1)),
        2,
    ),
    Shape(
        "shp",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        two_sided("human_ref_A", "human_ref_B", "labels", choice_of(1, 0), "history"),
        2,
    ),
    Shape("ppe-best-of-k", ("response_1", "response_2", "scores"), read_numbered, 2),
    Shape(
        "ppe", ("response_1", "response_2", "winner"), two_sided("response_1", "response_2", "winner", arena_verdict), 2
    ),
    Shape(
        "judgebench",
        ("response_A", "response_B", "label"),
        two_sided("response_A", "response_B", "label", choice_of("a>b", "b>a", "a=b")),
        2,
    ),
    Shape(
        "arena",
        ("conversation_a", "conversation_b", "winner"),
        two_sided("conversation_a", "conversation_b", "winner", arena_verdict, "no_prompt"),
        2,
    ),
    Shape("stack-exchange", ("response_j", "response_k"), pair_reader("response_j", "response_k"), 2),
    Shape("nectar", ("prompt", "answers"), read_nectar, 2, is_ranked),
    Shape("responses", ("responses",), responses_reader("responses"), 1),
    Shape("completions", ("completions",), responses_reader("completions"), 1),
    Shape("answers", ("prompt", "answers"), responses_reader("answers"), 1),
    Shape("messages", ("messages",), messages_reader("messages"), 0),
    Shape("sharegpt", ("conversations",), messages_reader("conversations"), 0),
    Shape("ms-swift-conversation", ("conversation",), messages_reader("conversation"), 0),
    Shape("helpsteer2", ("prompt", "response", "helpfulness"), single_reader("response", "prompt"), 0),
    Shape("kto", ("prompt", "completion", "label"), single_reader("completion", "prompt"), 0),
    Shape("prompt-response", ("prompt", "response"), single_reader("response", "prompt"), 0),
    Shape("prompt-completion", ("prompt", "completion"), single_reader("completion", "prompt"), 0),
    Shape("alpaca", ("instruction", "output"), single_reader("output"), 0),
    Shape("question-answer", ("question", "answer"), single_reader("answer", "question"), 0),
    Shape("query-response", ("query", "response"), single_reader("response", "query"), 0),
)
FORMATS = tuple(shape.name for shape in SHAPES)
