"""`/get_reward`: the endpoint for OpenRLHF's `--reward.remote_url`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field, model_validator

from runtime.api.errors import ERROR_RESPONSES
from runtime.api.schema import POLICY_PROMPT, POLICY_TEXTS, CompatRequest, OneOrMore, as_list, example
from runtime.api.scoring import RequestConversation, RequestScorerDep, read_texts

router = APIRouter(tags=["OpenRLHF"], responses=ERROR_RESPONSES)


class RewardRequest(CompatRequest):
    """Samples of a policy, as text in its chat template."""

    model_config = example({"query": POLICY_TEXTS, "prompts": [POLICY_PROMPT] * 2, "labels": ["", ""]})

    query: Annotated[OneOrMore, Field(description="Prompt and response, with special tokens.")]
    prompts: Annotated[
        OneOrMore | None,
        Field(description="The prompt part of each query. The rest of the query is the response."),
    ] = None
    labels: Annotated[Any, Field(description="Ignored.")] = None

    @model_validator(mode="after")
    def _as_many_prompts(self) -> RewardRequest:
        if self.prompts is not None and len(as_list(self.prompts)) != len(as_list(self.query)):
            counts = f"query has {len(as_list(self.query))} entries and prompts has {len(as_list(self.prompts))}"
            raise ValueError(f"{counts}; send one prompt per query")
        return self


class RewardAnswer(BaseModel):
    """One entry per sample, in the request's order."""

    rewards: list[float]
    scores: list[float]
    extra_logs: Annotated[
        dict[str, list[float]],
        Field(description="`tokens`: tokens per sample. `warnings`: number of warnings per sample."),
    ]


@router.post("/get_reward", summary="Rewards for OpenRLHF")
async def get_reward(
    body: RewardRequest,
    scorer: RequestScorerDep,
    model: Annotated[str | None, Query(description="An id of `/v1/models`; default: the first.")] = None,
    system: Annotated[
        Literal["keep", "drop"],
        Query(description="`drop` removes system turns, which many chat templates add by default."),
    ] = "keep",
    blank: Annotated[
        float | None,
        Query(allow_inf_nan=False, description="Reward of a blank response; without it, a blank response is an error."),
    ] = None,
) -> RewardAnswer:
    """Each query is parsed into turns (ChatML, other known templates, or plain `User:` and `Assistant:`) and rendered
    in the reward model's template.
    """
    queries = as_list(body.query)
    scorer.check_count(len(queries), "query")
    prompts = None if body.prompts is None else as_list(body.prompts)
    samples = read_texts(queries, "query", prompts, keep_system=system == "keep")
    scored_rows = [row for row, each in enumerate(samples) if blank is None or not _is_blank(each)]
    scored = await scorer.score(model, [samples[row] for row in scored_rows], "query")
    rewards = [0.0 if blank is None else blank] * len(samples)
    logs = {"tokens": [0.0] * len(samples), "warnings": [0.0] * len(samples)}
    for row, score, rendered in zip(scored_rows, scored.scores, scored.rendered, strict=True):
        rewards[row] = score
        logs["tokens"][row] = len(rendered.token_ids)
        logs["warnings"][row] = len(rendered.warnings)
    return RewardAnswer(rewards=rewards, scores=rewards, extra_logs=logs)


def _is_blank(sample: RequestConversation) -> bool:
    """Whether the response is blank. A sample without turns is not blank, so that scoring it raises an error."""
    return bool(sample.messages) and not sample.messages[-1]["content"].strip()
