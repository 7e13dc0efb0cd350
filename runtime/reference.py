"""Scores of the unquantized model, kept with a packed checkpoint so that nobody needs that model again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from runtime.errors import CheckpointError
from runtime.files import write_whole

SCHEMA = 1
FILE_NAME = "reference_scores.json"


@dataclass
class ReferenceScores:
    """Reference scores by rendered tokens.

    Attributes:
        model: name of the unquantized checkpoint.
        fingerprint: its fingerprint.
        dtype: how it was computed, such as `bfloat16 weights, float32 arithmetic`.
        scores: score by `Rendered.key`.
    """

    model: str
    fingerprint: str
    dtype: str
    scores: dict[str, float] = field(default_factory=dict)

    def save(self, directory: Path) -> Path:
        """Write `reference_scores.json` into a checkpoint directory."""
        path = directory / FILE_NAME
        write_whole(path, json.dumps({"schema": SCHEMA, **vars(self)}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, directory: Path) -> ReferenceScores:
        """Read a checkpoint directory's reference scores.

        Raises:
            CheckpointError: there are none, or they are damaged.
        """
        path = directory / FILE_NAME
        try:
            content = json.loads(path.read_text())
            if content.pop("schema") != SCHEMA:
                raise ValueError(f"schema {SCHEMA} was expected")
            stored = cls(**content)
            stored.scores = {key: float(score) for key, score in stored.scores.items()}
            return stored
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}; quantize again, or remove it and name a --reference."
            ) from error
