"""Metrics in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.api.service import Service

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
_CONVERSATIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (64, 256, 1024, 4096, 16384, 65536, 262144)


class PrometheusMetrics:
    """The metrics of one application, in a registry of its own so that several can run in one process."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        self.registry.register(_ServiceCollector(service))
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "worldpm_requests", "Requests answered.", ("endpoint", "status"), registry=self.registry
        )
        self._seconds = self._histogram(
            "request_seconds", "Seconds from a request to its response.", _SECONDS, "endpoint"
        )
        self._batch_rows = self._histogram("batch_conversations", "Conversations per batch.", _CONVERSATIONS)
        self._batch_tokens = self._histogram("batch_tokens", "Tokens per batch.", _TOKENS)
        self._batch_seconds = self._histogram("batch_seconds", "Seconds to score a batch.", _SECONDS)
        service.batcher.on_batch = self.record_batch

    def record_request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def record_batch(self, conversations: int, tokens: int, seconds: float) -> None:
        """Count a scored batch."""
        self._batch_rows.observe(conversations)
        self._batch_tokens.observe(tokens)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"worldpm_{name}", help_text, labels, buckets=buckets, registry=self.registry)


class _ServiceCollector(Collector):
    """Reads the counters of the service and its models when the metrics are requested."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        batcher = self._service.batcher
        yield GaugeMetricFamily("worldpm_ready", "Whether all models are loaded.", value=int(self._service.ready))
        yield GaugeMetricFamily("worldpm_queue_requests", "Requests in the queue.", value=batcher.waiting_requests)
        yield GaugeMetricFamily("worldpm_queue_tokens", "Tokens in the queue.", value=batcher.waiting_tokens)
        for name, help_text, attribute in (
            ("worldpm_conversations", "Conversations scored.", "conversations"),
            ("worldpm_tokens", "Tokens scored.", "tokens"),
            ("worldpm_busy_seconds", "Seconds spent scoring.", "busy_seconds"),
        ):
            family = CounterMetricFamily(name, help_text, labels=("model",))
            for model in list(self._service.models.values()):
                family.add_metric((model.name,), getattr(model, attribute))
            yield family
