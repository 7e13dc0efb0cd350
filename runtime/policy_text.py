"""The text of a policy, its own template's tokens and all, back into turns.

Trainers send what their policy read and wrote, in the policy's template. A reward model wants its own. Where the prompt
is known apart, only it is parsed: whatever else the policy wrote, turns of its own invention included, is its response.
"""

from __future__ import annotations

import re

from runtime.conversation import Message
from runtime.errors import ConversationError

_CHATML = re.compile(r"<\|im_start\|>([\w-]+)\n")
_LLAMA3 = re.compile(r"<\|start_header_id\|>([\w-]+)<\|end_header_id\|>\n\n")
_PLAIN = re.compile(r"(?:\A|\n)(User|Human|Assistant): ?")
_PLAIN_ROLES = {"User": "user", "Human": "user", "Assistant": "assistant"}
_BEGINNING = re.compile(r"(?:<\|begin_of_text\|>|<\|endoftext\|>|<\|finetune_right_pad_id\|>|<s>|<bos>|<pad>)*")
_TURN_END = re.compile(r"(?:<\|im_end\|>|<\|eot_id\|>)\n?\Z")
_ENDS: tuple[str, ...] = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
)
_ENDS += ("</s>", "<eos>", "<pad>")


def read_policy_text(text: str, prompt: str | None = None, where: str = "") -> list[Message]:
    """Turns of a text in ChatML, in Llama-3's template, or plain with `User:` and `Assistant:`.

    Args:
        text: prompt and response as one.
        prompt: what of it the policy was given, in the same template or as a bare question. If `text` begins with it,
            all that follows is the response.
        where: names the text in errors.

    Raises:
        ConversationError: no turns can be told apart.
    """
    text = text[_BEGINNING.match(text).end() :]  # type: ignore[union-attr]  # it matches nothing at least
    if prompt is not None:
        prompt = prompt[_BEGINNING.match(prompt).end() :]  # type: ignore[union-attr]
        if prompt.strip() and text.startswith(prompt):
            return _continue(_read_turns(prompt) or [{"role": "user", "content": prompt}], text[len(prompt) :])
    turns = _read_turns(text)
    if turns is None:
        raise ConversationError(
            f"{where or 'text'}: it has no turns to tell apart; write them in ChatML, in Llama-3's template, or as "
            "'User: ...' and 'Assistant: ...' on lines of their own, or send messages."
        )
    turns[-1]["content"] = _without_ends(turns[-1]["content"])
    return turns


def _continue(turns: list[Message], response: str) -> list[Message]:
    """`turns` with the response, which goes on with an assistant's turn that was opened for it."""
    response = _without_ends(response)
    if turns[-1]["role"] == "assistant":
        return [*turns[:-1], {"role": "assistant", "content": turns[-1]["content"] + response}]
    return [*turns, {"role": "assistant", "content": response}]


def _without_ends(text: str) -> str:
    """Without the end tokens that it ends with, each of which may have a line break behind it.

    Token by token from the right: a regular expression would try every place where a run of them begins.
    """
    end = len(text)
    while True:
        behind = end - text.endswith("\n", 0, end)
        token = next((each for each in _ENDS if text.endswith(each, 0, behind)), None)
        if token is None:
            return text[:end]
        end = behind - len(token)


def _read_turns(text: str) -> list[Message] | None:
    """None where the text does not begin with a turn."""
    for pattern in (_CHATML, _LLAMA3, _PLAIN):
        if pattern.match(text):
            names, contents = pattern.split(text)[1::2], pattern.split(text)[2::2]
            return [
                {"role": _PLAIN_ROLES.get(name, name), "content": _TURN_END.sub("", content)}
                for name, content in zip(names, contents, strict=True)
            ]
    return None
