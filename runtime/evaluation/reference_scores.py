"""reference_scores.json: scores of the unquantized model, stored beside the quantized checkpoint.

With them a comparison does not need the 16-bit model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.model_config import DTYPES
from runtime.common.errors import CheckpointError
from runtime.common.files import write_file_atomically

SCHEMA_VERSION = 1
REFERENCE_SCORES_FILE = "reference_scores.json"


@dataclass
class ReferenceScores:
    """Scores of the unquantized model by conversation.

    Attributes:
        model: name of the unquantized checkpoint.
        fingerprint: fingerprint of that checkpoint.
        dtype: dtypes of the run, such as `bfloat16 weights, float32 arithmetic`.
        scores: score by `RenderedConversation.key`, a hash of the token ids.
    """

    model: str
    fingerprint: str
    dtype: str
    scores: dict[str, float] = field(default_factory=dict)

    def save(self, directory: Path) -> Path:
        """Write reference_scores.json into a checkpoint directory and return its path."""
        path = directory / REFERENCE_SCORES_FILE
        write_file_atomically(path, json.dumps({"schema": SCHEMA_VERSION, **vars(self)}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, directory: Path) -> ReferenceScores:
        """Read reference_scores.json from a checkpoint directory.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        path = directory / REFERENCE_SCORES_FILE
        try:
            content = json.loads(path.read_text())
            if content.pop("schema") != SCHEMA_VERSION:
                raise ValueError(f"schema {SCHEMA_VERSION} was expected")
            stored = cls(**content)
            stored.scores = {key: float(score) for key, score in stored.scores.items()}
            if not all(isinstance(name, str) for name in (stored.model, stored.fingerprint, stored.dtype)):
                raise ValueError("model, fingerprint and dtype must be text")
            if not all(map(math.isfinite, stored.scores.values())):
                raise ValueError("a score is not finite")
            return stored
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}; quantize again, or remove the file and pass --reference."
            ) from error


def describe_weights(checkpoint: Checkpoint) -> str:
    """The stored weights, such as `bfloat16 weights` or `gptq weights of 4 bits`."""
    quantization = checkpoint.quantization
    if quantization is not None:
        bits = quantization.nominal_bits(checkpoint.model_config)
        return f"{quantization.method} weights of {bits:g} bits"
    names = {dtype: name for name, dtype in DTYPES.items()}
    return f"{names[checkpoint.model_config.dtype]} weights"


def describe_precision(checkpoint: Checkpoint, arithmetic: str) -> str:
    """Weights and matmul dtype of a run, such as `bfloat16 weights, float32 arithmetic`."""
    return f"{describe_weights(checkpoint)}, {arithmetic} arithmetic"
