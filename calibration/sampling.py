"""Split rows into a calibration set and held-out parity pairs, stratified by category.

The split is by prompt, compared without case, spacing and punctuation, so that parity is measured on prompts that
calibration never saw. It depends only on the seed and the text of the rows, not on the order of the rows, the platform
or the Python version.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from calibration.prompt_order import SourceRow, group_by_prompt, round_robin, stratified_order
from calibration.sources import ConversationRow, LoadedRows
from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage, PreferencePair
from runtime.conversations.rendering import RenderedConversation


class ConversationRenderer(Protocol):
    """What `sample` needs of `runtime.conversations.rendering.Renderer`."""

    max_positions: int

    def render(self, messages: Sequence[ChatMessage], *, where: str = "") -> RenderedConversation:
        """Raise ConversationError if the rendering has more than `max_positions` tokens."""


class CalibrationRow(NamedTuple):
    """A conversation and its tokens."""

    conversation: ConversationRow
    rendered: RenderedConversation


class ParityPair(NamedTuple):
    """A pair and the tokens of its two conversations."""

    pair: PreferencePair
    chosen: RenderedConversation
    rejected: RenderedConversation


@dataclass(frozen=True)
class Sample:
    """A calibration set and held-out parity pairs, which share no prompt.

    Attributes:
        too_long: number of conversations that were skipped because they are too long.
        notes: remarks for the user.
    """

    calibration: list[CalibrationRow]
    parity: list[ParityPair]
    too_long: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def calibration_tokens(self) -> int:
        return sum(len(row.rendered.token_ids) for row in self.calibration)

    @property
    def parity_tokens(self) -> int:
        return sum(len(pair.chosen.token_ids) + len(pair.rejected.token_ids) for pair in self.parity)

    def category_counts(self) -> dict[str, tuple[int, int]]:
        """Number of calibration rows and of parity pairs per top category."""
        rows = Counter(row.conversation.top_category for row in self.calibration)
        pairs = Counter(pair.pair.top_category for pair in self.parity)
        return {top_category: (rows[top_category], pairs[top_category]) for top_category in sorted(rows | pairs)}

    def summary(self) -> str:
        """A few lines for the terminal."""
        category_counts = [
            f"{top_category} {rows}/{pairs}" for top_category, (rows, pairs) in self.category_counts().items()
        ]
        lines = [
            f"calibration: {len(self.calibration):,} conversations, {self.calibration_tokens:,} tokens",
            f"parity: {len(self.parity):,} pairs on other prompts, {self.parity_tokens:,} tokens",
            f"categories (conversations/pairs): {', '.join(category_counts)}",
        ]
        return "\n".join([*lines, *self.notes])

    def fingerprint(self) -> str:
        """sha256 over all token ids and scored indices in order; identifies the inputs of the model."""
        digest = hashlib.sha256(struct.pack("<2Q", len(self.calibration), len(self.parity)))
        parity = (rendered for _, chosen, rejected in self.parity for rendered in (chosen, rejected))
        for rendered in [*(row.rendered for row in self.calibration), *parity]:
            ids = rendered.token_ids
            digest.update(struct.pack(f"<2Q{len(ids)}I", len(ids), rendered.scored_index, *ids))
        return digest.hexdigest()


def sample(
    rows: LoadedRows,
    renderer: ConversationRenderer,
    *,
    rows_wanted: int | None = None,
    tokens_wanted: int | None = None,
    parity_pairs: int | None = None,
    exact_pairs: bool = True,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Sample:
    """Split `rows` into calibration conversations and parity pairs.

    Args:
        rows: from `calibration.sources.load_rows`.
        renderer: of the checkpoint. Conversations longer than its `max_positions` are skipped, never truncated.
        rows_wanted: number of calibration conversations. A pair gives two; the last one only its chosen one if needed.
        tokens_wanted: if `rows_wanted` is None, pairs are taken until they have this many tokens, a pair's prompt
            counted once. There are fewer tokens if the data has fewer, or if half of the prompts is needed for parity.
        parity_pairs: number of held-out pairs; None for all that remain.
        exact_pairs: whether fewer pairs than `parity_pairs` are an error; one is always needed.
        max_tokens: a lower limit on the length of a conversation, in tokens.
        seed: of the split.

    Raises:
        ConversationError: the data has too few rows for the calibration set, or too few other pairs for parity.
    """
    length_filter = _LengthFilter(renderer, min(max_tokens or renderer.max_positions, renderer.max_positions))
    prompts = stratified_order(group_by_prompt([*rows.pairs, *rows.conversations], seed), seed)
    reserved = 0
    if rows_wanted is None and rows.pairs:
        reserved = min(len(prompts) // 2, len(prompts) if parity_pairs is None else parity_pairs)
    calibration, unused_prompts = _select_calibration_rows(
        prompts[: len(prompts) - reserved], length_filter, rows_wanted, tokens_wanted
    )
    unused_prompts += prompts[len(prompts) - reserved :]
    if len(calibration) < (1 if rows_wanted is None else rows_wanted):
        raise ConversationError(
            f"{rows.source}: {len(calibration)} of the {rows_wanted or 1} requested calibration rows are available in "
            f"{_size(rows)}{length_filter.explanation()}; request fewer rows or give more data."
        )
    parity = _select_parity_pairs(unused_prompts, length_filter, parity_pairs)
    notes = [length_filter.note()] if length_filter.too_long else []
    if not rows.pairs and parity_pairs != 0:
        notes.append("no parity: the data has single conversations only, and parity needs pairs")
    elif len(parity) < (needed := 1 if parity_pairs is None else parity_pairs if exact_pairs else min(parity_pairs, 1)):
        raise ConversationError(
            f"{rows.source}: {len(calibration)} calibration rows leave {len(parity)} pairs on other prompts for "
            f"parity, of {_size(rows)}, but at least {needed} was requested{length_filter.explanation()}; request "
            "fewer rows or pairs, or give data with more different prompts."
        )
    return Sample(calibration, parity, length_filter.too_long, notes)


def _size(rows: LoadedRows) -> str:
    return f"{len(rows.pairs)} pairs and {len(rows.conversations)} single conversations"


class _LengthFilter:
    """Renders conversations, and counts those that are too long."""

    def __init__(self, renderer: ConversationRenderer, max_tokens: int):
        self.renderer, self.max_tokens = renderer, max_tokens
        self.too_long, self.first_error = 0, ""

    def render_if_fits(self, messages: list[ChatMessage], where: str) -> RenderedConversation | None:
        """The rendering, or None if it is too long or fails."""
        try:
            rendered = self.renderer.render(messages, where=where)
        except ConversationError as error:  # too many tokens; the messages were checked when the row was read
            self.first_error = self.first_error or str(error)
            self.too_long += 1
            return None
        if len(rendered.token_ids) > self.max_tokens:
            self.too_long += 1
            return None
        return rendered

    def note(self) -> str:
        first = f"; the first: {self.first_error}" if self.first_error else ""
        return f"skipped, longer than {self.max_tokens:,} tokens: {self.too_long:,} conversations{first}"

    def explanation(self) -> str:
        return f" ({self.note()})" if self.too_long else ""


def _select_calibration_rows(
    prompts: list[list[SourceRow]], length_filter: _LengthFilter, rows_wanted: int | None, tokens_wanted: int | None
) -> tuple[list[CalibrationRow], list[list[SourceRow]]]:
    """The calibration rows and the unused prompts.

    The second half of the prompts is used only after all rows of the first half, so that some prompts remain for parity
    even if there are few prompts with many pairs each.
    """
    half = (len(prompts) + 1) // 2
    queue = round_robin(prompts[:half]) + [
        (half + index, source_row) for index, source_row in round_robin(prompts[half:])
    ]
    selected: list[CalibrationRow] = []
    used_prompts: set[int] = set()
    tokens = 0
    for index, source_row in queue:
        if len(selected) >= rows_wanted if rows_wanted is not None else tokens >= (tokens_wanted or 0):
            break
        used_prompts.add(index)
        taken = [
            CalibrationRow(conversation, rendered)
            for conversation in _conversations(source_row)
            if (rendered := length_filter.render_if_fits(conversation.messages, conversation.where))
        ]
        selected += taken
        tokens += _distinct_tokens([row.rendered.token_ids for row in taken])
    unused_prompts = [source_rows for index, source_rows in enumerate(prompts) if index not in used_prompts]
    return selected[:rows_wanted], unused_prompts


def _distinct_tokens(sequences: Sequence[list[int]]) -> int:
    """Number of tokens of the conversations of one row, with their common prefix counted once."""
    common = len(os.path.commonprefix(sequences)) if len(sequences) > 1 else 0
    return sum(map(len, sequences)) - common * (len(sequences) - 1)


def _conversations(source_row: SourceRow) -> list[ConversationRow]:
    if isinstance(source_row, ConversationRow):
        return [source_row]
    both = (source_row.chosen_conversation, source_row.rejected_conversation)
    return [ConversationRow(messages, source_row.category, source_row.where) for messages in both]


def _select_parity_pairs(
    prompts: list[list[SourceRow]], length_filter: _LengthFilter, pairs_wanted: int | None
) -> list[ParityPair]:
    selected: list[ParityPair] = []
    for _, source_row in round_robin(prompts):
        if pairs_wanted is not None and len(selected) >= pairs_wanted:
            break
        if isinstance(source_row, PreferencePair):
            chosen = length_filter.render_if_fits(source_row.chosen_conversation, source_row.where)
            rejected = length_filter.render_if_fits(source_row.rejected_conversation, source_row.where)
            if chosen is not None and rejected is not None:
                selected.append(ParityPair(source_row, chosen, rejected))
    return selected
