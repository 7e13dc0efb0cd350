"""A reward function for TRL's trainers: `GRPOTrainer(reward_funcs=reward_function(model="worldpm-72b-gptq-4bit"))`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.common.errors import ConversationError, KitError
from runtime.conversations.rendering import RenderedConversation
from runtime.conversations.rows.policy_texts import read_exchange
from runtime.execution.devices import DeviceNames, MemoryLimits
from runtime.scorer import Scorer

RewardFunction = Callable[..., list[float | None]]
"""`(prompts, completions, **columns)`, called with keywords; one reward per completion, None if it cannot be scored."""


def reward_function(
    model: str | Path | Scorer = "demo",
    *,
    devices: DeviceNames = "auto",
    memory: MemoryLimits | None = None,
    dtype: str = "auto",
    truncate: bool = False,
) -> RewardFunction:
    """Load a reward model and return a reward function for TRL.

    Prompts and completions may be messages or text. Text in the policy's chat template is parsed back into messages. A
    completion that cannot be scored, such as a blank one or one after a tool message, gets None and a warning.

    Args:
        model: a source for `Scorer.from_pretrained`, or a loaded scorer.
        devices: as in `Scorer.from_pretrained`. `auto` may pick a GPU that the policy uses; name a free one.
        memory, dtype: as in `Scorer.from_pretrained`.
        truncate: drop the oldest whole turns of a conversation that is too long; otherwise it gets None.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigurationError: as `Scorer.from_pretrained`.
    """
    if isinstance(model, Scorer):
        scorer = model
    else:
        scorer = Scorer.from_pretrained(model, devices=devices, memory=memory, dtype=dtype)

    def worldpm_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        rendered: dict[int, RenderedConversation] = {}
        error_messages: list[str] = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            where = f"completions[{row}]"
            try:
                turns = read_exchange(prompt, completion, where)
                rendered[row] = scorer.renderer.render(turns, truncate=truncate, where=where)
            except ConversationError as error:
                error_messages.append(str(error))
        rewards: dict[int, float] = {}
        for row, result in zip(rendered, scorer.score_each(list(rendered.values())), strict=True):
            if isinstance(result, KitError):
                error_messages.append(f"completions[{row}]: {result}")
            else:
                rewards[row] = result
        if error_messages:
            count = f"{len(error_messages)} of {len(completions)} completions"
            warnings.warn(f"{count} cannot be scored; the first: {error_messages[0]}", RuntimeWarning, stacklevel=2)
        return [rewards.get(row) for row in range(len(completions))]

    return worldpm_reward
