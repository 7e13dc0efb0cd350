"""Read what RL trainers send, prompts and completions of a policy, as the prompts and responses of rows are read."""

from __future__ import annotations

from typing import Any

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage
from runtime.conversations.policy_transcripts import read_transcript, strip_end_tokens, strip_leading_tokens
from runtime.conversations.rows.context import RowContext
from runtime.conversations.rows.prompts import opened_turn, read_prompt, read_response


def read_policy_text(text: str, prompt: str | None = None, where: str = "") -> list[ChatMessage]:
    """Parse a text of a policy: a transcript, or a prompt and what follows it.

    Args:
        text: prompt and response.
        prompt: the prompt alone. If `text` starts with it, the rest of `text` is the response, as in `read_exchange`.
        where: names the text in errors.

    Raises:
        ConversationError: `text` does not start with a turn in a known template, or a prompt has tokens of another.
    """
    text = strip_leading_tokens(text)
    if prompt is not None:
        prompt = strip_leading_tokens(prompt)
        if prompt.strip() and text.startswith(prompt):
            return read_exchange(prompt, text[len(prompt) :], where)
    transcript = read_transcript(text)
    if transcript is None:
        raise ConversationError(
            f"{where or 'text'}: no turns were found; write them in ChatML, in the template of Llama, Gemma, Mistral, "
            "DeepSeek, Zephyr or Phi-3, or as 'User: ...' and 'Assistant: ...' on separate lines, or send messages."
        )
    return transcript.whole()


def read_exchange(prompt: Any, completion: Any, where: str = "") -> list[ChatMessage]:
    """The conversation of a policy's prompt and completion, each text or messages, read as those of a row.

    Two things differ from a row, because a policy wrote the completion and a trainer rendered the prompt: text of a
    completion is the response, even if it repeats the prompt or has further turns, and a prompt may have no tokens of a
    template that is not known.

    Raises:
        ConversationError: a value holds no turns, or the prompt has such tokens.
    """
    if isinstance(prompt, str) and isinstance(completion, str) and not prompt.strip():
        return read_policy_text(completion, None, where)
    context = RowContext(where, rendered=True)
    read = read_prompt({"prompt": prompt}, context)
    if not isinstance(completion, str):
        turns, _ = read_response(completion, "completion", read, context)
        return [*read.turns, *turns]
    opened = opened_turn(completion, read)
    content = read.response(completion if opened is None else opened)
    return [*read.turns, {"role": "assistant", "content": strip_end_tokens(content)}]
