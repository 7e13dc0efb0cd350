"""A model's parity measured again, here and now, while it goes on serving others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runtime.api.service import ServedModel
from runtime.golden import CONVERSATIONS, GoldenResult
from runtime.parity import compare, judge
from runtime.parity_pairs import FILE_NAME, Selection, read_pairs, select_pairs, stored_pairs
from runtime.parity_report import ParityReport
from runtime.scored_pair import Scores
from runtime.variant_run import Run, Yardstick

MOST_PAIRS = 64  # quick, and enough to show a broken model
AT_ONCE = 8  # pairs in a request, after which progress is shown


@dataclass
class QuickParity:
    """One run.

    Attributes:
        done: pairs scored so far, of `selection`'s.
        golden: what the model card's example gives, when that was scored.
        report: when all is done.
    """

    model: ServedModel
    selection: Selection
    done: int = 0
    golden: GoldenResult | None = None
    report: ParityReport | None = None

    @classmethod
    def prepare(cls, model: ServedModel) -> QuickParity:
        """Choose among the pairs that are stored beside the model, evenly.

        Without any there is only the golden check.

        Raises:
            KitError: their file is damaged, or no reference scores are stored for them.
        """
        paths = stored_pairs([model.variant]) if model.variant.stored is not None else []
        if not paths:
            return cls(model, Selection([], {}, {}))
        pairs = read_pairs(paths)
        step = max(1, -(-len(pairs) // MOST_PAIRS))
        return cls(model, select_pairs(pairs[::step], [model.variant], None))

    def run(self) -> Iterator[None]:
        """Score, yielding now and then.

        Raises:
            Busy: the queue is full.
            NonFiniteError: a score is not finite.
        """
        variant, scorer = self.model.variant, self.model.scorer
        golden: Scores | None = None
        if variant.golden is not None:
            good, bad = self.model.submit([variant.renderer.render(each) for each in CONVERSATIONS]).result()
            golden = (good, bad)
        run = Run([], golden, scorer.numerics.products, scorer.token_budget)
        self.golden = judge(variant, run, None)
        rendered = self.selection.rendered.get(variant.label, [])
        for start in range(0, len(rendered), AT_ONCE):
            some = [each for pair in rendered[start : start + AT_ONCE] for each in pair]
            scores = self.model.submit(some).result()
            run.scores.extend(zip(scores[::2], scores[1::2], strict=True))
            self.done = len(run.scores)
            yield
        if rendered:
            devices = ",".join(share.device.name for share in scorer.plan.shares)
            yardstick = Yardstick.stored(variant, self.selection)
            self.report = compare(variant, run, yardstick, self.selection, self.golden, devices)

    def sentence(self) -> str:
        """Why there is no report, where there is none."""
        if self.model.variant.checkpoint.quantization is None:
            return "This is an unquantized model; parity is what quantized ones are held to."
        return f"No {FILE_NAME} with reference scores is beside this model, so there are no pairs to measure it on."
