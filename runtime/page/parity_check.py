"""Measure the parity of a served model on its stored pairs, through the queue that all visitors share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runtime.api.service import ServedModel
from runtime.evaluation.comparison import VariantScores, build_parity_report, check_golden_scores
from runtime.evaluation.golden import GoldenResult, golden_conversations
from runtime.evaluation.pairs import (
    PARITY_PAIRS_FILE,
    PairReferenceScores,
    Selection,
    read_pairs,
    select_pairs,
    stored_pair_files,
)
from runtime.evaluation.report import ParityReport

MAX_PAIRS = 64  # enough to detect a broken model
PAIRS_PER_REQUEST = 8  # the progress is updated after every request


@dataclass
class ParityCheck:
    """One measurement.

    Attributes:
        selection: the pairs to score; empty if the model has none, so that only the golden scores are checked.
        done: number of pairs scored so far.
        golden: result of the model card's example, set by `run`.
        report: set by `run` once all pairs are scored.
    """

    model: ServedModel
    selection: Selection
    done: int = 0
    golden: GoldenResult | None = None
    report: ParityReport | None = None

    @classmethod
    def prepare(cls, model: ServedModel) -> ParityCheck:
        """Select at most `MAX_PAIRS` of the pairs stored with the model, evenly spaced.

        Raises:
            KitError: the pairs file is damaged, or no pair can be used (see `select_pairs`).
        """
        paths = stored_pair_files([model.variant]) if model.variant.stored_reference is not None else []
        if not paths:
            return cls(model, Selection([], {}, {}))
        pairs = read_pairs(paths)
        step = max(1, -(-len(pairs) // MAX_PAIRS))
        return cls(model, select_pairs(pairs[::step], [model.variant], None))

    def run(self) -> Iterator[None]:
        """Score the golden example and the pairs, yielding after every request of pairs.

        Raises:
            ServerBusyError: the queue is full.
            NonFiniteError: a score is not finite.
        """
        variant, scorer = self.model.variant, self.model.scorer
        golden: tuple[float, ...] | None = None
        if variant.golden_name is not None:
            conversations = golden_conversations(variant.golden_name)
            golden = tuple(self.model.submit([variant.renderer.render(each) for each in conversations]).result())
        run = VariantScores([], golden, scorer.precision.product_dtype, scorer.token_budget)
        self.golden = check_golden_scores(variant, run, None)
        rendered = self.selection.rendered.get(variant.label, [])
        for start in range(0, len(rendered), PAIRS_PER_REQUEST):
            batch = [each for pair in rendered[start : start + PAIRS_PER_REQUEST] for each in pair]
            scores = self.model.submit(batch).result()
            run.scores.extend(zip(scores[::2], scores[1::2], strict=True))
            self.done = len(run.scores)
            yield
        if rendered:
            devices = ",".join(share.device.name for share in scorer.plan.shares)
            reference_scores = PairReferenceScores.from_files(variant, self.selection)
            self.report = build_parity_report(variant, run, reference_scores, self.selection, self.golden, devices)

    def explain_missing_report(self) -> str:
        """The reason why `report` is None after `run`."""
        if self.model.variant.checkpoint.quantization is None:
            return "This is an unquantized model; parity is only measured for quantized models."
        return f"No {PARITY_PAIRS_FILE} with reference scores is stored with this model, so parity cannot be measured."
