"""Read the prompt of a row and the responses that continue it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.conversations.conversation import (
    ChatMessage,
    EmptyConversationError,
    check_conversation,
    check_message,
    describe_value,
    location_prefix,
)
from runtime.conversations.policy_transcripts import (
    Transcript,
    find_template_token,
    read_transcript,
    strip_end_tokens,
    strip_leading_tokens,
)
from runtime.conversations.rows.context import RowContext, RowKind, RowReading
from runtime.conversations.rows.message_values import (
    decode_messages,
    is_message,
    object_text,
    read_messages,
    unreadable,
)

PROMPT_KEYS = ("prompt", "question", "instruction", "query", "input")
_NAMES_OF_SPEAKERS = ("User:", "Human:", "Assistant:")


@dataclass(frozen=True)
class Prompt:
    """The turns before a response.

    Attributes:
        turns: without the start of the response.
        transcript: that the prompt was written as, if it was.
    """

    turns: list[ChatMessage]
    transcript: Transcript | None = None

    @property
    def is_open(self) -> bool:
        """Whether the assistant's turn has begun, as in a generation prompt."""
        return self.transcript is not None and self.transcript.is_open

    def response(self, text: str) -> str:
        """The response that continues the prompt with a text. End tokens in other than transcripts were typed."""
        return self.transcript.response(text) if self.transcript else text


def read_prompt(row: dict[str, Any], context: RowContext, keys: Sequence[str] = PROMPT_KEYS) -> Prompt:
    """The prompt from the first of `keys` that the row has, after its `system` turn and its `history`."""
    refuse_columns(row, context)
    key = next((key for key in keys if row.get(key) not in (None, [])), "")
    prompt = _read_prompt_value(row[key], key, context) if key else Prompt([])
    if keys is PROMPT_KEYS:
        _check_other_prompts(row, key, prompt, context)
    if key == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        text = f"{row['instruction']}\n{row['input']}"  # as LLaMA-Factory joins them
        prompt = Prompt([{"role": "user", "content": text}])
    turns = [*([] if key == "history" else read_history(row, context)), *prompt.turns]
    return Prompt(with_system(row, turns, context), prompt.transcript)


def with_system(row: dict[str, Any], turns: list[ChatMessage], context: RowContext) -> list[ChatMessage]:
    """Turns that begin with the row's `system` column, if it has one."""
    system = next((row[key] for key in ("system", "system_prompt") if isinstance(row.get(key), str)), "")
    if not system.strip() or not turns:
        return turns
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"] != system:
        raise context.error("the system column and the system turn of the messages differ; keep one of them.")
    return turns


def refuse_columns(row: dict[str, Any], context: RowContext) -> None:
    """Refuse images and tools, or warn that they are left out."""
    for key in ("images", "image", "videos", "audios", "tools"):
        if row.get(key) not in (None, [], {}, "", "[]", "null"):
            context.refuse(f"the row has {key}", "they are left out")


def _check_other_prompts(row: dict[str, Any], key: str, prompt: Prompt, context: RowContext) -> None:
    """Refuse a row with two different prompts."""
    text = "\n".join([prompt.transcript.text if prompt.transcript else "", *(turn["content"] for turn in prompt.turns)])
    for other in PROMPT_KEYS[:4]:
        if other != key and isinstance(row.get(other), str) and row[other].strip() and row[other] not in text:
            raise context.error(
                f"the prompt can be read from {key!r} and from {other!r}, which differ; choose one with "
                f"--columns prompt={key} or --columns prompt={other}, or remove a column."
            )


def _read_prompt_value(value: Any, name: str, context: RowContext) -> Prompt:
    if isinstance(value, str) and (decoded := decode_messages(value, name, context)) is not None:
        value = decoded
    if isinstance(value, list) or is_message(value):
        return Prompt(read_messages(value, name, context))
    if not isinstance(value, str):
        raise unreadable(value, name, "user", context)
    check_message({"role": "user", "content": value}, name, context.where)
    transcript = read_transcript(value)
    if transcript is None:
        if token := find_template_token(value):
            _judge_token(token, value, name, context)
        return Prompt([{"role": "user", "content": value}])
    _check_roles(transcript.turns, name, context)
    return Prompt(transcript.turns[:-1] if transcript.is_open else transcript.turns, transcript)


def _judge_token(token: str, text: str, name: str, context: RowContext) -> None:
    """Refuse a prompt with a token of a template that is not known, unless a user may have typed it."""
    if context.rendered or text.lstrip().startswith(token):
        raise context.error(f"{name} has {token!r}, a token of a chat template that is not known here; send messages.")
    context.warn(f"{name} has {token!r}, a token of a chat template, and is read as text")


def read_history(row: dict[str, Any], context: RowContext) -> list[ChatMessage]:
    """Earlier turns: pairs of [question, answer] as of LLaMA-Factory and ms-swift, or messages."""
    value = row.get("history")
    if isinstance(value, str) and (decoded := decode_messages(value, "history", context)) is not None:
        value = decoded
    if value in (None, []) or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, list) and all(map(is_message, value)):
        return read_messages(value, "history", context)
    if not isinstance(value, list) or not all(isinstance(each, list) and len(each) == 2 for each in value):
        raise context.error(
            f"history is {describe_value(value)}; a list of [question, answer] or of messages was expected. Rename or "
            "remove the column if it is something else."
        )
    turns = [
        {"role": role, "content": text}
        for each in value
        for role, text in zip(("user", "assistant"), each, strict=True)
    ]
    return read_messages(turns, "history", context)


def read_response(value: Any, name: str, prompt: Prompt, context: RowContext) -> tuple[list[ChatMessage], bool]:
    """The turns of a response, and whether they repeat the prompt."""
    if isinstance(value, dict) and not is_message(value) and (inner := object_text(value)) is not None:
        value = inner
    if isinstance(value, str) and (decoded := decode_messages(value, name, context)) is not None:
        value = decoded
    if isinstance(value, (list, dict)):
        turns = read_messages(value, name, context)
        continued = bool(prompt.turns) and prompt.turns[-1]["role"] == "assistant"
        if prompt.transcript and prompt.transcript.start and turns[0]["role"] == "assistant":
            turns[0]["content"] = prompt.response(turns[0]["content"])
        return turns, turns[0]["role"] != "assistant" and not continued
    if not isinstance(value, str):
        raise unreadable(value, name, "assistant", context)
    check_message({"role": "assistant", "content": value}, name, context.where)
    whole, start = strip_leading_tokens(value), prompt.transcript.text if prompt.transcript else ""
    rest = whole[len(start) :] if start and whole.startswith(start) else ""
    if rest and prompt.is_open:
        value = rest
    elif rest and (opened := opened_turn(rest, prompt)) is not None:
        value = opened
    elif transcript := _read_transcript_response(value, name, prompt, context):
        return transcript, transcript[0]["role"] != "assistant"
    return [{"role": "assistant", "content": prompt.response(value)}], False


def _read_transcript_response(text: str, name: str, prompt: Prompt, context: RowContext) -> list[ChatMessage] | None:
    """The turns of a response that is a transcript; None if it is text, with a warning if that is not certain."""
    transcript = read_transcript(text)
    if transcript is None:
        question = prompt.turns[-1]["content"] if prompt.turns else ""
        if len(question) > 10 and text.startswith(question):
            context.warn(f"{name} begins with the prompt and is read as text")
        if not prompt.transcript and strip_end_tokens(text) != text:
            context.warn(f"{name} ends with a token of a chat template and is read as text")
        return None
    turns = transcript.whole()
    whole = turns[0]["role"] != "assistant" and turns[-1]["role"] == "assistant"
    blank = not any(turn["content"].strip() for turn in prompt.turns)
    same = blank or turns[: len(prompt.turns)] == prompt.turns
    if (whole and same) or opened_turn(text, prompt) is not None:
        _check_roles(turns, name, context)
        return turns
    context.warn(f"{name} begins like a transcript, but not one of this prompt, and is read as text")
    return None


def opened_turn(text: str, prompt: Prompt) -> str | None:
    """The text of a response that begins with the template's opening of its own turn, and has no other turn."""
    transcript = None if prompt.is_open or text.startswith(_NAMES_OF_SPEAKERS) else read_transcript(text)
    turns = transcript.whole() if transcript else []
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "assistant" else None


def _check_roles(turns: list[ChatMessage], name: str, context: RowContext) -> None:
    for index, turn in enumerate(turns):
        check_message(turn, f"{name}[{index}]", context.where)


def continue_prompt(
    prompt: Prompt, values: Sequence[tuple[str, Any]], kind: RowKind, context: RowContext
) -> RowReading:
    """Read (name, value) of each response. A response may repeat the prompt, as in UltraFeedback.

    Raises:
        EmptyConversationError: the prompt or a response is blank.
        ConversationError: a value holds no turns, or the two responses of a pair have no prompt.
    """
    prefix, names = location_prefix(context.where), [name for name, _ in values]
    read = [read_response(value, name, prompt, context) for name, value in values]
    shared, responses = prompt.turns, [turns for turns, _ in read]
    if not shared or any(whole for _, whole in read):
        whole = [turns if full else [*shared, *turns] for turns, full in read]
        whole = [
            turns
            if not shared or turns[0]["role"] == "system" or shared[0]["role"] != "system"
            else [shared[0], *turns]
            for turns in whole
        ]
        shared, responses = split_common(whole)
        if kind == "pair" and not shared:
            both = f"{names[0]!r} and {names[1]!r}"
            raise context.error(f"the row has no 'prompt', and {both} share no first turn that could be the prompt.")
    reading = RowReading(kind, shared, responses, names, warnings=context.warnings)
    for name, conversation in zip(names, reading.conversations, strict=True):
        location = context.where if kind == "conversation" else prefix + name
        check_conversation(conversation, location, allow_blank=context.allow_blank)
        if not context.allow_blank and not any(turn["content"].strip() for turn in conversation[:-1]):
            raise EmptyConversationError(f"{prefix}the prompt is blank; fill it in or remove the row.")
    return reading


def split_common(
    conversations: list[list[ChatMessage]],
) -> tuple[list[ChatMessage], list[list[ChatMessage]]]:
    """Common leading turns, and the remaining turns of each; at least the last turn remains."""
    first, length = conversations[0], 0
    shortest = min(map(len, conversations))
    while length < shortest - 1 and all(each[length] == first[length] for each in conversations):
        length += 1
    return first[:length], [each[length:] for each in conversations]
