"""Recalibrate the score head so that a quantized model's scores match the reference scores.

Quantization shifts and scales scores, and adds a constant bias to the final hidden state. The score head is not
quantized, so these errors can be corrected in its weights, at no cost when scoring and in every engine. Candidate heads
are fitted on the calibration rows against the reference scores and compared by cross-validation. The simplest candidate
within one standard error of the best is kept (Breiman et al. 1984); the first candidate leaves the head unchanged.
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
        kind: `none`, `affine`, `shift` or `ridge-PENALTY`.
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
    """Return the first candidate whose mean error exceeds the least one by at most a standard error of the difference.

    Args:
        squared: [n] squared errors of each candidate, from the simplest candidate to the most complex.
    """
    best = min(squared.values(), key=lambda error: float(error.mean()))
    excesses = {name: error - best for name, error in squared.items()}
    return next(name for name, each in excesses.items() if each.mean() <= each.std() / len(each) ** 0.5)


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


def _ridge(penalty: float) -> Callable[[ScoreHead, RecalibrationData], ScoreHead]:
    """Fit a change of `score.0` to the residual of the affine correction, by ridge regression.

    To first order, a change D of `score.0.weight` changes the score of centred features x by a . D x, where a are the
    weights in `score.2` of the units that are not cut at zero. So the ridge solution is D = sum_i c_i a_i x_i^T with
    (K + ridge I) c = residual and K_ij = (a_i . a_j) (x_i . x_j): as many unknowns as rows, for any width.
    """

    def fit(head: ScoreHead, data: RecalibrationData) -> ScoreHead:
        head = _affine(head, data)
        weight, bias = head.score_0_weight.float(), head.score_0_bias.float()
        mean = data.quantized_features.mean(0)
        features = data.quantized_features - mean
        active = (data.quantized_features @ weight.T + bias > 0) * head.score_2_weight
        kernel = (active @ active.T) * (features @ features.T)
        kernel.diagonal().add_(penalty * kernel.diagonal().mean() + torch.finfo(torch.float32).tiny)
        residual = data.reference_scores - head.score(data.quantized_features)
        change = (active * torch.linalg.solve(kernel, residual)[:, None]).T @ features
        return replace(head, score_0_weight=weight + change, score_0_bias=bias - change @ mean)

    return fit


CANDIDATES: dict[str, Callable[[ScoreHead, RecalibrationData], ScoreHead]] = {
    "none": _none,
    "affine": _affine,
    "shift": _shift,
    "ridge-1": _ridge(1.0),
    "ridge-0.3": _ridge(0.3),
    "ridge-0.1": _ridge(0.1),
    "ridge-0.03": _ridge(0.03),
}
"""From the simplest to the most flexible."""


def head_tensors(head: ScoreHead) -> dict[str, torch.Tensor]:
    """The head's tensors by checkpoint name, all in fp32, because some loaders fail on a head of mixed dtypes."""
    return {
        "score." + name.removeprefix("score_").replace("_", "."): tensor.float()
        for name, tensor in vars(head).items()
        if name.startswith("score_")
    }
