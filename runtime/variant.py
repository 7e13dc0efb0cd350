"""A checkpoint whose scores are to be compared, and what is stored beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from runtime.architecture import DTYPES
from runtime.chat import Rendered, Renderer
from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.conversation import PreferencePair
from runtime.golden import find_golden
from runtime.parity_report import ParityReport, Subject, read_report
from runtime.reference import FILE_NAME, ReferenceScores
from runtime.report import JSON_FILE
from runtime.scored_pair import Scores
from runtime.version import kit_version

RenderedPair = tuple[Rendered, Rendered]
"""Renderings of (chosen, rejected)."""


@dataclass(frozen=True)
class Variant:
    """A checkpoint, opened but not loaded.

    Attributes:
        source: what the user calls it.
        label: what reports call it, unlike any other's.
        stored: the reference scores beside it, if there are any.
        report: the parity report beside it, from when it was quantized, if there is one.
    """

    source: str
    label: str
    checkpoint: Checkpoint
    renderer: Renderer
    stored: ReferenceScores | None
    report: ParityReport | None

    @classmethod
    def open(cls, source: str) -> Variant:
        """Read headers, tokenizer, and the files beside them.

        Raises:
            CheckpointError: the checkpoint or its reference scores are damaged.
            KitError: its parity report is.
        """
        checkpoint = open_checkpoint(source)
        directory = checkpoint.directory
        renderer = Renderer.from_directory(directory, checkpoint.architecture.max_position_embeddings)
        stored = ReferenceScores.load(directory) if (directory / FILE_NAME).is_file() else None
        report = read_report(directory / JSON_FILE) if stored and (directory / JSON_FILE).is_file() else None
        return cls(source, Path(checkpoint.name).name, checkpoint, renderer, stored, report)

    @property
    def golden(self) -> str | None:
        """The published name under which golden scores are to be had for it."""
        if self.stored is not None:
            return find_golden(self.stored.model)
        return find_golden(self.checkpoint.name, renamed=self.checkpoint.quantization is not None)

    @property
    def weights(self) -> str:
        """`bfloat16 weights`, `gptq weights of 4 bits`."""
        quantization = self.checkpoint.quantization
        if quantization is not None:
            return f"{quantization.method} weights of {quantization.bits} bits"
        names = {dtype: name for name, dtype in DTYPES.items()}
        return f"{names[self.checkpoint.architecture.dtype]} weights"

    def subject(self, reference: str, reference_dtype: str, settings: Mapping[str, JsonValue]) -> Subject:
        """What a report says was compared: this, with `reference`; `settings` are those of today's run."""
        quantization, made = self.checkpoint.quantization, self.report.subject if self.report else None
        size = 8 * self.checkpoint.architecture.dtype.itemsize
        return Subject(
            model=self.label,
            method=made.method if made else quantization.method if quantization else "unquantized",
            bits=quantization.bits if quantization else size,
            bits_per_weight=quantization.bits_per_weight(self.checkpoint.architecture) if quantization else size,
            group_size=quantization.group_size if quantization else -1,
            reference=reference,
            reference_dtype=reference_dtype,
            kit_version=kit_version(),
            settings={**(made.settings if made else {}), **settings},
        )

    def render(self, pair: PreferencePair) -> RenderedPair:
        """Both conversations as tokens.

        Raises:
            ConversationError: one is too long, or its chat template refuses it.
        """
        return (
            self.renderer.render(pair.chosen_conversation, where=pair.where),
            self.renderer.render(pair.rejected_conversation, where=pair.where),
        )

    def stored_scores(self, rendered: RenderedPair) -> Scores | None:
        """The reference's scores of a pair, if both are stored."""
        scores = self.stored.scores if self.stored else {}
        chosen, rejected = (scores.get(each.key) for each in rendered)
        return None if chosen is None or rejected is None else (chosen, rejected)

    def was_calibrated_on(self, pair: PreferencePair, rendered: RenderedPair) -> bool:
        """Whether one of a pair's conversations went through the quantization, other than to be compared."""
        if self.stored is None or self.report is None:
            return False
        held_out = pair.id in {each.id for each in self.report.scores}
        return not held_out and any(each.key in self.stored.scores for each in rendered)


def open_variants(sources: Sequence[str]) -> list[Variant]:
    """Open each; of those with one name the later ones are numbered.

    Raises:
        KitError: as `Variant.open`.
    """
    variants: list[Variant] = []
    for source in sources:
        variant = Variant.open(source)
        taken = {each.label for each in variants}
        labels = [variant.label, *(f"{variant.label}-{number}" for number in range(2, len(sources) + 1))]
        free = next(label for label in labels if label not in taken)
        variants.append(replace(variant, label=free))
    return variants
