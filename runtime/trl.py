"""A reward function for TRL's trainers: `GRPOTrainer(reward_funcs=reward_function(model="worldpm-72b-gptq-4bit"))`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.chat import Rendered
from runtime.conversation import Message
from runtime.devices import Memory, Names
from runtime.errors import ConversationError, NonFiniteError
from runtime.policy_text import read_policy_text
from runtime.scorer import Scorer

RewardFunction = Callable[..., list[float | None]]
"""`(prompts, completions, **columns)`, called by name, one reward a completion; None where there is none."""


def reward_function(
    model: str | Path | Scorer = "demo",
    *,
    devices: Names = "auto",
    memory: Memory | None = None,
    dtype: str = "auto",
    truncate: bool = False,
) -> RewardFunction:
    """Load a reward model, and return a function that scores completions with it.

    Prompts and completions are text, where a prompt in the policy's template is parsed back into turns, or messages. A
    completion that cannot be scored, such as a blank one or one after a tool's turn, gets None, and a warning says why.

    Args:
        model: as `Scorer.from_pretrained` takes it, or a scorer that is loaded already.
        devices: `auto` takes what it finds; name one that the policy leaves free.
        memory, dtype: as `Scorer.from_pretrained` takes them.
        truncate: drop whole oldest turns of a conversation that is too long, rather than give it None.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        PlanError: as `Scorer.from_pretrained`.
    """
    if isinstance(model, Scorer):
        scorer = model
    else:
        scorer = Scorer.from_pretrained(model, devices=devices, memory=memory, dtype=dtype)

    def worldpm_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        rendered: dict[int, Rendered] = {}
        faults: list[str] = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            where = f"completions[{row}]"
            try:
                turns = _conversation(prompt, completion, where)
                rendered[row] = scorer.renderer.render(turns, truncate=truncate, where=where)
            except ConversationError as fault:
                faults.append(str(fault))
        rewards = _rewards(scorer, rendered, faults)
        if faults:
            count = f"{len(faults)} of {len(completions)} completions"
            warnings.warn(f"{count} cannot be scored; the first: {faults[0]}", RuntimeWarning, stacklevel=2)
        return [rewards.get(row) for row in range(len(completions))]

    return worldpm_reward


def _rewards(scorer: Scorer, rendered: dict[int, Rendered], faults: list[str]) -> dict[int, float]:
    """By row; without those whose score is not finite, which are found by scoring each alone."""
    try:
        return dict(zip(rendered, scorer.scores(list(rendered.values())), strict=True))
    except NonFiniteError as fault:
        if len(rendered) == 1:
            faults.append(f"completions[{next(iter(rendered))}]: {fault}")
            return {}
    return {row: score for row in rendered for score in _rewards(scorer, {row: rendered[row]}, faults).values()}


def _conversation(prompt: Any, completion: Any, where: str) -> list[Message]:
    """Turns as the trainer gave them, to be checked when they are rendered."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return read_policy_text(prompt + completion, prompt, where)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    every: list[Any] = [*turns, *answer]
    return [{"role": turn.get("role"), "content": _text(turn.get("content"))} for turn in every]


def _text(content: Any) -> Any:
    """Of a content in parts, the text; anything else as it is, for the renderer to refuse."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    return content
