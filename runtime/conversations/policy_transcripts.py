"""Parse a policy model's transcript, which contains the special tokens of its own chat template, into turns.

RL trainers send prompt and completion rendered with the policy's template; the reward model needs its own template.
If the prompt is given separately, only the prompt is parsed. Everything after it is the response, even if the policy
generated further turns.
"""

from __future__ import annotations

import re

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage

_CHATML = re.compile(r"<\|im_start\|>([\w-]+)\n")
_LLAMA3 = re.compile(r"<\|start_header_id\|>([\w-]+)<\|end_header_id\|>\n\n")
_PLAIN = re.compile(r"(?:\A|\n)(User|Human|Assistant): ?")
_PLAIN_ROLES = {"User": "user", "Human": "user", "Assistant": "assistant"}
_LEADING_SPECIAL_TOKENS = re.compile(
    r"(?:<\|begin_of_text\|>|<\|endoftext\|>|<\|finetune_right_pad_id\|>|<s>|<bos>|<pad>)*"
)
_TURN_END = re.compile(r"(?:<\|im_end\|>|<\|eot_id\|>)\n?\Z")
_END_TOKENS: tuple[str, ...] = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
)
_END_TOKENS += ("</s>", "<eos>", "<pad>")


def read_policy_text(text: str, prompt: str | None = None, where: str = "") -> list[ChatMessage]:
    """Parse a transcript in ChatML, in the Llama-3 template, or in plain text with `User:` and `Assistant:`.

    Args:
        text: prompt and response.
        prompt: the prompt alone, in the same template or as plain text. If `text` starts with it, the rest of `text` is
            the response.
        where: names the text in errors.

    Raises:
        ConversationError: `text` does not start with a turn in any of these formats.
    """
    text = text[_LEADING_SPECIAL_TOKENS.match(text).end() :]  # type: ignore[union-attr]  # it also matches the empty string
    if prompt is not None:
        prompt = prompt[_LEADING_SPECIAL_TOKENS.match(prompt).end() :]  # type: ignore[union-attr]
        if prompt.strip() and text.startswith(prompt):
            return _append_response(_read_turns(prompt) or [{"role": "user", "content": prompt}], text[len(prompt) :])
    turns = _read_turns(text)
    if turns is None:
        raise ConversationError(
            f"{where or 'text'}: no turns were found; write them in ChatML, in the Llama-3 template, or as "
            "'User: ...' and 'Assistant: ...' on separate lines, or send messages."
        )
    turns[-1]["content"] = _strip_end_tokens(turns[-1]["content"])
    return turns


def _append_response(turns: list[ChatMessage], response: str) -> list[ChatMessage]:
    """Append the response; it continues the last turn if that is the assistant's (a generation prompt)."""
    response = _strip_end_tokens(response)
    if turns[-1]["role"] == "assistant":
        return [*turns[:-1], {"role": "assistant", "content": turns[-1]["content"] + response}]
    return [*turns, {"role": "assistant", "content": response}]


def _strip_end_tokens(text: str) -> str:
    """Remove all trailing end tokens, each with an optional line break after it.

    A loop from the right is linear; a regular expression would be quadratic on long runs of end tokens.
    """
    end = len(text)
    while True:
        behind = end - text.endswith("\n", 0, end)
        token = next((each for each in _END_TOKENS if text.endswith(each, 0, behind)), None)
        if token is None:
            return text[:end]
        end = behind - len(token)


def _read_turns(text: str) -> list[ChatMessage] | None:
    """The turns, or None if the text does not start with one."""
    for pattern in (_CHATML, _LLAMA3, _PLAIN):
        if pattern.match(text):
            names, contents = pattern.split(text)[1::2], pattern.split(text)[2::2]
            return [
                {"role": _PLAIN_ROLES.get(name, name), "content": _TURN_END.sub("", content)}
                for name, content in zip(names, contents, strict=True)
            ]
    return None
