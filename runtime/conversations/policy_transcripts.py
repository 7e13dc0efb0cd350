"""Parse a policy model's transcript, which contains the special tokens of its own chat template, into turns.

RL trainers send prompt and completion rendered with the policy's template; the reward model needs its own template.
If the prompt is given separately, only the prompt is parsed. Everything after it is the response, even if the policy
generated further turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage


@dataclass(frozen=True)
class _Template:
    """How a chat template marks turns.

    Attributes:
        opening: starts a turn; its group names the role.
        ending: what may follow a turn's text.
        roles: by the name in the template, if that is another.
        lead: the role of text before the first turn, if it may have any.
        padded: whether spaces around a turn's text belong to the template.
    """

    opening: re.Pattern[str]
    ending: re.Pattern[str]
    roles: Mapping[str, str] = field(default_factory=dict)
    lead: str = ""
    padded: bool = False


_PLAIN = _Template(
    re.compile(r"(?:\A|\n)(User|Human|Assistant): ?"),
    re.compile(r"\n\Z"),  # of a blank line between turns
    {"User": "user", "Human": "user", "Assistant": "assistant"},
)
_ANTHROPIC = _Template(
    re.compile(r"\n\n(Human|Assistant): ?"), re.compile(r"(?!)"), {"Human": "user", "Assistant": "assistant"}
)
_TEMPLATES = (
    _ANTHROPIC,
    _Template(re.compile(r"<\|im_start\|>([\w-]+)\n"), re.compile(r"<\|im_end\|>\n?\Z")),  # ChatML: Qwen and others
    _Template(re.compile(r"<\|start_header_id\|>([\w-]+)<\|end_header_id\|>\n\n"), re.compile(r"<\|eot_id\|>\n?\Z")),
    _Template(
        re.compile(r"<start_of_turn>([\w-]+)\n"), re.compile(r"<end_of_turn>\n?\Z"), {"model": "assistant"}
    ),  # Gemma
    _Template(re.compile(r"<\|(system|user|assistant)\|>\n"), re.compile(r"(?:</s>|<\|end\|>)\n?\Z")),  # Zephyr, Phi-3
    _Template(
        re.compile(r"(\[INST\]|\[/INST\])"),
        re.compile(r"</s>(?:<s>)?\Z"),
        {"[INST]": "user", "[/INST]": "assistant"},
        padded=True,
    ),  # Mistral, Llama 2
    _PLAIN,
    _Template(
        re.compile(r"<｜(User|Assistant)｜>"),
        re.compile(r"<｜end▁of▁sentence｜>\Z"),
        {"User": "user", "Assistant": "assistant"},
        lead="system",
    ),  # DeepSeek
    _Template(
        re.compile(r"(?:\A|\n)<extra_id_1>(User|Assistant)\n"),
        re.compile(r"\n\Z"),
        {"User": "user", "Assistant": "assistant"},
        lead="user",
    ),  # HelpSteer
)
_SYSTEM_IN_TURN = re.compile(r"\A\s*<<SYS>>\n(.*?)\n<</SYS>>\n\n", re.DOTALL)  # Llama 2
_SYSTEM_BEFORE_TURNS = re.compile(r"\A\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\]", re.DOTALL)  # Mistral
_LEADING_SPECIAL_TOKENS = re.compile(
    r"(?:<\|begin_of_text\|>|<\|endoftext\|>|<\|finetune_right_pad_id\|>|<｜begin▁of▁sentence｜>|<s>|<bos>|<pad>)*"
)
_END_TOKENS: tuple[str, ...] = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<pad>",
)
_TEMPLATE_TOKEN = re.compile(
    r"<\|[A-Za-z][\w.-]{0,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|\[/?SYSTEM_PROMPT\]"
)


def read_policy_text(text: str, prompt: str | None = None, where: str = "") -> list[ChatMessage]:
    """Parse a transcript in the template of a policy, or in plain text with `User:` and `Assistant:`.

    Known templates: ChatML (Qwen), Llama 2 and 3, Gemma, Mistral, DeepSeek, Zephyr, Phi-3 and HelpSteer.

    Args:
        text: prompt and response.
        prompt: the prompt alone, in the same template or as plain text. If `text` starts with it, the rest of `text` is
            the response.
        where: names the text in errors.

    Raises:
        ConversationError: `text` does not start with a turn in any of these formats, or a prompt has tokens of another
            template.
    """
    text = _strip_leading_tokens(text)
    if prompt is not None:
        prompt = _strip_leading_tokens(prompt)
        if prompt.strip() and text.startswith(prompt):
            turns, padded = _read_turns(prompt) or ([_plain_prompt(prompt, where)], False)
            padded = padded or (prompt.endswith("Assistant:") and not turns[-1]["content"])
            return _append_response(turns, text[len(prompt) :].removeprefix(" " if padded else ""))
    found = _read_turns(text)
    if found is None:
        raise ConversationError(
            f"{where or 'text'}: no turns were found; write them in ChatML, in the template of Llama, Gemma, Mistral, "
            "DeepSeek, Zephyr or Phi-3, or as 'User: ...' and 'Assistant: ...' on separate lines, or send messages."
        )
    turns = found[0]
    turns[-1]["content"] = strip_end_tokens(turns[-1]["content"])
    return turns


def read_transcript(text: str) -> list[ChatMessage] | None:
    """The turns of a text that starts with a turn in a known template; None if it does not.

    The last turn of a prompt may be an empty one of the assistant, which the response continues.
    """
    found = _read_turns(_strip_leading_tokens(text))
    return found[0] if found else None


def find_template_token(text: str) -> str | None:
    """The first token of a chat template in a text that is not a transcript."""
    token = _TEMPLATE_TOKEN.search(text)
    return token[0] if token else None


def _strip_leading_tokens(text: str) -> str:
    return text[_LEADING_SPECIAL_TOKENS.match(text).end() :]  # type: ignore[union-attr]  # it also matches nothing


def _plain_prompt(prompt: str, where: str) -> ChatMessage:
    """A prompt without turns as the user's message. A template that is not known would otherwise become text."""
    if token := _TEMPLATE_TOKEN.search(prompt):
        raise ConversationError(
            f"{where or 'text'}: the prompt has {token[0]!r}, a token of a chat template that is not known here; send "
            "messages."
        )
    return {"role": "user", "content": prompt}


def _append_response(turns: list[ChatMessage], response: str) -> list[ChatMessage]:
    """Append the response; it continues the last turn if that is the assistant's (a generation prompt)."""
    response = strip_end_tokens(response)
    if turns[-1]["role"] == "assistant":
        return [*turns[:-1], {"role": "assistant", "content": turns[-1]["content"] + response}]
    return [*turns, {"role": "assistant", "content": response}]


def strip_end_tokens(text: str) -> str:
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


def _read_turns(text: str) -> tuple[list[ChatMessage], bool] | None:
    """The turns and whether their template pads them; None if the text does not start with a turn."""
    before = ""
    if system := _SYSTEM_BEFORE_TURNS.match(text):
        before, text = system[1], text[system.end() :]
    for template in _TEMPLATES:
        own = text if template is _ANTHROPIC else text.lstrip("\n")
        first = template.opening.search(own) if template.lead else template.opening.match(own)
        if first:
            lead, *parts = template.opening.split(own)
            turns = _turns_of(template, parts)
            if before or lead:
                turns.insert(0, {"role": "system" if before else template.lead, "content": before or lead})
            return turns, template.padded
    return None


def _turns_of(template: _Template, parts: list[str]) -> list[ChatMessage]:
    """Turns from alternating names and texts."""
    turns: list[ChatMessage] = []
    for number, (name, content) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1):
        if template is not _PLAIN or 2 * number < len(parts):  # a line break at the end of a text is its own
            content = template.ending.sub("", content)
        if template.padded:
            if system := _SYSTEM_IN_TURN.match(content):
                turns.append({"role": "system", "content": system[1]})
                content = content[system.end() :]
            content = content.strip(" ")
        turns.append({"role": template.roles.get(name, name), "content": content})
    return turns
