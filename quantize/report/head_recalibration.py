"""Recalibrate the score head so that a quantized model's scores match the reference scores.

Quantization shifts and scales scores, and adds a constant bias to the final hidden state. The score head is not
quantized, so these errors can be corrected in its weights, at no cost when scoring and in every engine. Candidate heads
are fitted on the calibration rows against the reference scores and compared by cross-validation. A more complex
candidate is preferred only if it improves by more than one standard error; the head stays unchanged if none does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from runtime.modeling.qwen2 import ScoreHead

FOLDS = 8


@dataclass(frozen=True)
class RecalibrationData:
    """The data to fit on, one row per conversation.

    Attributes:
        reference_features, quantized_features: fp32 [n, H], normed hidden states at the scored token.
        reference_scores: fp32 [n].
        groups: rows with the same number share a prompt and belong to the same fold.
    """

    reference_features: torch.Tensor
    quantized_features: torch.Tensor
    reference_scores: torch.Tensor
    groups: Sequence[int]

    def rows(self, index: torch.Tensor) -> RecalibrationData:
        """Select rows."""
        return RecalibrationData(
            self.reference_features[index],
            self.quantized_features[index],
            self.reference_scores[index],
            [self.groups[i] for i in index.tolist()],
        )


@dataclass(frozen=True)
class HeadRecalibration:
    """The selected candidate.

    Attributes:
        kind: `none`, `affine`, `shift` or `refit-K`.
        errors: root mean square error of each candidate on held-out folds, in standard deviations of the reference
            scores.
        rows: number of rows it was fitted on.
        head: the head to store; the original one if kind is `none`.
    """

    kind: str
    errors: dict[str, float]
    rows: int
    head: ScoreHead

    @property
    def changed(self) -> bool:
        """Whether `head` differs from the original head."""
        return self.kind != "none"

    def summary(self) -> dict[str, Any]:
        """The report's `repair` entry."""
        return {"kind": self.kind, "rows": self.rows, "folds": FOLDS, "cross_validated_rms_shift": self.errors}


def recalibrate_head(head: ScoreHead, data: RecalibrationData) -> HeadRecalibration:
    """Select a candidate by cross-validation and fit it on all rows. `none` if all rows are in one fold."""
    folds = torch.tensor([group % FOLDS for group in data.groups])
    if len(folds.unique()) < 2:
        return HeadRecalibration("none", {}, len(folds), head)
    deviation = data.reference_scores.std().clamp_min(1e-12)
    squared = {}  # candidate -> [n] squared held-out error, in units of the reference's variance
    for name, fit in CANDIDATES.items():
        error = torch.zeros(len(folds))
        for fold in folds.unique():
            train, test = data.rows((folds != fold).nonzero()[:, 0]), (folds == fold).nonzero()[:, 0]
            scores = fit(head, train).score(data.quantized_features[test])
            error[test] = ((scores - data.reference_scores[test]) / deviation).square()
        squared[name] = error
    kind = _select_candidate(squared)
    errors = {name: float(error.mean().sqrt()) for name, error in squared.items()}
    return HeadRecalibration(kind, errors, len(folds), CANDIDATES[kind](head, data))


def _select_candidate(squared: dict[str, torch.Tensor]) -> str:
    """Return the last candidate that beats the one selected before it by more than a standard error of the mean.

    Args:
        squared: [n] squared errors of each candidate, from the simplest candidate to the most complex.
    """
    chosen = "none"
    for name, error in squared.items():
        gain = squared[chosen] - error
        if gain.mean() > gain.std() / len(gain) ** 0.5:
            chosen = name
    return chosen


def _none(head: ScoreHead, data: RecalibrationData) -> ScoreHead:
    return head


def _affine(head: ScoreHead, data: RecalibrationData) -> ScoreHead:
    """Fit reference = slope * score + offset by least squares and apply it to `score.2`."""
    scores, target = head.score(data.quantized_features), data.reference_scores
    centred = scores - scores.mean()
    slope = (centred @ (target - target.mean())) / centred.square().sum().clamp_min(1e-12)
    offset = target.mean() - slope * scores.mean()
    return replace(
        head,
        score_2_weight=head.score_2_weight.float() * slope,
        score_2_bias=head.score_2_bias.float() * slope + offset,
    )


def _shift(head: ScoreHead, data: RecalibrationData) -> ScoreHead:
    """Correct the mean shift of the features in the bias of `score.0`, then apply the affine correction."""
    drift = (data.reference_features - data.quantized_features).mean(0)
    weight = head.score_0_weight.float()
    shifted = replace(head, score_0_weight=weight, score_0_bias=head.score_0_bias.float() + weight @ drift)
    return _affine(shifted, data)


def _refit(components: int) -> Callable[[ScoreHead, RecalibrationData], ScoreHead]:
    """Ridge regression of the affine correction's residual on the leading principal components of the inner layer."""

    def fit(head: ScoreHead, data: RecalibrationData) -> ScoreHead:
        head = _affine(head, data)
        features = data.quantized_features
        inner = torch.relu(features @ head.score_0_weight.float().T + head.score_0_bias.float())
        mean = inner.mean(0)
        left, sizes, right = torch.linalg.svd(inner - mean, full_matrices=False)
        kept = slice(min(components, int((sizes > 1e-5 * sizes[0]).sum())))
        left, sizes, right = left[:, kept], sizes[kept], right[kept]
        residual = data.reference_scores - head.score(features)
        # The energy of the last kept component as the ridge penalty keeps weak directions from fitting noise.
        step = right.T @ (left.T @ residual * sizes / (sizes.square() + sizes[-1:].square()))
        return replace(head, score_2_weight=head.score_2_weight + step, score_2_bias=head.score_2_bias - mean @ step)

    return fit


CANDIDATES: dict[str, Callable[[ScoreHead, RecalibrationData], ScoreHead]] = {
    "none": _none,
    "affine": _affine,
    "shift": _shift,
    "refit-4": _refit(4),
    "refit-16": _refit(16),
}


def head_tensors(head: ScoreHead) -> dict[str, torch.Tensor]:
    """The head's tensors by checkpoint name, all in fp32, because some loaders fail on a head of mixed dtypes."""
    return {
        "score." + name.removeprefix("score_").replace("_", "."): tensor.float()
        for name, tensor in vars(head).items()
        if name.startswith("score_")
    }
