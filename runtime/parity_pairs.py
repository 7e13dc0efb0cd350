"""Which pairs are compared: those that were not calibrated on, with reference scores, for every model alike."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.conversation import EmptyConversationError, PreferencePair, parse_row
from runtime.errors import ConversationError
from runtime.files import write_whole
from runtime.rows import read_rows
from runtime.variant import RenderedPair, Variant

FILE_NAME = "parity_pairs.jsonl"
CALIBRATED_ON = "it was calibrated on them, which flatters"
NO_REFERENCE = "no reference scores are stored for them"
UNFIT = "they cannot be rendered for it"


@dataclass(frozen=True)
class Selection:
    """Pairs that every model can be compared on.

    Attributes:
        pairs: in the order they were read.
        rendered: the same as tokens, by the model's label.
        notes: how many were left out and why, by the model's label.
    """

    pairs: list[PreferencePair]
    rendered: dict[str, list[RenderedPair]]
    notes: dict[str, list[str]]


def read_pairs(paths: Iterable[Path]) -> list[PreferencePair]:
    """Every preference pair of some files once; blank ones, and those of two equal responses, are passed over.

    Raises:
        ConversationError: a file or a row is broken, a row is no pair, or there is no pair at all.
    """
    paths = list(paths)
    pairs: dict[str, PreferencePair] = {}
    for where, row in (placed for path in paths for placed in read_rows(path)):
        try:
            pair = parse_row(row, where)
        except EmptyConversationError:
            continue
        if not isinstance(pair, PreferencePair):
            raise ConversationError(f"{where}: the row is a single conversation; parity needs a chosen and a rejected.")
        if pair.chosen != pair.rejected:
            pairs.setdefault(pair.id, pair)
    if not pairs:
        raise ConversationError(f"{', '.join(map(str, paths))}: no usable preference pair; parity needs some.")
    return list(pairs.values())


def write_pairs(pairs: Iterable[PreferencePair], directory: Path) -> Path:
    """Keep pairs beside a checkpoint, for `read_pairs` to read."""
    path = directory / FILE_NAME
    write_whole(path, "".join(json.dumps(pair.to_row(), ensure_ascii=False) + "\n" for pair in pairs))
    return path


def stored_pairs(models: Iterable[Variant]) -> list[Path]:
    """The files that `write_pairs` has left beside some models."""
    paths = (model.checkpoint.directory / FILE_NAME for model in models)
    return [path for path in paths if path.is_file()]


def select_pairs(pairs: Sequence[PreferencePair], models: Sequence[Variant], reference: Variant | None) -> Selection:
    """The pairs that all of `models` can be compared on: with `reference`, or with what is stored beside each.

    Raises:
        ConversationError: there are none; the message says why.
    """
    sorted_out = {model.label: _sort_out(pairs, model, stored=reference is None) for model in models}
    if reference is not None:
        sorted_out[reference.label] = _sort_out(pairs, reference, stored=False)
    kept = [
        index for index in range(len(pairs)) if all(rendered[index] is not None for rendered, _ in sorted_out.values())
    ]
    notes = {label: _notes(rendered, reasons, len(kept)) for label, (rendered, reasons) in sorted_out.items()}
    if not kept:
        faults = "; ".join(f"{label}: {note}" for label, each in notes.items() for note in each)
        raise ConversationError(
            f"none of the {len(pairs):,} pairs can be compared on ({faults}); give --pairs that the models were "
            "compared on when they were quantized, or a --reference to score with here."
        )
    return Selection(
        [pairs[index] for index in kept],
        {label: [each for i in kept if (each := rendered[i])] for label, (rendered, _) in sorted_out.items()},
        notes,
    )


def _sort_out(
    pairs: Sequence[PreferencePair], variant: Variant, *, stored: bool
) -> tuple[list[RenderedPair | None], Counter[str]]:
    """The renderings of those that `variant` can be compared on, and why how many others cannot."""
    found: list[RenderedPair | None] = []
    reasons: Counter[str] = Counter()
    for pair in pairs:
        reason = ""
        try:
            rendered = variant.render(pair)
        except ConversationError:
            reason = UNFIT
        else:
            if variant.was_calibrated_on(pair, rendered):
                reason = CALIBRATED_ON
            elif stored and variant.stored_scores(rendered) is None:
                reason = NO_REFERENCE
        found.append(None if reason else rendered)
        reasons.update([reason] if reason else [])
    return found, reasons


def _notes(found: list[RenderedPair | None], reasons: Counter[str], kept: int) -> list[str]:
    notes = [f"{count:,} of {len(found):,} pairs are left out: {reason}" for reason, count in reasons.items()]
    elsewhere = sum(each is not None for each in found) - kept
    if elsewhere:
        notes.append(f"{elsewhere:,} of {len(found):,} pairs are left out: another model cannot be compared on them")
    return notes
