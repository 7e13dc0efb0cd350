from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import pytest

from runtime.scorer import Scorer
from runtime.trl import reward_function
from tests.helpers.served import QUESTION, RESPONSES, Gate, chatml, conversation


@pytest.fixture(scope="module")
def scorer(tiny_checkpoint: Path) -> Scorer:
    return Scorer.from_pretrained(tiny_checkpoint, devices="cpu")


def expected(scorer: Scorer, *responses: str) -> list:
    return [pytest.approx(float(scorer.score([conversation(each)])), abs=1e-5) for each in responses]


def as_the_trainer_calls(function, prompts, completions) -> list[float | None]:
    """By name, with every column that `GRPOTrainer` adds."""
    return function(
        prompts=prompts,
        completions=completions,
        completion_ids=[[1, 2]] * len(prompts),
        answer=["42"] * len(prompts),
        trainer_state=object(),
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
    )


def test_messages(scorer: Scorer):
    prompts = [conversation("")[:1]] * 2
    completions = [[{"role": "assistant", "content": each}] for each in RESPONSES[:2]]
    assert as_the_trainer_calls(reward_function(scorer), prompts, completions) == expected(scorer, *RESPONSES[:2])


def test_text_in_the_policy_s_template(scorer: Scorer):
    prompt = chatml("").removesuffix("<|im_end|>")
    rewards = as_the_trainer_calls(reward_function(scorer), [prompt] * 3, [each + "<|im_end|>" for each in RESPONSES])
    assert rewards == expected(scorer, *RESPONSES)


def test_plain_text_and_parts(scorer: Scorer):
    function = reward_function(scorer)
    assert as_the_trainer_calls(function, [QUESTION], [RESPONSES[0]]) == expected(scorer, RESPONSES[0])
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    assert as_the_trainer_calls(function, [parts], [RESPONSES[0]]) == expected(scorer, RESPONSES[0])


def test_what_cannot_be_scored_is_none_and_said(scorer: Scorer):
    turn = {"role": "assistant", "content": RESPONSES[0]}
    calls = {"role": "assistant", "content": None, "tool_calls": []}
    completions = [[turn], [turn | {"content": ""}], [calls], [turn, {"role": "tool", "content": "3"}, turn], [turn]]
    prompts = [conversation("")[:1]] * 4 + [conversation("")[:1] * 3000]
    with pytest.warns(RuntimeWarning, match=r"4 of 5 completions cannot be scored; the first: completions\[1\]"):
        rewards = as_the_trainer_calls(reward_function(scorer), prompts, completions)
    assert rewards == [*expected(scorer, RESPONSES[0]), None, None, None, None]


def test_a_score_that_is_not_finite_is_none(scorer: Scorer):
    bad = len(scorer.renderer.render(conversation("overflows")).token_ids)
    gated = Gate(scorer, bad)
    gated.open.set()
    function = reward_function(as_scorer(gated))
    with pytest.warns(RuntimeWarning, match=r"completions\[1\]: a non-finite score: the score head"):
        rewards = as_the_trainer_calls(function, [QUESTION] * 3, ["a", "overflows", "b"])
    assert rewards == [expected(scorer, "a")[0], None, expected(scorer, "b")[0]]


def as_scorer(gated: Gate) -> Scorer:
    """A scorer whose scores come through the gate."""
    scorer = Scorer.__new__(Scorer)
    scorer.renderer, scorer.score_each = gated.renderer, gated.score_each  # type: ignore[method-assign]
    return scorer


def test_nothing_to_score(scorer: Scorer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_the_trainer_calls(reward_function(scorer), [], []) == []


def test_the_signature_is_the_documented_one(scorer: Scorer, tiny_checkpoint: Path):
    function = reward_function(model=tiny_checkpoint, devices="cpu")
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:2] == ["prompts", "completions"]
    assert [each.kind for each in parameters.values()][-1] is inspect.Parameter.VAR_KEYWORD
    assert function.__name__ == "worldpm_reward" and not inspect.iscoroutinefunction(function)


@pytest.mark.slow
@pytest.mark.parametrize("conversational", [True, False])
def test_trl_s_own_trainer_calls_it(scorer: Scorer, tiny_checkpoint: Path, tmp_path: Path, conversational: bool):
    """Two steps of GRPO on a random policy, where TRL is installed."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    policy = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=320, num_key_value_heads=2, **shape))
    questions = [f"Say {number}." for number in range(4)]
    prompts = [
        [{"role": "user", "content": text}] if conversational else f"User: {text}\nAssistant:" for text in questions
    ]
    rewards: list[float | None] = []
    function = reward_function(scorer)

    def watched(prompts, completions, **columns) -> list[float | None]:
        rewards.extend(function(prompts=prompts, completions=completions, **columns))
        return rewards[-len(prompts) :]

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=watched,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_checkpoint),
    )
    trainer.train()
    assert len(rewards) == 8 and any(reward is not None for reward in rewards)
