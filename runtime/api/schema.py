"""What the bodies of several endpoints have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runtime.conversation import Message as Turn


class ForeignBody(BaseModel):
    """Of a request in somebody else's shape: types are exact, what the kit has no use for is ignored."""

    model_config = ConfigDict(strict=True)


class OwnBody(BaseModel):
    """Of a request in the kit's own shape, where a field that it does not know is a mistake."""

    model_config = ConfigDict(strict=True, extra="forbid")


PROMPT, RESPONSES = "Tips for better sleep?", ["Keep a regular bedtime.", "idk lol"]
"""What examples are about."""
POLICY_PROMPT = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
POLICY_TEXTS = [f"{POLICY_PROMPT}{response}<|im_end|>" for response in RESPONSES]
CONVERSATION = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSES[0]}]


def example(body: dict[str, Any]) -> ConfigDict:
    """Configuration of a request's model, so that the OpenAPI document shows how to ask."""
    return ConfigDict(json_schema_extra={"examples": [body]})


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: str

    def turn(self) -> Turn:
        """As the renderer takes it."""
        return {"role": self.role, "content": self.content}


Messages = Annotated[
    list[Message],
    Field(
        min_length=2,
        description="A conversation that ends in the response to be judged, an assistant turn.",
    ),
]
ModelName = Annotated[str | None, Field(description="One of `/v1/models`; without it, the first.")]
OneOrMore = Annotated[str | Annotated[list[str], Field(min_length=1)], Field()]
"""A text or several."""

RawScores = Annotated[
    Literal[False] | None,
    Field(description="Scores are given as they are; an activation over them is not offered."),
]


class Usage(BaseModel):
    """Tokens, as other servers count them."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0

    @classmethod
    def of(cls, tokens: int) -> Usage:
        """All of them were read, none written."""
        return cls(prompt_tokens=tokens, total_tokens=tokens)


def as_list(texts: str | list[str]) -> list[str]:
    """One text as a list of one."""
    return [texts] if isinstance(texts, str) else texts
