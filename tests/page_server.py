"""The page over tiny models, served on a port of its own."""

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
from runtime.numerics import FLOAT32
from runtime.page import mount_page
from runtime.scorer import Scorer
from runtime.variant import open_variants
from tests.tiny_job import quantize, write_job_model, write_pairs

BUDGET = 64  # tokens at once, so that a file of a few rows takes several calls


def make_models(place: Path) -> tuple[Path, Path]:
    """A tiny model packed in 4 bits with its report, and the model itself."""
    write_job_model(place / "tiny")
    write_pairs(place / "pairs.jsonl")
    assert quantize(place / "tiny", place / "pairs.jsonl", place / "tiny-gptq-4bit", "--bits", "4") == 0
    return place / "tiny-gptq-4bit", place / "tiny"


def load(service: Service, sources: Sequence[Path]) -> Service:
    """Serve models in fp32 on the CPU."""
    for variant in open_variants([str(source) for source in sources]):
        service.add(variant, Scorer(variant.checkpoint, numerics=FLOAT32, token_budget=BUDGET))
    service.ready = True
    return service


@contextmanager
def serving(service: Service, **arguments: str) -> Iterator[str]:
    """The page's address while it is served."""
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
