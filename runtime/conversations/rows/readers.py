"""How the conversations of each format are read; `runtime.conversations.rows.shapes` is the table that names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from runtime.conversations.conversation import EmptyConversationError, describe_value, location_prefix
from runtime.conversations.rows.context import RowContext, RowReading
from runtime.conversations.rows.message_values import decode_messages, read_messages
from runtime.conversations.rows.prompts import (
    PROMPT_KEYS,
    Prompt,
    continue_prompt,
    read_history,
    read_prompt,
    refuse_columns,
    with_system,
)

Row = dict[str, Any]
Read = Callable[[Row, RowContext], RowReading]


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def named_values(key: str, value: Any) -> list[tuple[str, Any]]:
    """(name, value) of the responses in a column."""
    return (
        [(f"{key}[{index}]", each) for index, each in enumerate(value)] if isinstance(value, list) else [(key, value)]
    )


def prefer(prompt: Prompt, better: list[Any], worse: list[Any], context: RowContext) -> RowReading:
    """Every one of `better` is preferred to every one of `worse`."""
    kind = "pair" if len(better) == len(worse) == 1 else "responses"
    reading = continue_prompt(prompt, [*better, *worse], kind, context)  # type: ignore[arg-type]
    pairs = product(range(len(better)), range(len(better), len(better) + len(worse)))
    return replace(reading, preferences=list(pairs))


def pair_reader(chosen: str = "chosen", rejected: str = "rejected", *prompts: str) -> Read:
    """A chosen and a rejected response. Without a prompt column, `messages` may hold the prompt."""

    def read(row: Row, context: RowContext) -> RowReading:
        better, worse = ([(key, row[key])] for key in (chosen, rejected))
        keys = prompts or PROMPT_KEYS
        if not any(key in row for key in keys) and isinstance(row[chosen], (str, dict)):
            keys = ("messages",)
        return prefer(read_prompt(row, context, keys), better, worse, context)

    return read


def read_lists(row: Row, context: RowContext) -> RowReading:
    """RewardBench 2, and RM-Bench with three styles a side: lists of chosen and of rejected responses."""
    better, worse = (named_values(key, row[key]) for key in ("chosen", "rejected"))
    return prefer(read_prompt(row, context), better, worse, context)


def responses_reader(key: str) -> Read:
    """N responses in one column."""

    def read(row: Row, context: RowContext) -> RowReading:
        value = row[key]
        if not isinstance(value, list):
            raise context.error(f"{key} is {describe_value(value)}; a list of responses was expected.")
        if not value:
            raise EmptyConversationError(
                f"{location_prefix(context.where)}{key} is empty; give at least one or remove the row."
            )
        return continue_prompt(read_prompt(row, context), named_values(key, value), "responses", context)

    return read


def read_nectar(row: Row, context: RowContext) -> RowReading:
    """Ranked answers; those of the best rank are preferred to the others."""
    reading = responses_reader("answers")(row, context)
    ranks = [each.get("rank") for each in row["answers"]]
    best = min(ranks)
    return replace(
        reading, preferences=[(i, j) for i, j in product(range(len(ranks)), repeat=2) if ranks[i] == best < ranks[j]]
    )


def is_ranked(row: Row) -> bool:
    """Whether every answer has a rank."""
    answers = row["answers"]
    return (
        isinstance(answers, list)
        and bool(answers)
        and all(isinstance(each, dict) and isinstance(each.get("rank"), (int, float)) for each in answers)
    )


def sign_of(value: Any) -> int | None:
    """A verdict that is a number: negative prefers the first response."""
    number = _number(value)
    return (number > 0) - (number < 0) if number is not None and number == number else None


def _number(value: Any) -> float | None:
    """A number, or text of one, as cells of CSV are."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def two_sided(first: str, second: str, key: str, choose: Callable[[Any], int | None], *prompts: str) -> Read:
    """Two responses and a verdict: `choose` gives -1 for the first, 1 for the second, 0 for a tie, None if unknown."""

    def read(row: Row, context: RowContext) -> RowReading:
        verdict = choose(row[key])
        if verdict is None:
            raise context.error(f"{key} is {describe_value(row[key])}, which names neither {first} nor {second}.")
        prompt = read_prompt(row, context, prompts or PROMPT_KEYS)
        sides = [(first, row[first]), (second, row[second])]
        if verdict == 0:
            reading = continue_prompt(prompt, sides, "responses", context)
            context.warn(f"{key} says that both responses are equally good")
            return replace(reading, tied=True)
        return prefer(prompt, sides[verdict > 0 :][:1], sides[verdict < 0 :][:1], context)

    return read


def choice_of(first: Any, second: Any, *ties: Any) -> Callable[[Any], int | None]:
    """A verdict that is one of given values: numbers or texts in lower case."""

    def choose(value: Any) -> int | None:
        value = _number(value) if isinstance(first, int) else value.strip().lower() if isinstance(value, str) else value
        return -1 if value == first else 1 if value == second else 0 if value in ties else None

    return choose


def arena_verdict(value: Any) -> int | None:
    """A verdict of Chatbot Arena or PPE: `model_a`, `model_b` or a tie."""
    if isinstance(value, str) and value.strip().lower().startswith("tie"):
        return 0
    return choice_of("model_a", "model_b", "both_bad")(value)


def messages_reader(key: str) -> Read:
    """One conversation in a column."""

    def read(row: Row, context: RowContext) -> RowReading:
        turns = whole_conversation(row, key, context)
        return continue_prompt(Prompt([]), [(key, turns)], "conversation", context)

    return read


def whole_conversation(row: Row, key: str, context: RowContext) -> list[Any]:
    """The turns of a column of messages, after the `system` column."""
    value = row[key]
    if isinstance(value, str) and (decoded := decode_messages(value, key, context)) is not None:
        value = decoded
    if not isinstance(value, list):
        raise context.error(
            f"{key} is {describe_value(value)}; a list of messages was expected, each with a role and a content."
        )
    refuse_columns(row, context)
    turns = read_messages(value, key, context)
    earlier = read_history(row, context)
    if earlier and [turn for turn in turns if turn["role"] != "system"][: len(earlier)] != earlier:
        raise context.error(f"the row has {key} and history; move the turns of history to the start of {key}.")
    return with_system(row, turns, context)


def read_swift(row: Row, context: RowContext) -> RowReading:
    """ms-swift: `messages` end in the chosen response; `rejected_response` replaces their last turn."""
    turns = whole_conversation(row, "messages", context)
    if "rejected_messages" in row:
        worse = [("rejected_messages", whole_conversation(row, "rejected_messages", context))]
        return prefer(Prompt([]), [("messages", turns)], worse, context)
    worse = named_values("rejected_response", row["rejected_response"])
    return prefer(Prompt(turns[:-1]), [("messages", turns[-1:])], worse, context)


def read_numbered(row: Row, context: RowContext) -> RowReading:
    """PPE's best of K: `response_1`, `response_2`, ..., `scores`, and pairs of one right and one wrong response."""
    keys = [key for key in (f"response_{number}" for number in range(1, len(row) + 1)) if key in row]
    reading = continue_prompt(read_prompt(row, context), [(key, row[key]) for key in keys], "responses", context)
    scores, pairs = row["scores"], row.get("sampled_conflict_pairs") or []
    try:
        found = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in pairs if scores[i] != scores[j]]
    except (TypeError, IndexError, ValueError, KeyError):
        raise context.error("scores and sampled_conflict_pairs do not fit the responses.") from None
    if not all(0 <= index < len(keys) for pair in found for index in pair):
        raise context.error("sampled_conflict_pairs names responses that the row does not have.")
    return replace(reading, preferences=list(dict.fromkeys(found)))


def single_reader(key: str, *prompts: str) -> Read:
    """One response to the prompt."""

    def read(row: Row, context: RowContext) -> RowReading:
        prompt = read_prompt(row, context, prompts or PROMPT_KEYS)
        return continue_prompt(prompt, [(key, row[key])], "conversation", context)

    return read


def read_best_of_n(row: Row, context: RowContext) -> RowReading:
    """RMB: the best response and the others."""
    prompt = read_prompt(row, context, ("conversation_input",))
    return prefer(prompt, [("bon_best", row["bon_best"])], named_values("loser_list", row["loser_list"]), context)


def read_chosen_first(row: Row, context: RowContext) -> RowReading:
    """LLaMA-Factory's older pairs: `output` holds the chosen, then the rejected response."""
    (chosen, rejected) = named_values("output", row["output"])
    return prefer(read_prompt(row, context), [chosen], [rejected], context)
