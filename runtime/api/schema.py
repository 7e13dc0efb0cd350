"""Request fields and response parts that several endpoints share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runtime.conversations.conversation import ChatMessage

Unavailable = Annotated[
    Literal[False] | None,
    Field(description="Must be false, null or absent: this would change the scores, and is not available."),
]


class CompatRequest(BaseModel):
    """Base of requests in another server's format: strict types; unknown fields that change no score are ignored."""

    model_config = ConfigDict(strict=True)

    use_activation: Unavailable = None
    activation: Unavailable = None
    softmax: Unavailable = None
    normalize: Unavailable = None
    truncate_prompt_tokens: Unavailable = None
    chat_template: Unavailable = None
    max_tokens_per_doc: Unavailable = None


class NativeRequest(BaseModel):
    """Base of requests in the kit's own format: strict types, unknown fields are an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


PROMPT, RESPONSES = "Tips for better sleep?", ["Keep a regular bedtime.", "idk lol"]
"""Texts of the examples in the OpenAPI document."""
POLICY_PROMPT = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
POLICY_TEXTS = [f"{POLICY_PROMPT}{response}<|im_end|>" for response in RESPONSES]
CONVERSATION = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSES[0]}]


def example(body: dict[str, Any]) -> ConfigDict:
    """Pydantic configuration that adds an example request to the OpenAPI document."""
    return ConfigDict(json_schema_extra={"examples": [body]})


class RequestMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: str

    def to_message(self) -> ChatMessage:
        """Return the turn as the renderer takes it."""
        return {"role": self.role, "content": self.content}


Messages = Annotated[
    list[RequestMessage],
    Field(
        min_length=2,
        description="A conversation; its last turn, by the assistant, is the response to score.",
    ),
]
ModelName = Annotated[str | None, Field(description="An id of `/v1/models`; default: the first.")]
OneOrMore = Annotated[str | Annotated[list[str], Field(min_length=1)], Field()]
"""One text or a list of texts."""

TextsOrTokenIds = Annotated[
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[int], Field(min_length=1)]
    | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1)],
    Field(
        description="Conversations as text in a known chat template, or as token ids, which are scored as they are and "
        "must end with the scored token."
    ),
]
"""One conversation or a list of them, each a text or token ids."""


class Usage(BaseModel):
    """Token counts as in OpenAI's API."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0

    @classmethod
    def of(cls, tokens: int) -> Usage:
        """Usage of `tokens` prompt tokens and no completion tokens."""
        return cls(prompt_tokens=tokens, total_tokens=tokens)


def as_list(texts: str | list[str]) -> list[str]:
    """Return a single text as a list."""
    return [texts] if isinstance(texts, str) else texts
