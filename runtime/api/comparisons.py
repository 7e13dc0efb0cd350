"""`/v1/comparisons`: two responses to a prompt, and which is preferred."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from runtime.api.faults import FAULTS
from runtime.api.schema import PROMPT, RESPONSES, Message, ModelName, OwnBody, example
from runtime.api.scoring import Asked, Conversation, Scored
from runtime.conversation import Message as Turn
from runtime.preference import probability_preferred

router = APIRouter(tags=["worldpm-kit"], responses=FAULTS)

Prompt = Annotated[
    str | Annotated[list[Message], Field(min_length=1)],
    Field(
        description="A question, or the turns before the response.",
    ),
]


class Pair(OwnBody):
    """Two responses to one prompt."""

    prompt: Prompt
    response_a: str
    response_b: str

    def turns(self) -> list[Turn]:
        """The prompt as turns."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [message.turn() for message in self.prompt]


class ComparisonsRequest(OwnBody):
    """A pair, or several under `pairs`."""

    model_config = example({"prompt": PROMPT, "response_a": RESPONSES[0], "response_b": RESPONSES[1]})

    prompt: Prompt | None = None
    response_a: str | None = None
    response_b: str | None = None
    pairs: Annotated[list[Pair], Field(min_length=1)] | None = None
    model: ModelName = None
    truncate: bool = False

    @model_validator(mode="after")
    def _one_or_several(self) -> ComparisonsRequest:
        single = (self.prompt, self.response_a, self.response_b)
        if (self.pairs is None) != all(each is not None for each in single) or (
            self.pairs is not None and any(each is not None for each in single)
        ):
            raise ValueError("prompt, response_a and response_b were expected, or pairs of them")
        return self

    def all_pairs(self) -> list[tuple[str, Pair]]:
        """What the request calls each pair, and the pair."""
        if self.pairs is not None:
            return [(f"pairs[{row}].", pair) for row, pair in enumerate(self.pairs)]
        assert self.prompt is not None and self.response_a is not None and self.response_b is not None
        return [("", Pair(prompt=self.prompt, response_a=self.response_a, response_b=self.response_b))]


class Compared(BaseModel):
    """One pair's outcome."""

    scores: Annotated[list[float], Field(description="Of A and B.", min_length=2, max_length=2)]
    margin: Annotated[float, Field(description="Score of A less score of B.")]
    probability_a: Annotated[float, Field(description="That A is preferred: the sigmoid of the margin.")]
    preferred: Annotated[Literal["a", "b"] | None, Field(description="null where both scores are equal.")]
    too_close: Annotated[bool, Field(description="Whether the margin is within the model's error.")]
    tokens: Annotated[list[int], Field(description="Of A's and B's conversation.")]
    warnings: list[str]


class ComparisonsAnswer(BaseModel):
    """One entry a pair, in their order."""

    model: str
    error_margin: Annotated[
        float | None,
        Field(
            description="How far margins of this model are from the unquantized one's: root mean square over the pairs "
            "of its parity report; null without one."
        ),
    ]
    comparisons: list[Compared]


@router.post("/v1/comparisons", summary="Compare two responses")
async def compare_responses(body: ComparisonsRequest, asked: Asked) -> ComparisonsAnswer:
    """Scores of two responses to a prompt, and which is preferred, for one pair or several."""
    conversations = [
        Conversation(f"{field}{name}", [*pair.turns(), {"role": "assistant", "content": response}])
        for field, pair in body.all_pairs()
        for name, response in (("response_a", pair.response_a), ("response_b", pair.response_b))
    ]
    field = "prompt" if body.pairs is None else "pairs"
    scored = await asked.score(body.model, conversations, field, truncate=body.truncate)
    return ComparisonsAnswer(
        model=scored.model.name,
        error_margin=scored.model.error_margin,
        comparisons=[_compared(scored, row) for row in range(0, len(conversations), 2)],
    )


def _compared(scored: Scored, row: int) -> Compared:
    both = slice(row, row + 2)
    score_a, score_b = scored.scores[both]
    margin = score_a - score_b
    return Compared(
        scores=[score_a, score_b],
        margin=margin,
        probability_a=probability_preferred(margin),
        preferred="a" if margin > 0 else "b" if margin < 0 else None,
        too_close=abs(margin) <= (scored.model.error_margin or 0.0),
        tokens=scored.tokens[both],
        warnings=list(dict.fromkeys(text for each in scored.warnings[both] for text in each)),
    )
