"""`/get_reward`: what OpenRLHF's `--reward.remote_url` asks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field, model_validator

from runtime.api.faults import FAULTS
from runtime.api.schema import POLICY_PROMPT, POLICY_TEXTS, ForeignBody, OneOrMore, as_list, example
from runtime.api.scoring import Asked, Conversation
from runtime.api.texts import read_texts

router = APIRouter(tags=["OpenRLHF"], responses=FAULTS)


class RewardRequest(ForeignBody):
    """Samples of a policy."""

    model_config = example({"query": POLICY_TEXTS, "prompts": [POLICY_PROMPT] * 2, "labels": ["", ""]})

    query: Annotated[OneOrMore, Field(description="Prompt and response, special tokens and all.")]
    prompts: Annotated[
        OneOrMore | None,
        Field(description="What of each query was given to the policy. All that follows it is the response."),
    ] = None
    labels: Annotated[Any, Field(description="Not looked at.")] = None

    @model_validator(mode="after")
    def _as_many_prompts(self) -> RewardRequest:
        if self.prompts is not None and len(as_list(self.prompts)) != len(as_list(self.query)):
            counts = f"{len(as_list(self.query))} and {len(as_list(self.prompts))}"
            raise ValueError(f"query and prompts have {counts} entries; as many were expected")
        return self


class RewardAnswer(BaseModel):
    """One entry a sample, in their order."""

    rewards: list[float]
    scores: list[float]
    extra_logs: Annotated[
        dict[str, list[float]],
        Field(description="`tokens` of each rendering, and `warnings`, how many each gave rise to."),
    ]


@router.post("/get_reward", summary="Rewards for OpenRLHF")
async def get_reward(
    body: RewardRequest,
    asked: Asked,
    model: Annotated[str | None, Query(description="One of `/v1/models`; without it, the first.")] = None,
    system: Annotated[
        Literal["keep", "drop"],
        Query(description="`drop` a system turn, as policies' templates add one that no user wrote."),
    ] = "keep",
    blank: Annotated[
        float | None,
        Query(allow_inf_nan=False, description="The reward of a blank response; without it, one is refused."),
    ] = None,
) -> RewardAnswer:
    """Each query is parsed back into turns (ChatML, Llama-3's template, or plain `User:` and `Assistant:`) and rendered
    in the reward model's own template.
    """
    queries = as_list(body.query)
    asked.check_count(len(queries), "query")
    prompts = None if body.prompts is None else as_list(body.prompts)
    samples = read_texts(queries, "query", prompts, keep_system=system == "keep")
    told = [row for row, each in enumerate(samples) if blank is None or not _is_blank(each)]
    scored = await asked.score(model, [samples[row] for row in told], "query")
    rewards = [0.0 if blank is None else blank] * len(samples)
    logs = {"tokens": [0.0] * len(samples), "warnings": [0.0] * len(samples)}
    for row, score, rendered in zip(told, scored.scores, scored.rendered, strict=True):
        rewards[row] = score
        logs["tokens"][row] = len(rendered.token_ids)
        logs["warnings"][row] = len(rendered.warnings)
    return RewardAnswer(rewards=rewards, scores=rewards, extra_logs=logs)


def _is_blank(sample: Conversation) -> bool:
    """Whether its response is; a sample that is left without turns is refused rather than rewarded."""
    return bool(sample.messages) and not sample.messages[-1]["content"].strip()
