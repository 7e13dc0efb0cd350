"""The scores that a variant gives here and now, and those they are held against."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import torch

from runtime.errors import NonFiniteError
from runtime.golden import CONVERSATIONS
from runtime.machine_arguments import load_scorer
from runtime.parity_pairs import Selection
from runtime.scored_pair import Scores
from runtime.variant import Variant


@dataclass(frozen=True)
class Run:
    """One model's scores.

    Attributes:
        scores: of the selected pairs, in their order.
        golden: of the model card's example, None where it was not scored.
        products: dtype of what the linears multiply.
    """

    scores: list[Scores]
    golden: Scores | None
    products: torch.dtype
    token_budget: int

    @property
    def arithmetic(self) -> str:
        """`float32`."""
        return str(self.products).removeprefix("torch.")


@dataclass(frozen=True)
class Yardstick:
    """Reference scores of the selected pairs.

    Attributes:
        name: whose they are.
        dtype: how they were computed, such as `bfloat16 weights, float32 arithmetic`.
        fingerprint: of that checkpoint.
        noise_floor: the same model's in plain bf16, where they were kept for every pair.
    """

    name: str
    dtype: str
    fingerprint: str
    scores: list[Scores]
    noise_floor: list[Scores] | None = None

    @classmethod
    def measured(cls, reference: Variant, run: Run) -> Yardstick:
        """Of a checkpoint that was scored here."""
        checkpoint = reference.checkpoint
        return cls(
            checkpoint.name, f"{reference.weights}, {run.arithmetic} arithmetic", checkpoint.fingerprint(), run.scores
        )

    @classmethod
    def stored(cls, model: Variant, selection: Selection) -> Yardstick:
        """Of what is stored beside a quantized model."""
        assert model.stored is not None  # else no pair would have been selected
        found = [model.stored_scores(rendered) for rendered in selection.rendered[model.label]]
        floors = {each.id: each.noise_floor for each in model.report.scores} if model.report else {}
        floor = [floors.get(pair.id) for pair in selection.pairs]
        return cls(
            model.stored.model,
            model.stored.dtype,
            model.stored.fingerprint,
            [scores for scores in found if scores is not None],
            None if None in floor else [scores for scores in floor if scores is not None],
        )


def run_variant(variant: Variant, selection: Selection, arguments: Namespace, *, golden: bool = False) -> Run:
    """Load a variant, score the selected pairs and, with `golden`, the model card's example; let it go.

    Everything is scored in one call, so that a model that does not fit the device is read once.

    Raises:
        NonFiniteError: a score is not finite.
    """
    rendered = [each for pair in selection.rendered.get(variant.label, []) for each in pair]
    if golden:
        rendered += [variant.renderer.render(conversation) for conversation in CONVERSATIONS]
    scorer = load_scorer(variant.source, arguments)
    try:
        scores = scorer.scores(rendered)
    except NonFiniteError as error:
        raise NonFiniteError(f"{variant.label}: {error} Conversations are counted from 0, two a pair.") from error
    pairs = list(zip(scores[::2], scores[1::2], strict=True))
    return Run(
        pairs[: len(selection.pairs)], pairs[-1] if golden else None, scorer.numerics.products, scorer.token_budget
    )
