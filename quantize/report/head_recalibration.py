"""Recalibrate the score head so that a quantized model's scores match the reference scores.

Quantization shifts and scales scores. The score head is not quantized, so both can be corrected in its weights, at no
cost when scoring and in every engine; a head without a bias is only scaled. The correction is fitted on the calibration
rows against the reference scores, and kept if cross-validation shows a gain of more than one standard error (Breiman et
al. 1984).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runtime.modeling.score_head import ScoreHead

FOLDS = 8


@dataclass(frozen=True)
class RecalibrationData:
    """The data to fit on, one row per conversation.

    Attributes:
        features: fp32 [n, H], normed hidden states of the quantized model at the scored token.
        reference_scores: fp32 [n].
        groups: rows with the same number share a prompt and belong to the same fold.
    """

    features: torch.Tensor
    reference_scores: torch.Tensor
    groups: Sequence[int]

    def rows(self, index: torch.Tensor) -> RecalibrationData:
        """Select rows."""
        return RecalibrationData(
            self.features[index],
            self.reference_scores[index],
            [self.groups[i] for i in index.tolist()],
        )


@dataclass(frozen=True)
class HeadRecalibration:
    """The selected candidate.

    Attributes:
        kind: `none` or `affine`.
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
            scores = fit(head, train).score(data.features[test])
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
    """Fit reference = slope * score + offset by least squares and apply it to the last linear.

    A head without a bias can store no offset: it is fitted with 0.
    """
    scores, target = head.score(data.features), data.reference_scores
    weight, bias = head.last_weight, head.last_bias
    mean, target_mean = (scores.mean(), target.mean()) if bias else (0.0, 0.0)
    centred = scores - mean
    slope = (centred @ (target - target_mean)) / centred.square().sum().clamp_min(1e-12)
    fitted = {weight: head.tensors[weight].float() * slope}
    if bias:
        fitted[bias] = head.tensors[bias].float() * slope + (target_mean - slope * mean)
    return head.with_tensors(fitted)


CANDIDATES: dict[str, Callable[[ScoreHead, RecalibrationData], ScoreHead]] = {"none": _none, "affine": _affine}


def head_tensors(head: ScoreHead) -> dict[str, torch.Tensor]:
    """The head's tensors by checkpoint name, all in fp32, because some loaders fail on a head of mixed dtypes."""
    return {name: tensor.float() for name, tensor in head.tensors.items()}
