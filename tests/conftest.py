from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole random bf16 checkpoint of two layers. Shared by all tests: copy it before changing it."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
