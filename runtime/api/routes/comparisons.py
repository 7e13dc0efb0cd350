"""`/v1/comparisons`: compare two responses to a prompt."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from runtime.api.errors import ERROR_RESPONSES
from runtime.api.schema import PROMPT, RESPONSES, ModelName, NativeRequest, RequestMessage, example
from runtime.api.scoring import RequestConversation, RequestScorerDep, ScoringResult
from runtime.conversations.conversation import ChatMessage
from runtime.scorer import probability_preferred

router = APIRouter(tags=["worldpm-kit"], responses=ERROR_RESPONSES)

Prompt = Annotated[
    str | Annotated[list[RequestMessage], Field(min_length=1)],
    Field(description="The user's message, or all turns before the response."),
]


class Pair(NativeRequest):
    """Two responses to one prompt."""

    prompt: Prompt
    response_a: str
    response_b: str

    def turns(self) -> list[ChatMessage]:
        """Return the prompt as turns."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [message.to_message() for message in self.prompt]


class ComparisonsRequest(NativeRequest):
    """One pair, or several in `pairs`."""

    model_config = example({"prompt": PROMPT, "response_a": RESPONSES[0], "response_b": RESPONSES[1]})

    prompt: Prompt | None = None
    response_a: str | None = None
    response_b: str | None = None
    pairs: Annotated[list[Pair], Field(min_length=1)] | None = None
    model: ModelName = None
    truncate: bool | None = False

    @model_validator(mode="after")
    def _one_or_several(self) -> ComparisonsRequest:
        single = (self.prompt, self.response_a, self.response_b)
        if (self.pairs is None) != all(each is not None for each in single) or (
            self.pairs is not None and any(each is not None for each in single)
        ):
            raise ValueError("send either prompt, response_a and response_b, or pairs")
        return self

    def all_pairs(self) -> list[tuple[str, Pair]]:
        """Return each pair with the prefix of its fields' names, such as `pairs[0].`."""
        if self.pairs is not None:
            return [(f"pairs[{row}].", pair) for row, pair in enumerate(self.pairs)]
        assert self.prompt is not None and self.response_a is not None and self.response_b is not None
        return [("", Pair(prompt=self.prompt, response_a=self.response_a, response_b=self.response_b))]


class ComparisonResult(BaseModel):
    """Comparison of one pair."""

    scores: Annotated[list[float], Field(description="Scores of A and B.", min_length=2, max_length=2)]
    margin: Annotated[float, Field(description="Score of A minus score of B.")]
    probability_a: Annotated[float, Field(description="Probability that A is preferred: sigmoid(margin).")]
    preferred: Annotated[Literal["a", "b"] | None, Field(description="null if both scores are equal.")]
    too_close: Annotated[bool, Field(description="Whether |margin| <= error_margin.")]
    tokens: Annotated[list[int], Field(description="Number of tokens of the conversations with A and B.")]
    warnings: list[str]


class ComparisonsAnswer(BaseModel):
    """One entry per pair, in the request's order."""

    model: str
    error_margin: Annotated[
        float | None,
        Field(
            description="RMS difference between margins of this model and of the unquantized model, over the pairs of "
            "the parity report; null without a report."
        ),
    ]
    comparisons: list[ComparisonResult]


@router.post("/v1/comparisons", summary="Compare two responses")
async def compare_responses(body: ComparisonsRequest, scorer: RequestScorerDep) -> ComparisonsAnswer:
    """Scores of two responses to a prompt and which one is preferred, for one pair or several."""
    conversations = [
        RequestConversation(f"{field}{name}", [*pair.turns(), {"role": "assistant", "content": response}])
        for field, pair in body.all_pairs()
        for name, response in (("response_a", pair.response_a), ("response_b", pair.response_b))
    ]
    field = "prompt" if body.pairs is None else "pairs"
    scored = await scorer.score(body.model, conversations, field, truncate=bool(body.truncate))
    return ComparisonsAnswer(
        model=scored.model.name,
        error_margin=scored.model.error_margin,
        comparisons=[_compared(scored, row) for row in range(0, len(conversations), 2)],
    )


def _compared(scored: ScoringResult, row: int) -> ComparisonResult:
    both = slice(row, row + 2)
    score_a, score_b = scored.scores[both]
    margin = score_a - score_b
    return ComparisonResult(
        scores=[score_a, score_b],
        margin=margin,
        probability_a=probability_preferred(margin),
        preferred="a" if margin > 0 else "b" if margin < 0 else None,
        too_close=abs(margin) <= (scored.model.error_margin or 0.0),
        tokens=scored.tokens[both],
        warnings=list(dict.fromkeys(text for each in scored.warnings[both] for text in each)),
    )
