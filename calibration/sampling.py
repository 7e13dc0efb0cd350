"""Which rows calibrate and which measure: a seeded split by prompt in which every area has its share.

A parity figure is worth something only on prompts that calibration never saw, so prompts (case, spacing and
punctuation aside) are the unit of the split. Every choice follows from the seed and the rows' own text: the
order of the lines in a file, the platform and the Python version change nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from calibration.conversations import Conversation, Rows
from runtime.chat import Rendered, Renderer
from runtime.conversation import Message, PreferencePair
from runtime.errors import ConversationError


class CalibrationRow(NamedTuple):
    """A conversation and its tokens."""

    conversation: Conversation
    rendered: Rendered


class ParityPair(NamedTuple):
    """A pair and the tokens of its two conversations."""

    pair: PreferencePair
    chosen: Rendered
    rejected: Rendered


@dataclass(frozen=True)
class Sample:
    """Rows to calibrate on and pairs to compare on, which share no prompt.

    `too_long` counts the rows that were met and did not fit; `notes` are sentences for the user.
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

    def areas(self) -> dict[str, tuple[int, int]]:
        """Calibration rows and parity pairs of every area, by name."""
        rows = Counter(row.conversation.area for row in self.calibration)
        pairs = Counter(pair.pair.area for pair in self.parity)
        return {area: (rows[area], pairs[area]) for area in sorted(rows | pairs)}

    def summary(self) -> str:
        """A few lines for people."""
        areas = [f"{area} {rows}/{pairs}" for area, (rows, pairs) in self.areas().items()]
        lines = [
            f"calibration: {len(self.calibration):,} conversations, {self.calibration_tokens:,} tokens",
            f"parity: {len(self.parity):,} pairs on other prompts, {self.parity_tokens:,} tokens",
            f"areas (conversations/pairs): {', '.join(areas)}",
        ]
        return "\n".join([*lines, *self.notes])

    def fingerprint(self) -> str:
        """sha256 over every token id and scored index in order: equal where the model's inputs are."""
        digest = hashlib.sha256(struct.pack("<2Q", len(self.calibration), len(self.parity)))
        parity = (rendered for _, chosen, rejected in self.parity for rendered in (chosen, rejected))
        for rendered in [*(row.rendered for row in self.calibration), *parity]:
            ids = rendered.token_ids
            digest.update(struct.pack(f"<2Q{len(ids)}I", len(ids), rendered.scored_index, *ids))
        return digest.hexdigest()


def sample(
    rows: Rows,
    renderer: Renderer,
    *,
    rows_wanted: int = 128,
    parity_pairs: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Sample:
    """Split `rows` into calibration conversations and parity pairs.

    Args:
        rows: what `calibration.conversations.load_rows` read.
        renderer: the checkpoint's; conversations longer than its positions are left out, never cut.
        rows_wanted: calibration conversations; a pair gives two, its chosen and its rejected one (the last
            pair only its chosen one if a single row is missing).
        parity_pairs: pairs to compare on; None for all that remain, 0 for none.
        max_tokens: a stricter limit on the length of a conversation, in tokens.
        seed: another seed, another split.

    Raises:
        ConversationError: the data cannot give that many rows, or leaves too few pairs to compare on.
    """
    shelf = _Shelf(renderer, min(max_tokens or renderer.max_positions, renderer.max_positions))
    prompts = _in_stratified_order(_by_prompt([*rows.pairs, *rows.conversations], seed), seed)
    calibration, untouched = _take_calibration(prompts, shelf, rows_wanted)
    if len(calibration) < rows_wanted:
        raise ConversationError(
            f"{rows.source}: {len(calibration)} of the {rows_wanted} calibration rows asked for can be had "
            f"from {_size(rows)}{shelf.explanation()}; ask for fewer rows or give more data."
        )
    parity = _take_parity(untouched, shelf, parity_pairs)
    notes = [shelf.note()] if shelf.too_long else []
    if not rows.pairs and parity_pairs != 0:
        notes.append("no parity: the data has single conversations only, and comparing needs pairs")
    elif len(parity) < (1 if parity_pairs is None else parity_pairs):
        raise ConversationError(
            f"{rows.source}: {rows_wanted} calibration rows leave {len(parity)} pairs on other prompts to "
            f"compare on, of {_size(rows)}, where {parity_pairs or 'at least 1'} was asked for"
            f"{shelf.explanation()}; ask for fewer rows or pairs, or give data with more different prompts."
        )
    return Sample(calibration, parity, shelf.too_long, notes)


def _size(rows: Rows) -> str:
    return f"{len(rows.pairs)} pairs and {len(rows.conversations)} single conversations"


Unit = PreferencePair | Conversation


class _Shelf:
    """Renders conversations and counts those that do not fit."""

    def __init__(self, renderer: Renderer, max_tokens: int):
        self.renderer, self.max_tokens = renderer, max_tokens
        self.too_long, self.first_refusal = 0, ""

    def fit(self, messages: list[Message], where: str) -> Rendered | None:
        """The rendering, or None if it is too long."""
        try:
            rendered = self.renderer.render(messages, where=where)
        except ConversationError as error:  # the row itself was checked when it was read
            self.first_refusal = self.first_refusal or str(error)
            self.too_long += 1
            return None
        if len(rendered.token_ids) > self.max_tokens:
            self.too_long += 1
            return None
        return rendered

    def note(self) -> str:
        first = f"; the first: {self.first_refusal}" if self.first_refusal else ""
        return f"left out, as longer than {self.max_tokens:,} tokens: {self.too_long:,} conversations{first}"

    def explanation(self) -> str:
        return f" ({self.note()})" if self.too_long else ""


def _by_prompt(units: Iterable[Unit], seed: int) -> list[list[Unit]]:
    """Units that share a prompt, together; within a prompt in seeded order."""
    prompts: defaultdict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        prompts[_prompt_key(unit)].append(unit)
    return [sorted(units, key=lambda unit: _lot(unit.id, seed)) for units in prompts.values()]


def _prompt_key(unit: Unit) -> str:
    """The turns before the response, without the system turn, as bare words."""
    turns = unit.prompt if isinstance(unit, PreferencePair) else unit.messages[:-1]
    words = [
        (turn["role"], "".join(filter(str.isalnum, turn["content"].casefold())))
        for turn in turns
        if turn["role"] != "system"
    ]
    return hashlib.sha256(repr(words).encode()).hexdigest()


def _lot(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2**48


def _in_stratified_order(prompts: list[list[Unit]], seed: int) -> list[list[Unit]]:
    """Prompts in an order of which every beginning has each area in proportion.

    Systematic sampling: the i-th of an area's n prompts stands at (i + u) / n, with u in [0, 1) drawn by
    lot for the area, so that areas of a single prompt spread out too.
    """
    strata: defaultdict[str, list[list[Unit]]] = defaultdict(list)
    for units in sorted(prompts, key=lambda units: _lot(units[0].id, seed)):
        strata[units[0].area].append(units)
    placed = [
        ((index + _lot(area, seed)) / len(stratum), area, units)
        for area, stratum in strata.items()
        for index, units in enumerate(stratum)
    ]
    return [units for _, _, units in sorted(placed, key=lambda entry: entry[:2])]


def _in_turn(prompts: list[list[Unit]]) -> list[tuple[int, Unit]]:
    """(prompt, unit): one unit of each prompt, then a second one of each, and so on."""
    placed = [(depth, index) for index, units in enumerate(prompts) for depth in range(len(units))]
    return [(index, prompts[index][depth]) for depth, index in sorted(placed)]


def _take_calibration(
    prompts: list[list[Unit]], shelf: _Shelf, rows_wanted: int
) -> tuple[list[CalibrationRow], list[list[Unit]]]:
    """Calibration rows, and the prompts left untouched.

    The first half of the prompts is used up before the second is begun, so that few prompts with many
    pairs each still leave some to compare on.
    """
    half = (len(prompts) + 1) // 2
    queue = _in_turn(prompts[:half]) + [(half + index, unit) for index, unit in _in_turn(prompts[half:])]
    taken: list[CalibrationRow] = []
    touched: set[int] = set()
    for index, unit in queue:
        if len(taken) >= rows_wanted:
            break
        touched.add(index)
        for conversation in _conversations(unit):
            rendered = shelf.fit(conversation.messages, conversation.where)
            if rendered is not None:
                taken.append(CalibrationRow(conversation, rendered))
    untouched = [units for index, units in enumerate(prompts) if index not in touched]
    return taken[:rows_wanted], untouched


def _conversations(unit: Unit) -> list[Conversation]:
    if isinstance(unit, Conversation):
        return [unit]
    both = (unit.chosen_conversation, unit.rejected_conversation)
    return [Conversation(messages, unit.category, unit.where) for messages in both]


def _take_parity(prompts: list[list[Unit]], shelf: _Shelf, pairs_wanted: int | None) -> list[ParityPair]:
    taken: list[ParityPair] = []
    for _, unit in _in_turn(prompts):
        if pairs_wanted is not None and len(taken) >= pairs_wanted:
            break
        if isinstance(unit, PreferencePair):
            chosen = shelf.fit(unit.chosen_conversation, unit.where)
            rejected = shelf.fit(unit.rejected_conversation, unit.where)
            if chosen is not None and rejected is not None:
                taken.append(ParityPair(unit, chosen, rejected))
    return taken
