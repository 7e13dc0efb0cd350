"""Training the score head: the noise metric, the fit, merging networks into one head, and the feature store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.score_head import train
from benchmarks.score_head.features import FeatureStore, quantization_step_noise, two_percent_noise
from benchmarks.score_head.fitting import (
    SCORE_SCALE,
    NoiseMetric,
    fit_linear,
    fit_network,
    head_scores,
    merge_networks,
    stochastic_round,
)
from runtime.checkpoints.heads import MLP_HEAD
from runtime.demo.model import HEAD_FILE
from runtime.modeling.precision import FLOAT32
from runtime.scorer import Scorer
from tests.helpers.tiny_job import write_pairs

WIDTH = 160  # room for one network's units and a linear part


def test_committed_head_is_whole_bf16_and_finite() -> None:
    from safetensors.torch import load_file

    head = load_file(HEAD_FILE)
    assert sorted(head) == sorted(MLP_HEAD)
    assert all(tensor.dtype == torch.bfloat16 and bool(tensor.isfinite().all()) for tensor in head.values())


def test_squared_norm_of_a_linear_score_in_z_is_its_noise_variance() -> None:
    features, noise = random(50, 6), random(200, 6, seed=1) * torch.arange(1, 7)
    metric = NoiseMetric.measure(features, [(3.0, noise)])
    v = random(6, 1, seed=2)[:, 0]
    weights = metric.rows_to_x(v[None])[0]
    through = 3.0 * (noise @ weights).square().mean()
    assert v.square().sum().item() == pytest.approx(through.item(), rel=0.01)  # but for the floor
    expected = (features - features.mean(0)) @ weights
    assert torch.allclose(metric.to_z(features) @ v, expected, atol=1e-4)


def test_fit_finds_the_preferred_direction_and_avoids_the_noisy_one() -> None:
    chosen, rejected = random(400, 8), random(400, 8, seed=1)
    chosen[:, 0] += 1.0
    chosen[:, 1] += 1.0  # as telling as the first, but rounding moves it
    noise = 1e-3 * random(300, 8, seed=2)
    noise[:, 1] += 2.0 * random(300, 1, seed=3)[:, 0]
    metric = NoiseMetric.measure(torch.cat((chosen, rejected)), [(1.0, noise)])
    weights = metric.rows_to_x(fit_linear(metric.to_z(chosen), metric.to_z(rejected))[None])[0]
    assert weights[0] > 0.2
    assert weights[1].abs() < 0.2 * weights[0]


def test_merged_head_scores_as_the_mean_of_its_networks() -> None:
    chosen, rejected = random(200, WIDTH) + 0.1, random(200, WIDTH, seed=1)
    features = torch.cat((chosen, rejected)) + 3.0
    metric = NoiseMetric.measure(features, [(1.0, random(300, WIDTH, seed=2))])
    z_chosen, z_rejected = metric.to_z(chosen + 3.0), metric.to_z(rejected + 3.0)
    network = fit_network(z_chosen, z_rejected, fit_linear(z_chosen, z_rejected), seed=0)
    scores = head_scores(merge_networks([network], metric, features), features)
    with torch.no_grad():
        expected = SCORE_SCALE * network.score(metric.to_z(features))
    expected -= expected.mean()
    assert scores.mean().abs() < 0.01 * scores.std()
    assert (scores - expected).abs().max() < 0.02 * scores.std()  # bf16 weights


def test_stochastic_rounding_is_unbiased_and_within_one_step() -> None:
    values = torch.full((20_000,), 1.0 + 0.3 * 2**-7)
    rounded = stochastic_round(values, torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.double().mean().item() == pytest.approx(values[0].item(), abs=2e-4)


def test_weight_noise_has_the_documented_size() -> None:
    weight, generator = random(8, 128), torch.Generator().manual_seed(0)
    moved = (quantization_step_noise(weight, generator, 64) - weight).abs().unflatten(1, (-1, 64))
    step = weight.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True) / 8
    assert (moved <= step / 2 + 1e-6).all() and (moved > 0.4 * step).any()
    relative = two_percent_noise(weight, generator) / weight - 1
    assert relative.std().item() == pytest.approx(0.02, rel=0.1)


def test_store_computes_only_what_is_missing_and_as_the_scorer_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    scorer = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float32")
    texts = {"a": "one", "b": "another, longer one"}
    rendered = {key: scorer.renderer.render(conversation(text)) for key, text in texts.items()}
    made: list[int] = []

    def backbone() -> train.Backbone:
        made.append(1)
        return train.Backbone(scorer.checkpoint, FLOAT32)

    store = FeatureStore(tmp_path / "features.safetensors")
    store.add("exact", rendered, backbone)
    again = FeatureStore(store.path)
    again.add("exact", rendered, backbone)
    assert len(made) == 1 and again.keys("exact") == ["a", "b"]
    scores = scorer.head.score(again.rows("exact", ["a", "b"]))
    assert torch.allclose(scores, scorer.score([conversation(t) for t in texts.values()]), atol=1e-5)


def test_pairs_of_one_prompt_fall_on_one_side_of_the_split(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", count=200)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    path.write_text("\n".join(map(json.dumps, rows + swapped)))
    pairs = train.read_pairs(path, max_characters=4000)
    held = [train.is_held_out(pair) for pair in pairs]
    assert held[:200] == held[200:]
    assert 0.08 < sum(held) / len(held) < 0.30
    assert train.read_pairs(path, max_characters=5) == []


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
