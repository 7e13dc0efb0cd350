"""Render a conversation into token ids, and find the index of the token that is scored.

All entry points (commands, API, page, calibration, parity) use this module, so they score the same tokens. Rules:

* Which token is scored, and whether a missing system turn is an empty one, is a rule of the checkpoint
  (`scoring_rule.py`). The index of the scored token is stored and never derived from padding.
* Special-token text inside a message is encoded as plain text. It cannot close a turn or end the conversation.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from runtime.common.errors import CheckpointError, ConversationError
from runtime.conversations.chat_template import ChatTemplate
from runtime.conversations.conversation import ChatMessage, check_conversation
from runtime.conversations.scoring_rule import ScoringRule, probe
from runtime.conversations.tokenizer_file import read_tokenizer

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass(frozen=True)
class RenderedConversation:
    """The model's input for one conversation.

    Attributes:
        token_ids: including the special tokens.
        scored_index: index in `token_ids` of the token whose hidden state is scored.
        warnings: for the user, such as dropped turns.
    """

    token_ids: list[int]
    scored_index: int
    warnings: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """sha256 of the token ids; the key of stored reference scores."""
        return hashlib.sha256(np.asarray(self.token_ids, dtype="<i8").tobytes()).hexdigest()


class Renderer:
    """Renders conversations with a checkpoint's tokenizer and chat template.

    Attributes:
        max_positions: the longest rendering in tokens.
        rule: which token is scored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_positions: int,
        where: str = "chat template",
        vocab_size: int | None = None,
    ):
        """
        Args:
            max_positions: the longest rendering in tokens.
            where: names the checkpoint in errors.
            vocab_size: rows of the embedding; None does not check the tokenizer's ids.

        Raises:
            CheckpointError: the template does not end a conversation, or the tokenizer does not fit the model.
        """
        self.max_positions = max_positions
        self._tokenizer = tokenizer
        # A tokenizer that was saved after a call with truncation or padding would cut or pad every text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if vocab_size is not None:
            _check_ids(tokenizer, vocab_size, where)
        # `_encode` handles the special tokens itself; special-token text inside the remaining pieces is user text.
        self._tokenizer.encode_special_tokens = True
        specials = {
            token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._special_ids = specials
        by_length = sorted(specials, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, by_length)) + ")")
        self._template = template
        self.rule = self._scoring_rule(where)

    @classmethod
    def from_directory(cls, directory: Path, max_positions: int, vocab_size: int | None = None) -> Renderer:
        """Read the tokenizer and the chat template of a checkpoint directory; see `Renderer` for the arguments.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        tokenizer = read_tokenizer(Path(directory))
        return cls(tokenizer, ChatTemplate.from_directory(Path(directory)), max_positions, str(directory), vocab_size)

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        truncate: bool = False,
        where: str = "",
        allow_blank: bool = False,
    ) -> RenderedConversation:
        """Render a conversation that ends in the assistant's response.

        Args:
            messages: the turns; a missing system turn is added as `rule` says.
            truncate: drop whole turns, oldest first, until the rendering has at most `max_positions` tokens.
            where: names the conversation in errors, such as `pairs.jsonl:12`.
            allow_blank: render a blank response instead of refusing it.

        Raises:
            ConversationError: a turn is malformed, or the rendering is too long.
        """
        check_conversation(messages, where, allow_blank=allow_blank)
        system, turns = _split_system(self.rule.with_system(messages))
        warnings = []
        if self.rule.empty_system and system[0]["content"]:
            warnings.append("non-empty system prompt: the model was trained with an empty one")
        token_ids = self._encode([*system, *turns])
        dropped = 0
        if truncate and len(token_ids) > self.max_positions:
            dropped = self._first_that_fits(system, turns)
            token_ids = self._encode([*system, *turns[dropped:]])
        if len(token_ids) > self.max_positions:
            remedy = "shorten it, or allow truncation (--truncate)" if len(turns) > 2 else "shorten it"
            if truncate:
                remedy = "the last exchange alone does not fit; shorten it"
            raise ConversationError(
                f"{where or 'conversation'}: {len(token_ids)} tokens, but the model has {self.max_positions} "
                f"positions; {remedy}."
            )
        if dropped:
            warnings.append(f"truncated: the oldest {dropped} turns were dropped")
        return RenderedConversation(token_ids, self._scored_index(token_ids), warnings)

    @cached_property
    def ending(self) -> list[int]:
        """The token ids of every rendering from the scored token on."""
        rendered = self.render(probe("b"))
        return rendered.token_ids[rendered.scored_index :]

    def _scored_index(self, token_ids: list[int]) -> int:
        if self.rule.end_token is None:
            return len(token_ids) - 1
        return len(token_ids) - 1 - token_ids[::-1].index(self._special_ids[self.rule.end_token])

    def _first_that_fits(self, system: list[ChatMessage], turns: list[ChatMessage]) -> int:
        """Index of the oldest user turn from which the conversation fits, else of the last user turn.

        Bisection needs few encodings; encoding the rest for every start would be quadratic.
        """
        starts = [0, *(i for i in range(1, len(turns)) if turns[i]["role"] == "user")]

        def fits(start: int) -> bool:
            return len(self._encode([*system, *turns[start:]])) <= self.max_positions

        return starts[bisect_left(starts, True, hi=len(starts) - 1, key=fits)]

    def _encode(self, messages: list[ChatMessage]) -> list[int]:
        """Render the template, split at its special tokens, and encode the text between them.

        Special-token text in messages is broken by a private-use character before the split, which is removed after it.
        """
        escape_character = _unused_character(messages)
        escaped = [
            {
                **m,
                "content": self._special_pattern.sub(
                    lambda s: _escape_special_token(s[0], escape_character), m["content"]
                ),
            }
            for m in messages
        ]
        token_ids: list[int] = []
        for piece in self._special_pattern.split(self._template.render(escaped)):
            if piece in self._special_ids:
                token_ids.append(self._special_ids[piece])
            elif piece:
                token_ids.extend(self._encode_text(piece.replace(escape_character, "")))
        return token_ids

    def _encode_text(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and panics are no Exceptions
            raise ConversationError(f"the tokenizer fails on this conversation: {error!s:.300}") from error

    def _scoring_rule(self, where: str) -> ScoringRule:
        """Render two probes: one shows what the template appends to the response, the other the last token."""
        marker = chr(_PRIVATE_USE[0][0])
        try:
            end = self._template.render(probe(marker)).rpartition(marker)
            token_ids = self._encode(probe("b"))  # a tokenizer that cannot encode plain text has no use
        except ConversationError as error:
            raise CheckpointError(f"{where}: {error}") from error
        last_token = self._tokenizer.decode(token_ids[-1:], skip_special_tokens=False)
        rule = ScoringRule.of_template(end[2] if end[1] else "", list(self._special_ids), last_token)
        if rule is None:
            raise CheckpointError(
                f"{where}: the chat template does not end a conversation with a special token of the tokenizer, such "
                "as <|endoftext|> or <|im_end|>; restore the published template and tokenizer of the reward model."
            )
        if rule.end_token and rule.end_token not in self._special_ids:
            raise CheckpointError(
                f"{where}: the tokenizer has no special token {rule.end_token}, the token that is scored."
            )
        return rule


def _check_ids(tokenizer: Tokenizer, vocab_size: int, where: str) -> None:
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has the id {largest}, but vocab_size is {vocab_size}; tokenizer and model "
            "belong to different checkpoints."
        )


def _split_system(messages: list[ChatMessage]) -> tuple[list[ChatMessage], list[ChatMessage]]:
    """Split off the system turn, which truncation keeps; the first part is empty if there is none."""
    count = int(messages[0]["role"] == "system")
    return messages[:count], messages[count:]


def _unused_character(messages: list[ChatMessage]) -> str:
    """A private-use character that occurs in no message."""
    used = set().union(*(message["content"] for message in messages))
    unused = (chr(code) for code in chain(*_PRIVATE_USE) if chr(code) not in used)
    if (character := next(unused, None)) is None:
        raise ConversationError("the messages hold all 137,468 private-use characters of Unicode; remove one.")
    return character


def _escape_special_token(special: str, escape_character: str) -> str:
    return special[0] + escape_character + special[1:]
