"""Parse a policy model's transcript, which contains the special tokens of its own chat template, into turns.

RL trainers send prompt and completion rendered with the policy's template; the reward model needs its own template.
Columns of data sets hold such texts, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Transcript:
    """The turns of a text in a known template.

    Attributes:
        text: without the special tokens before the first turn.
        turns: the last one may be an empty one of the assistant, which a response continues.
        padded: whether spaces around a turn's text belong to the template.
        closed: whether an end token ends the last turn.
    """

    text: str
    turns: list[ChatMessage]
    padded: bool
    closed: bool

    @property
    def is_open(self) -> bool:
        """Whether the assistant's turn has begun and not ended, such as in a generation prompt."""
        return self.turns[-1]["role"] == "assistant" and not self.closed

    @property
    def start(self) -> str:
        """What the text already has of the response."""
        return self.turns[-1]["content"] if self.is_open else ""

    def response(self, text: str) -> str:
        """The response that continues the transcript with `text`, without end tokens."""
        if self.padded and not self.start:
            text = text.lstrip(" ")
        elif self.text.endswith("Assistant:") and not self.start:
            text = text.removeprefix(" ")
        return self._ended(self.start + text)

    def whole(self) -> list[ChatMessage]:
        """The turns of a text that has its response, without end tokens."""
        last = self.turns[-1]
        return [*self.turns[:-1], {"role": last["role"], "content": self._ended(last["content"])}]

    def _ended(self, content: str) -> str:
        content = strip_end_tokens(content)
        return content.rstrip(" ") if self.padded else content


def read_transcript(text: str) -> Transcript | None:
    """The turns of a text that starts with a turn in a known template; None if it does not.

    Known templates: ChatML (Qwen), Llama 2 and 3, Gemma, Mistral, DeepSeek, Zephyr, Phi-3, HelpSteer, and plain text
    with `User:` or `Human:` and `Assistant:`.
    """
    text = strip_leading_tokens(text)
    found = _read_turns(text)
    return Transcript(text, *found) if found else None


def find_template_token(text: str) -> str | None:
    """The first token of a chat template in a text that is not a transcript."""
    token = _TEMPLATE_TOKEN.search(text)
    return token[0] if token else None


def strip_leading_tokens(text: str) -> str:
    """Remove the tokens that a tokenizer puts before a text."""
    return text[_LEADING_SPECIAL_TOKENS.match(text).end() :]  # type: ignore[union-attr]  # it also matches nothing


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


def _read_turns(text: str) -> tuple[list[ChatMessage], bool, bool] | None:
    """The turns, whether their template pads them, and whether the last one is closed; None without a first turn."""
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
            ending = template.ending.search(parts[-1])
            return turns, template.padded, ending is not None and bool(ending[0].strip())
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
            content = content.lstrip(" ") if 2 * number == len(parts) else content.strip(" ")  # a response may follow
        turns.append({"role": template.roles.get(name, name), "content": content})
    return turns
