"""Select the preference pairs to compare on, and look up their reference scores.

All models are compared on the same pairs: those that no model was calibrated on and that have reference scores.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.common.errors import ConversationError
from runtime.common.files import write_file_atomically
from runtime.conversations.conversation import EmptyConversationError, PreferencePair
from runtime.conversations.row_files import read_rows
from runtime.conversations.row_shapes import pair_to_row, read_category
from runtime.conversations.row_sources import list_row_files
from runtime.conversations.rows.context import RowOptions
from runtime.conversations.rows.recognise import read_row
from runtime.evaluation.reference_scores import describe_precision
from runtime.evaluation.scored_pair import Scores
from runtime.evaluation.variant import RenderedPair, Variant

PARITY_PAIRS_FILE = "parity_pairs.jsonl"
USED_FOR_CALIBRATION = "this model was calibrated on them"
NO_REFERENCE_SCORES = "no reference scores are stored for them"
CANNOT_RENDER = "this model cannot render them"


@dataclass(frozen=True)
class Selection:
    """Pairs that every model can be compared on.

    Attributes:
        pairs: in the order of the files.
        rendered: their renderings, by model label.
        notes: how many pairs were left out and why, by model label.
    """

    pairs: list[PreferencePair]
    rendered: dict[str, list[RenderedPair]]
    notes: dict[str, list[str]]


@dataclass(frozen=True)
class PairReferenceScores:
    """Reference scores of the selected pairs.

    Attributes:
        name: name of the reference model.
        dtype: dtypes of the reference run, such as `bfloat16 weights, float32 arithmetic`.
        fingerprint: fingerprint of the reference checkpoint.
        scores: in the order of the selected pairs.
        noise_floor: scores of the same model with all arithmetic in bf16; None unless stored for every pair.
    """

    name: str
    dtype: str
    fingerprint: str
    scores: list[Scores]
    noise_floor: list[Scores] | None = None

    @classmethod
    def from_run(cls, reference: Variant, scores: list[Scores], arithmetic: str) -> PairReferenceScores:
        """Scores that `reference` computed on this machine."""
        checkpoint = reference.checkpoint
        return cls(checkpoint.name, describe_precision(checkpoint, arithmetic), checkpoint.fingerprint(), scores)

    @classmethod
    def from_files(cls, model: Variant, selection: Selection) -> PairReferenceScores:
        """Scores stored beside a quantized model: its reference_scores.json, and the noise floor of its parity.json."""
        assert model.stored_reference is not None  # select_pairs selects no pair otherwise
        found = [model.stored_scores(rendered) for rendered in selection.rendered[model.label]]
        noise_floor_by_id = {each.id: each.noise_floor for each in model.report.scores} if model.report else {}
        noise_floor_scores = [noise_floor_by_id.get(pair.id) for pair in selection.pairs]
        return cls(
            model.stored_reference.model,
            model.stored_reference.dtype,
            model.stored_reference.fingerprint,
            [scores for scores in found if scores is not None],
            None if None in noise_floor_scores else [scores for scores in noise_floor_scores if scores is not None],
        )


def read_pairs(
    sources: Iterable[Path], options: RowOptions | None = None, note: Callable[[str], None] | None = None
) -> list[PreferencePair]:
    """Read preference pairs from files, directories of files, or patterns of their names.

    Duplicates, rows with a blank prompt or response, ties, and pairs of two equal responses are skipped.

    Args:
        options: how rows are read.
        note: called once for each file and each format in it.

    Raises:
        ConversationError: a file or row is malformed, a row is a single conversation, or no pair is left.
    """
    sources = list(sources)
    pairs: dict[str, PreferencePair] = {}
    told: set[tuple[Path, str]] = set()
    files = [file for source in sources for file in list_row_files(source)]
    for file, (where, row) in ((path, located) for path in files for located in read_rows(path)):
        try:
            reading = read_row(row, where, options)
        except EmptyConversationError:
            continue
        if note and (file, reading.format) not in told:
            told.add((file, reading.format))
            note(f"{where}: the format is {reading.format}")
        if not reading.preferences and not reading.tied:
            what = "is a single conversation" if reading.kind == "conversation" else "prefers none of its responses"
            raise ConversationError(f"{where}: the row {what}; parity needs a chosen and a rejected response.")
        for pair in reading.pairs(read_category(row), where):
            if pair.chosen != pair.rejected:
                pairs.setdefault(pair.id, pair)
    if not pairs:
        names = ", ".join(map(str, sources))
        raise ConversationError(f"{names}: no usable preference pair; add pairs of two different responses.")
    return list(pairs.values())


def write_pairs(pairs: Iterable[PreferencePair], directory: Path) -> Path:
    """Write parity_pairs.jsonl into a checkpoint directory and return its path."""
    path = directory / PARITY_PAIRS_FILE
    write_file_atomically(path, "".join(json.dumps(pair_to_row(pair), ensure_ascii=False) + "\n" for pair in pairs))
    return path


def stored_pair_files(models: Iterable[Variant]) -> list[Path]:
    """The parity_pairs.jsonl files that exist beside `models`."""
    paths = (model.checkpoint.directory / PARITY_PAIRS_FILE for model in models)
    return [path for path in paths if path.is_file()]


def select_pairs(pairs: Sequence[PreferencePair], models: Sequence[Variant], reference: Variant | None) -> Selection:
    """Select the pairs on which every model can be compared.

    Args:
        reference: the checkpoint that will score them first; None compares with the scores stored beside each model.

    Raises:
        ConversationError: no pair qualifies; the message gives the reasons.
    """
    filtered = {model.label: _filter_pairs(pairs, model, stored=reference is None) for model in models}
    if reference is not None:
        filtered[reference.label] = _filter_pairs(pairs, reference, stored=False)
    kept = [
        index for index in range(len(pairs)) if all(rendered[index] is not None for rendered, _ in filtered.values())
    ]
    notes = {label: _notes(rendered, reasons, len(kept)) for label, (rendered, reasons) in filtered.items()}
    if not kept:
        exclusion_notes = "; ".join(f"{label}: {note}" for label, each in notes.items() for note in each)
        raise ConversationError(
            f"none of the {len(pairs):,} pairs can be used ({exclusion_notes}); pass --pairs with held-out pairs that "
            "have stored reference scores, or --reference."
        )
    return Selection(
        [pairs[index] for index in kept],
        {label: [each for i in kept if (each := rendered[i])] for label, (rendered, _) in filtered.items()},
        notes,
    )


def _filter_pairs(
    pairs: Sequence[PreferencePair], variant: Variant, *, stored: bool
) -> tuple[list[RenderedPair | None], Counter[str]]:
    """The rendering of each pair, None if `variant` cannot be compared on it, and how often each reason occurred.

    With `stored`, pairs without stored reference scores are left out, too.
    """
    found: list[RenderedPair | None] = []
    reasons: Counter[str] = Counter()
    for pair in pairs:
        reason = ""
        try:
            rendered = variant.render(pair)
        except ConversationError:
            reason = CANNOT_RENDER
        else:
            if variant.was_calibrated_on(pair, rendered):
                reason = USED_FOR_CALIBRATION
            elif stored and variant.stored_scores(rendered) is None:
                reason = NO_REFERENCE_SCORES
        found.append(None if reason else rendered)
        reasons.update([reason] if reason else [])
    return found, reasons


def _notes(found: list[RenderedPair | None], reasons: Counter[str], kept: int) -> list[str]:
    notes = [f"{count:,} of {len(found):,} pairs are left out: {reason}" for reason, count in reasons.items()]
    excluded_by_other_models = sum(each is not None for each in found) - kept
    if excluded_by_other_models:
        notes.append(
            f"{excluded_by_other_models:,} of {len(found):,} pairs are left out: they are unusable for another model"
        )
    return notes
