"""Two responses to one prompt, scored by every model that is served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.api.service import ServedModel, Service
from runtime.chat import Rendered
from runtime.conversation import Message
from runtime.errors import ConversationError, KitError
from runtime.page.picture import Picture, draw
from runtime.page.rendering import render
from runtime.preference import probability_preferred
from runtime.scored_pair import Scores

NAMES = ("A", "B")


@dataclass
class Row:
    """One model's view of a comparison.

    Attributes:
        scores: of A and B, None where the model could not give them, as `fault` says.
        reference: the original model's scores of them, where they are known.
        seconds: from asking to the answer, waiting included.
        tokens: of A's and B's conversation.
    """

    model: ServedModel
    rendered: list[Rendered] = field(default_factory=list)
    scores: Scores | None = None
    reference: Scores | None = None
    reference_name: str = ""
    seconds: float = 0.0
    fault: str = ""

    @property
    def tokens(self) -> list[int]:
        return [len(each.token_ids) for each in self.rendered]

    @property
    def margin(self) -> float:
        assert self.scores is not None
        return self.scores[0] - self.scores[1]

    @property
    def probability_a(self) -> float:
        return probability_preferred(self.margin)

    @property
    def picture(self) -> Picture:
        """Of this model's scores."""
        assert self.scores is not None
        report = self.model.variant.report
        usual = (report.reference_mean, report.reference_std) if report else None
        return draw(*self.scores, self.model.error_margin, usual)

    @property
    def reference_margin(self) -> float | None:
        return None if self.reference is None else self.reference[0] - self.reference[1]

    @property
    def warnings(self) -> list[str]:
        """What is to be kept in mind, the renderer's remarks and a near tie."""
        common = [text for text in self.rendered[0].warnings if text in self.rendered[1].warnings]
        single = [
            f"{name}: {text}"
            for name, each in zip(NAMES, self.rendered, strict=True)
            for text in each.warnings
            if text not in common
        ]
        near = self.scores and not self.picture.preferred and self.model.error_margin is not None
        return [*common, *single, *(["near tie: the margin is inside this variant's parity error"] if near else [])]


def read_turns(system: str, turns: Sequence[Message]) -> list[Message]:
    """The turns before the response; a blank system prompt is none.

    Raises:
        ConversationError: nobody asks anything.
    """
    if not any(turn["content"].strip() for turn in turns if turn["role"] == "user"):
        raise ConversationError("The conversation is empty; write what the user says.")
    blank = next((number for number, turn in enumerate(turns, 1) if not turn["content"].strip()), None)
    if blank is not None:
        raise ConversationError(f"Turn {blank} is empty; write it, or remove it.")
    return [*([{"role": "system", "content": system}] if system.strip() else []), *turns]


async def compare(service: Service, turns: Sequence[Message], responses: Sequence[str]) -> list[Row]:
    """Score both responses with every model, at the same time as far as the queue lets them.

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


async def _score(model: ServedModel, turns: Sequence[Message], responses: Sequence[str]) -> Row:
    row = Row(model)
    start = time.perf_counter()
    try:
        row.rendered = await render(model, turns, responses, NAMES)
        score_a, score_b = await asyncio.wrap_future(model.submit(row.rendered))
        row.scores = (score_a, score_b)
    except KitError as fault:
        row.fault = str(fault)
    row.seconds = time.perf_counter() - start
    return row


def _find_reference(row: Row, rows: Sequence[Row]) -> None:
    """What is stored beside the variant, else what the model that it was made from has just said."""
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
        if variant.stored is None or variant.stored.fingerprint == checkpoint.fingerprint():
            row.reference, row.reference_name = other.scores, other.model.name
            return
