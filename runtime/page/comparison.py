"""Score two responses to one prompt with every loaded model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.api.service import ServedModel, Service
from runtime.common.errors import ConversationError, KitError
from runtime.conversations.conversation import ChatMessage
from runtime.conversations.rendering import RenderedConversation
from runtime.conversations.rows.context import RowContext
from runtime.conversations.rows.prompts import read_prompt
from runtime.evaluation.scored_pair import Scores
from runtime.page.charts import ComparisonChart, make_comparison_chart
from runtime.page.tokenizing import render_responses
from runtime.scorer import probability_preferred

NAMES = ("A", "B")


@dataclass
class ModelComparison:
    """One model's scores of both responses.

    Attributes:
        rendered: the conversations that end in A and in B.
        scores: of A and B; None if scoring failed, in which case `error` says why.
        reference: the unquantized model's scores of A and B, if known.
        reference_name: `stored`, or the name of the loaded model that gave the reference.
        seconds: time to the answer, including waiting in the queue.
    """

    model: ServedModel
    rendered: list[RenderedConversation] = field(default_factory=list)
    scores: Scores | None = None
    reference: Scores | None = None
    reference_name: str = ""
    seconds: float = 0.0
    error: str = ""

    @property
    def tokens(self) -> list[int]:
        """The number of tokens of each conversation."""
        return [len(each.token_ids) for each in self.rendered]

    @property
    def margin(self) -> float:
        """Score of A minus score of B."""
        assert self.scores is not None
        return self.scores[0] - self.scores[1]

    @property
    def probability_a(self) -> float:
        return probability_preferred(self.margin)

    @property
    def chart(self) -> ComparisonChart:
        assert self.scores is not None
        report = self.model.variant.report
        reference_stats = (report.reference_mean, report.reference_std) if report else None
        return make_comparison_chart(*self.scores, self.model.error_margin, reference_stats)

    @property
    def reference_margin(self) -> float | None:
        return None if self.reference is None else self.reference[0] - self.reference[1]

    @property
    def warnings(self) -> list[str]:
        """The renderer's warnings, prefixed with the response's name unless both share them, and any near tie."""
        common = [text for text in self.rendered[0].warnings if text in self.rendered[1].warnings]
        single = [
            f"{name}: {text}"
            for name, each in zip(NAMES, self.rendered, strict=True)
            for text in each.warnings
            if text not in common
        ]
        near = self.scores and not self.chart.preferred and self.model.error_margin is not None
        return [*common, *single, *(["near tie: the margin is within this variant's parity error"] if near else [])]


def build_prompt_turns(system: str, turns: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The messages before the response, without the system prompt if it is blank.

    A single turn may be a pasted transcript, or messages as JSON; it is read as the `prompt` of a row.

    Raises:
        ConversationError: no user turn has text, some turn is blank, or a pasted conversation cannot be read.
    """
    if not any(turn["content"].strip() for turn in turns if turn["role"] == "user"):
        raise ConversationError("The conversation is empty; write what the user says.")
    blank = next((number for number, turn in enumerate(turns, 1) if not turn["content"].strip()), None)
    if blank is not None:
        raise ConversationError(f"Turn {blank} is empty; write it, or remove it.")
    if len(turns) == 1:
        turns = _read_pasted(turns[0]["content"])
    if not system.strip():
        return list(turns)
    if turns[0]["role"] == "system":
        raise ConversationError("The pasted conversation has a system prompt of its own; keep one of the two.")
    return [{"role": "system", "content": system}, *turns]


def _read_pasted(text: str) -> list[ChatMessage]:
    prompt = read_prompt({"prompt": text}, RowContext())
    if prompt.transcript and prompt.transcript.start:
        raise ConversationError("The pasted conversation ends with a response; move it to the responses.")
    if not any(turn["content"].strip() for turn in prompt.turns if turn["role"] == "user"):
        raise ConversationError("The pasted conversation has no turn of the user; add what the user says.")
    return prompt.turns


async def compare(service: Service, turns: Sequence[ChatMessage], responses: Sequence[str]) -> list[ModelComparison]:
    """Score both responses with every model, submitting to all models at once.

    Raises:
        ConversationError: a response is blank.
    """
    for name, text in zip(NAMES, responses, strict=True):
        if not text.strip():
            raise ConversationError(f"Response {name} is empty; write or paste one.")
    rows = await asyncio.gather(*(_score(model, turns, responses) for model in service.models.values()))
    for row in rows:
        _find_reference(row, rows)
    return list(rows)


async def _score(model: ServedModel, turns: Sequence[ChatMessage], responses: Sequence[str]) -> ModelComparison:
    row = ModelComparison(model)
    start = time.perf_counter()
    try:
        row.rendered = await render_responses(model, turns, responses, NAMES)
        score_a, score_b = await asyncio.wrap_future(model.submit(row.rendered))
        row.scores = (score_a, score_b)
    except KitError as error:
        row.error = str(error)
    row.seconds = time.perf_counter() - start
    return row


def _find_reference(row: ModelComparison, rows: Sequence[ModelComparison]) -> None:
    """Set the reference scores: those stored with the variant, else those of its loaded original model."""
    variant = row.model.variant
    if not row.rendered or variant.checkpoint.quantization is None:
        return
    if stored := variant.stored_scores((row.rendered[0], row.rendered[1])):
        row.reference, row.reference_name = stored, "stored"
        return
    for other in rows:
        checkpoint = other.model.variant.checkpoint
        if checkpoint.quantization is not None or other.scores is None:
            continue
        if variant.stored_reference is None or variant.stored_reference.fingerprint == checkpoint.fingerprint():
            row.reference, row.reference_name = other.scores, other.model.name
            return
