from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in child processes: tiny matrices gain nothing from threads

import torch

from runtime.api.service import Service
from tests.helpers.browser import browser
from tests.helpers.served import serve
from tests.helpers.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _no_fsync_and_one_thread() -> Iterator[None]:
    """For speed: tests/common/test_fsync.py records fsync calls."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a table's line on one line."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole random bf16 checkpoint of two layers. Shared by all tests: copy it before changing it."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def damaged(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "damaged")


@pytest.fixture(scope="session")
def page_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model packed in 4 bits with its report, and the model itself."""
    from tests.helpers.page_server import make_models  # here and below, since importing the page takes seconds

    return make_models(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="session")
def page_service(page_models: tuple[Path, Path]) -> Iterator[Service]:
    """Both, served."""
    from tests.helpers.page_server import load

    service = load(Service(), page_models)
    yield service
    service.close()


@pytest.fixture(scope="session")
def page_url(page_service: Service) -> Iterator[str]:
    """The page's address."""
    from tests.helpers.page_server import serving

    with serving(page_service) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for a file's tests: while it is open its driver's event loop is in the way of any other."""
    with browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def service(tiny_checkpoint: Path) -> Iterator[Service]:
    """The tiny checkpoint, served as `tiny`. Shared by all tests: what changes it makes its own."""
    service = serve(tiny_checkpoint)
    yield service
    service.close()
