"""Bring a quantized model's scores back onto the reference's scale, at no cost when scoring.

Quantizing drifts scores in ways that keep most of their order: a shift, a stretch, a constant bias of the
final hidden state. The head is not quantized, so these can be undone in it, and every engine that reads the
checkpoint gets the correction. Candidates are fitted on calibration rows against the reference scores of
the same sweep and compared by cross-validation; the simplest one within a standard error of the best is
kept, and none where none helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from runtime.qwen2 import ScoreHead

FOLDS = 8


@dataclass(frozen=True)
class Evidence:
    """What a repair is fitted on, one row a conversation.

    Attributes:
        reference_features, quantized_features: fp32 [n, H], normed hidden states at the scored token.
        reference_scores: fp32 [n].
        groups: rows with the same number share a prompt, and stay in one fold.
    """

    reference_features: torch.Tensor
    quantized_features: torch.Tensor
    reference_scores: torch.Tensor
    groups: Sequence[int]

    def rows(self, index: torch.Tensor) -> Evidence:
        """Some of the rows."""
        return Evidence(
            self.reference_features[index],
            self.quantized_features[index],
            self.reference_scores[index],
            [self.groups[i] for i in index.tolist()],
        )


@dataclass(frozen=True)
class Repair:
    """The repair that was kept.

    Attributes:
        kind: `none`, `affine`, `shift` or `refit-K`.
        errors: root mean square error of each candidate on held-out folds, in standard deviations of the
            reference scores.
        head: the head to store; the given one where kind is `none`.
    """

    kind: str
    errors: dict[str, float]
    rows: int
    head: ScoreHead

    @property
    def changed(self) -> bool:
        """Whether `head` is another one than was given."""
        return self.kind != "none"

    def figures(self) -> dict[str, Any]:
        """What the report says of it."""
        return {"kind": self.kind, "rows": self.rows, "folds": FOLDS, "cross_validated_rms_shift": self.errors}


def fit_repair(head: ScoreHead, evidence: Evidence) -> Repair:
    """Cross-validate the candidates, from simple to rich, and fit the chosen one on all rows."""
    folds = torch.tensor([group % FOLDS for group in evidence.groups])
    if len(folds.unique()) < 2:  # nothing to hold out
        return Repair("none", {}, len(folds), head)
    deviation = evidence.reference_scores.std().clamp_min(1e-12)
    squared = {}  # candidate -> [n] squared held-out error, in units of the reference's variance
    for name, fit in CANDIDATES.items():
        error = torch.zeros(len(folds))
        for fold in folds.unique():
            train, test = evidence.rows((folds != fold).nonzero()[:, 0]), (folds == fold).nonzero()[:, 0]
            scores = fit(head, train).score(evidence.quantized_features[test])
            error[test] = ((scores - evidence.reference_scores[test]) / deviation).square()
        squared[name] = error
    kind = _simplest_good(squared)
    errors = {name: float(error.mean().sqrt()) for name, error in squared.items()}
    return Repair(kind, errors, len(folds), CANDIDATES[kind](head, evidence))


def _simplest_good(squared: dict[str, torch.Tensor]) -> str:
    """The first candidate that no later one beats by more than a standard error of the paired difference."""
    chosen = "none"
    for name, error in squared.items():
        gain = squared[chosen] - error
        if gain.mean() > gain.std() / len(gain) ** 0.5:
            chosen = name
    return chosen


def _none(head: ScoreHead, evidence: Evidence) -> ScoreHead:
    return head


def _affine(head: ScoreHead, evidence: Evidence) -> ScoreHead:
    """Least squares of reference = slope * score + offset, folded into `score.2`."""
    scores, target = head.score(evidence.quantized_features), evidence.reference_scores
    centred = scores - scores.mean()
    slope = (centred @ (target - target.mean())) / centred.square().sum().clamp_min(1e-12)
    offset = target.mean() - slope * scores.mean()
    return replace(
        head,
        score_2_weight=head.score_2_weight.float() * slope,
        score_2_bias=head.score_2_bias.float() * slope + offset,
    )


def _shift(head: ScoreHead, evidence: Evidence) -> ScoreHead:
    """Undo the mean drift of the features in `score.0`'s bias, then the affine correction."""
    drift = (evidence.reference_features - evidence.quantized_features).mean(0)
    weight = head.score_0_weight.float()
    shifted = replace(head, score_0_weight=weight, score_0_bias=head.score_0_bias.float() + weight @ drift)
    return _affine(shifted, evidence)


def _refit(components: int) -> Callable[[ScoreHead, Evidence], ScoreHead]:
    """Ridge regression of what the affine correction leaves, on the leading components of the inner layer."""

    def fit(head: ScoreHead, evidence: Evidence) -> ScoreHead:
        head = _affine(head, evidence)
        features = evidence.quantized_features
        inner = torch.relu(features @ head.score_0_weight.float().T + head.score_0_bias.float())
        mean = inner.mean(0)
        left, sizes, right = torch.linalg.svd(inner - mean, full_matrices=False)
        kept = slice(min(components, int((sizes > 1e-5 * sizes[0]).sum())))
        left, sizes, right = left[:, kept], sizes[kept], right[kept]
        residual = evidence.reference_scores - head.score(features)
        # Shrinking by the last kept component's own energy keeps weak directions from fitting noise.
        step = right.T @ (left.T @ residual * sizes / (sizes.square() + sizes[-1:].square()))
        return replace(head, score_2_weight=head.score_2_weight + step, score_2_bias=head.score_2_bias - mean @ step)

    return fit


CANDIDATES: dict[str, Callable[[ScoreHead, Evidence], ScoreHead]] = {
    "none": _none,
    "affine": _affine,
    "shift": _shift,
    "refit-4": _refit(4),
    "refit-16": _refit(16),
}


def head_tensors(head: ScoreHead) -> dict[str, torch.Tensor]:
    """The score head's tensors in fp32 by their names in a checkpoint: some loaders trip over a head of two dtypes."""
    return {
        "score." + name.removeprefix("score_").replace("_", "."): tensor.float()
        for name, tensor in vars(head).items()
        if name.startswith("score_")
    }
