"""The models of one server process, and the thread that loads them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from runtime.api import json_log
from runtime.api.batcher import QUEUE_TOKENS, Batcher, count_tokens
from runtime.common.errors import KitError
from runtime.conversations.rendering import RenderedConversation
from runtime.demo.variant import DemoVariant
from runtime.evaluation.metrics import margins
from runtime.evaluation.scored_pair import pair_score_array
from runtime.evaluation.variant import Variant, open_variants
from runtime.options import ModelOptions
from runtime.scorer import Scorer, ScoreResult


class ServedModel:
    """A loaded variant, scored through the service's queue.

    Attributes:
        name: the `model` field of requests; unique in the service.
        conversations: conversations scored since the start.
        tokens: tokens scored since the start; a shared prefix counts once per conversation.
        busy_seconds: seconds spent scoring.
        batch_tokens: tokens that one call of `score` should get.
        error_margin: RMS difference between the margins of this model and of the unquantized model over the pairs of
            the parity report, in score units; None without a report.
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

    @property
    def names(self) -> set[str]:
        """What a request may call it, besides `name`: the source as it was given, and its directory."""
        directory = self.variant.checkpoint.directory
        return {self.variant.source, str(directory), str(directory.resolve())}

    def submit(self, rendered: Sequence[RenderedConversation]) -> Future[list[float]]:
        """Queue conversations; the future gives one score per conversation.

        Cancelling the future removes the conversations from the queue. The future raises the error of the
        first conversation without a score.

        Raises:
            ServerBusyError: the queue is full.
            ServerStoppingError: the queue is closed.
        """
        return self._batcher.submit(self, rendered)

    def submit_each(self, rendered: Sequence[RenderedConversation]) -> Future[list[ScoreResult]]:
        """`submit`, but the future gives a result for each conversation and raises nothing."""
        return self._batcher.submit_each(self, rendered)

    def score(self, rendered: Sequence[RenderedConversation]) -> list[ScoreResult]:
        """`Scorer.score_each`, without the queue. Called only by the batcher's thread; other callers use `submit`."""
        start = time.perf_counter()
        try:
            return self.scorer.score_each(rendered)
        finally:
            self.busy_seconds += time.perf_counter() - start
            self.conversations += len(rendered)
            self.tokens += count_tokens(rendered)


class Service:
    """All models of one process, with one queue and one scoring thread.

    Attributes:
        models: by name, in order of loading; the first is the default.
        ready: whether all models are loaded.
        status: progress of loading, as one line of text.
        failure: error message if loading failed, else None.
    """

    def __init__(self, queue_tokens: int = QUEUE_TOKENS):
        """`queue_tokens` limits the tokens that wait in the queue."""
        self.batcher = Batcher(queue_tokens)
        self.models: dict[str, ServedModel] = {}
        self.ready = False
        self.status = "starting"
        self.failure: str | None = None

    def add(self, variant: Variant, scorer: Scorer) -> ServedModel:
        """Add a loaded variant under its label."""
        model = ServedModel(variant.label, variant, scorer, self.batcher)
        self.models[model.name] = model
        return model

    def get(self, name: str | None) -> ServedModel:
        """Return the model called `name`, or the default model for None.

        A model also has the names of its source: the directory or hub id that the server was started with.

        Raises:
            KitError: no such model; the message lists the models that are served.
        """
        if name is None and self.models:
            return next(iter(self.models.values()))
        if name in self.models:
            return self.models[name]
        found = next((model for model in self.models.values() if name in model.names), None)
        if found is None:
            names = ", ".join(self.models) or "none yet"
            raise KitError(f"model is {name!r}, which is not served; models: {names}.")
        return found

    def close(self) -> None:
        """Reject new requests, and return when all accepted requests are answered."""
        self.batcher.close()


def _error_margin(variant: Variant) -> float | None:
    """RMS of (quantized margin - reference margin) over the report's pairs, in score units."""
    if variant.report is None:
        return None
    reference, quantized = (pair_score_array(variant.report.scores, source) for source in ("reference", "quantized"))
    if reference is None or quantized is None:
        return None
    difference = margins(quantized) - margins(reference)
    return float((difference**2).mean() ** 0.5)


class ModelLoader(threading.Thread):
    """Thread that loads models into a service and reports progress in `Service.status`."""

    def __init__(self, service: Service, models: Sequence[str], model_options: ModelOptions):
        """`models` are directories or hub ids; if empty, the demo's 4-bit variant, quantized first if missing."""
        super().__init__(name="loading", daemon=True)
        self._service = service
        self._models = models
        self._model_options = model_options
        self._demo = DemoVariant()

    def run(self) -> None:
        """Load all models; on an error, set `Service.failure` and return, so that /health reports it."""
        try:
            self._load()
        except KitError as error:
            self._service.failure = str(error)
            json_log.write("failed", error=str(error))
        except Exception as error:
            self._service.failure = f"loading failed with {type(error).__name__}; see the server's log."
            json_log.log_error(error)

    def stop(self) -> None:
        """Stop quantizing the demo, if that is running; loading a model is not interrupted."""
        self._demo.stop()

    def _load(self) -> None:
        sources = self._models or [self._quantize_demo()]
        self._set_status(f"reading {', '.join(sources)}")
        variants = open_variants(sources)
        for number, variant in enumerate(variants, 1):
            self._set_status(f"loading {variant.label}, {number} of {len(variants)}")
            scorer = Scorer(variant.checkpoint, self._model_options.plan(variant.checkpoint))
            if scorer.plan.shares[0].device.kind == "cuda":
                scorer.warm_up()
            self._service.add(variant, scorer)
        self._service.ready = True
        self._set_status("ready")
        json_log.write("ready", models=list(self._service.models))

    def _quantize_demo(self) -> str:
        """Quantize the demo unless that was done before; return its directory."""
        if not self._demo.finished:
            self._set_status("quantizing the demo, which takes a few minutes once")
            self._demo.make(self._set_status)
        return str(self._demo.output)

    def _set_status(self, status: str) -> None:
        self._service.status = status
