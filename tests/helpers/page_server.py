"""The page over tiny models, served on a free port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from runtime.api.service import Service
from runtime.evaluation.variant import open_variants
from runtime.modeling.precision import FLOAT32
from runtime.page import mount_page
from runtime.scorer import Scorer
from tests.helpers.tiny_job import quantize, write_job_model, write_pairs

BUDGET = 64  # tokens per batch, so that a file of a few rows takes several batches


def make_models(directory: Path) -> tuple[Path, Path]:
    """Write a tiny model; return its 4-bit variant, with a parity report, and the model itself."""
    write_job_model(directory / "tiny")
    write_pairs(directory / "pairs.jsonl")
    assert quantize(directory / "tiny", directory / "pairs.jsonl", directory / "tiny-gptq-4bit", "--bits", "4") == 0
    return directory / "tiny-gptq-4bit", directory / "tiny"


def load(service: Service, sources: Sequence[Path]) -> Service:
    """Add models in fp32 on the CPU to a service."""
    for variant in open_variants([str(source) for source in sources]):
        service.add(variant, Scorer(variant.checkpoint, precision=FLOAT32, token_budget=BUDGET))
    service.ready = True
    return service


@contextmanager
def serving(service: Service, **arguments: str) -> Iterator[str]:
    """Serve the page in a thread; yield its URL."""
    application = mount_page(FastAPI(), service, **arguments)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(application, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
