"""A checkpoint to be compared, and the reference scores and parity report stored beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue

from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.common.hub import short_name
from runtime.conversations.conversation import PreferencePair
from runtime.conversations.rendering import RenderedConversation, Renderer
from runtime.evaluation.golden import PUBLISHED_SCORES, match_name
from runtime.evaluation.reference_scores import REFERENCE_SCORES_FILE, ReferenceScores, describe_weights
from runtime.evaluation.report import JSON_FILE, ParityReport, Subject, read_report
from runtime.evaluation.scored_pair import Scores

RenderedPair = tuple[RenderedConversation, RenderedConversation]
"""Renderings of (chosen, rejected)."""


@dataclass(frozen=True)
class Variant:
    """A checkpoint that is opened but not loaded.

    Attributes:
        source: the path or hub id that the user gave.
        label: its name in reports, unique among the compared models.
        stored_reference: its reference_scores.json, if present.
        report: its parity.json, written when it was quantized, if present.
    """

    source: str
    label: str
    checkpoint: Checkpoint
    renderer: Renderer
    stored_reference: ReferenceScores | None
    report: ParityReport | None

    @classmethod
    def open(cls, source: str) -> Variant:
        """Read the checkpoint's headers and tokenizer, and the files beside them.

        Raises:
            CheckpointError: the checkpoint or its reference_scores.json is damaged.
            KitError: its parity.json is damaged.
        """
        checkpoint = open_checkpoint(source)
        directory = checkpoint.directory
        renderer = checkpoint.renderer()
        stored = ReferenceScores.load(directory) if (directory / REFERENCE_SCORES_FILE).is_file() else None
        report = read_report(directory / JSON_FILE) if stored and (directory / JSON_FILE).is_file() else None
        return cls(source, short_name(checkpoint.name), checkpoint, renderer, stored, report)

    @property
    def published_name(self) -> str | None:
        """The published name of the WorldPM model that it is or was made from, or None."""
        if self.stored_reference is not None:
            return match_name(self.stored_reference.model)
        return match_name(self.checkpoint.name, allow_suffix=self.checkpoint.quantization is not None)

    @property
    def golden_name(self) -> str | None:
        """The published name whose golden scores apply to it, or None."""
        name = self.published_name
        return name if name and PUBLISHED_SCORES[name] else None

    @property
    def weights_description(self) -> str:
        """The stored weights, such as `bfloat16 weights` or `gptq weights of 4 bits`."""
        return describe_weights(self.checkpoint)

    def subject(self, reference: str, reference_dtype: str, settings: Mapping[str, JsonValue]) -> Subject:
        """The `Subject` of a report on this variant.

        Method and settings of its quantization come from the parity.json beside it, if present.

        Args:
            reference: name of the reference model.
            reference_dtype: see `Subject`.
            settings: of this run; added to those of the quantization.
        """
        original = self.report.subject if self.report else None
        commit = {"commit": self.checkpoint.commit} if self.checkpoint.commit else {}
        return Subject.from_configs(
            self.label,
            self.checkpoint.model_config,
            self.checkpoint.quantization,
            method=original.method if original else None,
            reference=reference,
            reference_dtype=reference_dtype,
            settings={**(original.settings if original else {}), **commit, **settings},
        )

    def render(self, pair: PreferencePair) -> RenderedPair:
        """Render both conversations into tokens.

        Raises:
            ConversationError: one is too long, or the chat template rejects it.
        """
        return (
            self.renderer.render(pair.chosen_conversation, where=pair.where),
            self.renderer.render(pair.rejected_conversation, where=pair.where),
        )

    def stored_scores(self, rendered: RenderedPair) -> Scores | None:
        """The stored reference scores of a pair; None unless both are stored."""
        scores = self.stored_reference.scores if self.stored_reference else {}
        chosen, rejected = (scores.get(each.key) for each in rendered)
        return None if chosen is None or rejected is None else (chosen, rejected)

    def was_calibrated_on(self, pair: PreferencePair, rendered: RenderedPair) -> bool:
        """Whether the calibration set contained one of the pair's conversations.

        reference_scores.json has calibration and held-out conversations, parity.json lists the held-out pairs. False if
        either file is missing.
        """
        if self.stored_reference is None or self.report is None:
            return False
        held_out = pair.id in {each.id for each in self.report.scores}
        return not held_out and any(each.key in self.stored_reference.scores for each in rendered)


def open_variants(sources: Sequence[str]) -> list[Variant]:
    """Open each source; repeated names get a number, as in `model-2`.

    Raises:
        KitError: as `Variant.open`.
    """
    variants: list[Variant] = []
    for source in sources:
        variant = Variant.open(source)
        used_labels = {each.label for each in variants}
        labels = [variant.label, *(f"{variant.label}-{number}" for number in range(2, len(sources) + 1))]
        unused_label = next(label for label in labels if label not in used_labels)
        variants.append(replace(variant, label=unused_label))
    return variants
