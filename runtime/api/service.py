"""The models that are served, and how far loading them is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

from runtime.api.batcher import QUEUE_TOKENS, Batcher, count_tokens
from runtime.chat import Rendered
from runtime.errors import KitError
from runtime.figures import margins
from runtime.scored_pair import scores_of
from runtime.scorer import Scorer
from runtime.variant import Variant


class ServedModel:
    """A loaded variant under the name that requests call it by.

    Attributes:
        name: unique in its service.
        conversations: scored since the start.
        tokens: scored since the start; what conversations share is counted for each.
        busy_seconds: spent on them.
        batch_tokens: that one call should bring.
        error_margin: how far a margin is from the unquantized model's, root mean square over the pairs of the parity
            report, in units of the score; None without a report.
    """

    def __init__(self, name: str, variant: Variant, scorer: Scorer, batcher: Batcher):
        self.name = name
        self.variant = variant
        self.scorer = scorer
        self.conversations = 0
        self.tokens = 0
        self.busy_seconds = 0.0
        self.batch_tokens = scorer.plan.window_tokens
        self.error_margin = _error_margin(variant)
        self._batcher = batcher

    def submit(self, rendered: Sequence[Rendered]) -> Future[list[float]]:
        """Scores, one a conversation, when their turn has come. Cancelling the future frees its place in the queue.

        The future raises NonFiniteError for a conversation whose score is not finite.

        Raises:
            Busy: the queue is full, or closed.
        """
        return self._batcher.submit(self, rendered)

    def score(self, rendered: Sequence[Rendered]) -> list[float]:
        """Score at once. For the batcher's thread alone: everyone else submits.

        Raises:
            NonFiniteError: as `Scorer.score_rendered`.
        """
        start = time.perf_counter()
        try:
            return self.scorer.score_rendered(rendered).tolist()
        finally:
            self.busy_seconds += time.perf_counter() - start
            self.conversations += len(rendered)
            self.tokens += count_tokens(rendered)


class Service:
    """All models of one process; they share one queue and one thread.

    Attributes:
        models: in order of loading; the first is the default.
        ready: whether all that was asked for is loaded.
        status: one line for people while it is not.
        failure: why loading ended, if it did.
    """

    def __init__(self, queue_tokens: int = QUEUE_TOKENS):
        """`queue_tokens` may wait to be scored."""
        self.batcher = Batcher(queue_tokens)
        self.models: dict[str, ServedModel] = {}
        self.ready = False
        self.status = "starting"
        self.failure: str | None = None

    def add(self, variant: Variant, scorer: Scorer) -> ServedModel:
        """Serve a loaded variant under its label."""
        model = ServedModel(variant.label, variant, scorer, self.batcher)
        self.models[model.name] = model
        return model

    def get(self, name: str | None) -> ServedModel:
        """The model of that name, or without one the default.

        Raises:
            KitError: there is none; the message lists those there are.
        """
        if name is None and self.models:
            return next(iter(self.models.values()))
        if name not in self.models:
            names = ", ".join(self.models) or "none yet"
            raise KitError(f"model is {name!r}, which is not served here; there is: {names}.")
        return self.models[name]

    def close(self) -> None:
        """Take no more requests, and return when those that were taken are answered."""
        self.batcher.close()


def _error_margin(variant: Variant) -> float | None:
    """Root mean square of (margin here - reference margin) over the report's pairs, in units of the score."""
    if variant.report is None:
        return None
    reference, here = (scores_of(variant.report.scores, run) for run in ("reference", "quantized"))
    if reference is None or here is None:
        return None
    moved = margins(here) - margins(reference)
    return float((moved**2).mean() ** 0.5)
