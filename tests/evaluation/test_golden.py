"""Golden scores: which names they apply to, tolerances, and messages."""

from __future__ import annotations

import pytest
import torch

from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.evaluation.golden import (
    GOLDEN_CONVERSATIONS,
    PUBLISHED_SCORES,
    GoldenResult,
    default_tolerance,
    golden_conversations,
    match_name,
)

BASE = "Qwen/WorldPM-72B"
MATH = "Qwen/Qwen2.5-Math-RM-72B"
FAMILY = [BASE, f"{BASE}-HelpSteer2", f"{BASE}-UltraFeedback", f"{BASE}-RLHFLow"]
SCORES = (0.6298332214355469, -1.6425328254699707)


def test_the_example_is_the_model_card_s():
    assert list(PUBLISHED_SCORES) == [*FAMILY, MATH] and PUBLISHED_SCORES[BASE] == SCORES
    assert [[turn["role"] for turn in each] for each in GOLDEN_CONVERSATIONS] == [["system", "user", "assistant"]] * 2
    assert all(
        each[0]["content"] == "" and each[1]["content"] == "Tips for better sleep?" for each in GOLDEN_CONVERSATIONS
    )
    assert torch.tensor(SCORES).double().tolist() == list(SCORES)  # of fp32, exactly


@pytest.mark.parametrize(
    ("original", "allow_suffix", "name"),
    [
        (BASE, False, BASE),
        ("worldpm-72b", False, BASE),
        ("somewhere/WorldPM-72B", False, BASE),
        ("Qwen/WorldPM-72B@refs/pr/4", False, BASE),
        ("demo", False, None),
        ("WorldPM-72B-mine", False, None),
        ("WorldPM-72B-GPTQ-Int4", True, BASE),
        ("WorldPM-72B2", True, None),
        ("Qwen/WorldPM-72B-HelpSteer2", False, f"{BASE}-HelpSteer2"),
        ("WorldPM-72B-HelpSteer2-GPTQ-Int4", True, f"{BASE}-HelpSteer2"),
        ("WorldPM-72B-RLHFLow", True, f"{BASE}-RLHFLow"),
    ],
)
def test_a_model_is_recognised_by_its_name(original, allow_suffix, name):
    assert match_name(original, allow_suffix=allow_suffix) == name


def test_scores_are_published_for_the_base_model_alone():
    assert [name for name in FAMILY if PUBLISHED_SCORES[name]] == [BASE]


@pytest.mark.parametrize(
    ("matmul", "quantization", "tolerance"),
    [
        (torch.float32, None, 1e-3),
        (torch.bfloat16, None, 0.05),
        (torch.bfloat16, QuantizationConfig("gptq", 8), 0.15),
        (torch.float32, QuantizationConfig("nf4", 4), 0.5),
    ],
)
def test_the_tolerance_depends_on_dtype_and_bits(matmul, quantization, tolerance):
    assert default_tolerance(BASE, matmul, quantization) == tolerance


def result(off: float) -> GoldenResult:
    scores = (SCORES[0], SCORES[1] - off)
    return GoldenResult(model="m", name=BASE, published=SCORES, scores=scores, tolerance=0.05)


def test_pass_or_fail_by_the_larger_difference():
    assert result(0.049).met and not result(0.051).met
    assert result(-0.051).difference == pytest.approx(0.051)
    assert "golden scores of Qwen/WorldPM-72B: pass; computed +0.6298 and -1.6425" in result(0).message()
    assert "FAIL" in result(1).message() and "largest difference 1, tolerance 0.05" in result(1).message()


def test_without_published_scores_the_check_passes():
    unknown = GoldenResult(model="demo")
    assert unknown.met and unknown.difference is None
    assert unknown.message().startswith(f"golden scores: none are published for demo, only for {BASE}, {MATH}; ")


def test_the_sibling_has_an_example_of_its_own():
    (conversation,) = golden_conversations(MATH)
    assert [turn["role"] for turn in conversation] == ["system", "user", "assistant"] and conversation[0]["content"]
    assert PUBLISHED_SCORES[MATH] == (3.75,) and golden_conversations(BASE) is GOLDEN_CONVERSATIONS
    assert match_name("models/qwen2.5-math-rm-72b-gptq-4bit", allow_suffix=True) == MATH
    assert default_tolerance(MATH, torch.float32, None) == 0.05  # published from a bf16 run
    off = GoldenResult(model="m", name=MATH, published=(3.75,), scores=(3.5,), tolerance=0.05)
    assert not off.met and "computed +3.5000, published +3.7500; largest difference 0.25" in off.message()
