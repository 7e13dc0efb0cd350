"""The repair of the head: planted drifts are recovered, nothing is done without need, nothing leaks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from quantize.report import head_recalibration as repair
from quantize.report.head_recalibration import (
    FOLDS,
    HeadRecalibration,
    RecalibrationData,
    head_tensors,
    recalibrate_head,
)
from runtime.checkpoints.heads import MLP_HEAD
from runtime.modeling.score_head import ScoreHead

HIDDEN = 48


def make_head(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> ScoreHead:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) * shape[-1] ** -0.5).to(dtype)

    shapes = ((HIDDEN, HIDDEN), (HIDDEN,), (1, HIDDEN), (1,))
    tensors = {name: random(*shape) for name, shape in zip(MLP_HEAD, shapes, strict=True)}
    return ScoreHead(torch.ones(HIDDEN), tensors, eps=1e-6)


def make_features(rows: int, seed: int = 1) -> torch.Tensor:
    """Features with a few strong directions, as hidden states have."""
    draw = torch.Generator().manual_seed(1000)
    rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=draw)).Q
    scales = torch.logspace(0.5, -1.5, HIDDEN)
    return torch.randn(rows, HIDDEN, generator=draw.manual_seed(seed)) * scales @ rotation


def noise_like(features: torch.Tensor, size: float, seed: int = 2) -> torch.Tensor:
    return size * torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))


def evidence_of(
    head: ScoreHead, reference: torch.Tensor, quantized: torch.Tensor, pairs: bool = True
) -> RecalibrationData:
    """Rows two by two of one prompt, as preference pairs give them."""
    groups = [row // 2 if pairs else row for row in range(len(reference))]
    return RecalibrationData(quantized, head.score(reference), groups)


def held_out_shift(fitted: ScoreHead, head: ScoreHead, reference: torch.Tensor, quantized: torch.Tensor) -> float:
    """Root mean square shift in standard deviations of the reference scores."""
    scores = head.score(reference)
    return float((fitted.score(quantized) - scores).square().mean().sqrt() / scores.std())


# ---- what is recovered ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("slope", "offset"), [(0.8, 0.5), (1.3, -2.0), (1.0, 0.7)])
def test_an_affine_drift_of_the_scores_is_undone(slope, offset):
    """The features are right and the scores' scale is not: the same as another head over the same features."""
    head, features = make_head(), make_features(64)
    weight, bias = (head.tensors[name].float() for name in ("score.2.weight", "score.2.bias"))
    drifted = head.with_tensors({"score.2.weight": weight * slope, "score.2.bias": bias * slope + offset})
    noisy = features + noise_like(features, 0.01)
    kept = recalibrate_head(drifted, RecalibrationData(noisy, head.score(features), [row // 2 for row in range(64)]))
    assert kept.kind == "affine"
    others = make_features(200, seed=7)
    assert held_out_shift(kept.head, head, others, others) < 0.03
    assert kept.errors["affine"] < 0.05 < kept.errors["none"]


def test_a_head_without_a_bias_is_scaled():
    """It can store no offset, and transformers' class would ignore one."""
    features = make_features(64)
    head = ScoreHead(torch.ones(HIDDEN), {"score.weight": make_head().tensors["score.2.weight"].float()}, 1e-6)
    drifted = head.with_tensors({"score.weight": 0.8 * head.tensors["score.weight"]})
    kept = recalibrate_head(drifted, evidence_of(head, features, features + noise_like(features, 0.01)))
    assert kept.kind == "affine" and set(head_tensors(kept.head)) == {"score.weight"}
    others = make_features(200, seed=7)
    assert held_out_shift(kept.head, head, others, others) < 0.03


# ---- what is left alone ---------------------------------------------------------------------------------


def test_equal_scores_are_left_alone():
    head, features = make_head(), make_features(64)
    kept = recalibrate_head(head, evidence_of(head, features, features))
    assert kept.kind == "none" and kept.head is head
    assert kept.errors["none"] == 0 and kept.rows == 64


@pytest.mark.parametrize("seed", range(6))
def test_noise_alone_is_not_fitted_to_harm(seed):
    """Where there is nothing systematic, what is kept costs next to nothing on rows never seen."""
    head, features, others = make_head(seed), make_features(64, seed + 20), make_features(400, seed + 40)
    kept = recalibrate_head(head, evidence_of(head, features, features + noise_like(features, 0.05, seed)))
    noisy = others + noise_like(others, 0.05, seed + 60)
    assert held_out_shift(kept.head, head, others, noisy) < 1.1 * held_out_shift(head, head, others, noisy)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_rows_of_one_prompt_leave_none_to_hold_out(rows):
    head, features = make_head(), make_features(rows)
    kept = recalibrate_head(head, evidence_of(head, features, features + 1))
    assert (kept.kind, kept.head, kept.errors, kept.rows) == ("none", head, {}, rows)


@pytest.mark.parametrize("rows", [3, 4, 6, 10, 17])
def test_few_rows_give_finite_heads(rows):
    head, features = make_head(), make_features(rows)
    kept = recalibrate_head(head, evidence_of(head, features, features + noise_like(features, 0.3)))
    assert all(tensor.isfinite().all() for tensor in head_tensors(kept.head).values())
    assert all(error == error and error < 1e3 for error in kept.errors.values())


def test_a_head_whose_inner_layer_is_dead_is_no_trouble():
    """Every unit below zero: nothing to refit, and no division by nothing."""
    head = make_head().with_tensors({"score.0.bias": torch.full((HIDDEN,), -1e4)})
    features = make_features(32)
    kept = recalibrate_head(head, evidence_of(head, features, features + 0.1))
    assert kept.kind == "none"
    assert all(tensor.isfinite().all() for tensor in head_tensors(kept.head).values())


# ---- cross-validation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """A head that scores rows it was fitted on perfectly, and others as the old one does."""

    old: ScoreHead
    seen: RecalibrationData

    def score(self, features: torch.Tensor) -> torch.Tensor:
        scores = self.old.score(features)
        for row, feature in enumerate(features):
            match = (self.seen.features == feature).all(-1).nonzero()
            if len(match):
                scores[row] = self.seen.reference_scores[int(match[0])]
        return scores


def test_no_row_is_judged_by_what_was_fitted_on_it(monkeypatch):
    """Learning by heart earns nothing, not even through the other response to the same prompt."""
    head, features = make_head(), make_features(40)
    quantized = features + 0.3
    fits: list[RecalibrationData] = []

    def memorise(head: ScoreHead, data: RecalibrationData) -> Memory:
        fits.append(data)
        return Memory(head, data)

    monkeypatch.setattr(repair, "CANDIDATES", {"none": repair._none, "memory": memorise})
    everything = evidence_of(head, features, quantized)
    kept = recalibrate_head(head, everything)
    assert kept.kind == "none" and kept.errors["memory"] == kept.errors["none"] > 0.1
    assert len(fits) == FOLDS
    for seen in fits:
        assert 0 < len(seen.groups) < 40
        inside = set(seen.groups)
        outside = set(everything.groups) - inside
        assert len(seen.groups) == sum(group in inside for group in everything.groups)  # prompts stay together
        assert outside and all(group % FOLDS == min(outside) % FOLDS for group in outside)
    assert sorted(g for seen in fits for g in set(everything.groups) - set(seen.groups)) == list(range(20))


def test_rows_carry_all_their_columns_along():
    head, features = make_head(), make_features(10)
    everything = evidence_of(head, features, features + 1)
    part = everything.rows(torch.tensor([7, 2, 3]))
    assert torch.equal(part.features, features[[7, 2, 3]] + 1)
    assert torch.equal(part.reference_scores, everything.reference_scores[[7, 2, 3]])
    assert part.groups == [3, 1, 1]


# ---- what is stored -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", repair.CANDIDATES)
def test_every_candidate_is_a_head_that_a_checkpoint_can_store(kind):
    head, features = make_head(), make_features(64)
    fitted = repair.CANDIDATES[kind](head, evidence_of(head, features, features + 0.2))
    stored = head_tensors(fitted)
    assert set(stored) == set(MLP_HEAD)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in head_tensors(head).items()
    }
    again = ScoreHead(head.norm, stored, head.eps)
    assert torch.equal(again.score(features), fitted.score(features))


def test_the_report_says_what_was_done():
    summary = HeadRecalibration("affine", {"none": 0.3, "affine": 0.1}, 64, make_head()).summary()
    assert summary == {
        "kind": "affine", "rows": 64, "folds": FOLDS, "cross_validated_rms_shift": {"none": 0.3, "affine": 0.1},
    }  # fmt: skip
