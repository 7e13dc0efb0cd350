"""The two streams of a quantizing sweep: what the reference model sees, and what the quantized one does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from runtime.architecture import Architecture
from runtime.batching import pack
from runtime.chat import Rendered
from runtime.linear import Tensors
from runtime.numerics import PLAIN_BFLOAT16, Numerics
from runtime.qwen2 import Block, Rotary, ScoreHead
from runtime.sweep import Stream


class Streams:
    """Hidden states of calibration and parity rows in the reference and in the quantized model.

    A third stream computes the parity rows in plain bf16: the noise floor that users already live with.
    Rows are numbered calibration first, then parity; no batch holds both.
    """

    def __init__(
        self,
        architecture: Architecture,
        numerics: Numerics,
        calibration: Sequence[Rendered],
        parity: Sequence[Rendered],
        *,
        token_budget: int,
        device: torch.device | str = "cpu",
        directory: Path | None = None,
        finished_blocks: int = 0,
    ):
        """`directory` holds the buffers; `finished_blocks` of them were passed by an earlier run."""
        self.architecture = architecture
        self.numerics = numerics
        self.device = device
        calibration_batches = pack(calibration, token_budget)
        parity_batches = pack(parity, token_budget, first_row=len(calibration))
        self.calibration_rows = len(calibration)
        self.calibration_batches = range(len(calibration_batches))
        self.parity_batches = range(len(calibration_batches), len(calibration_batches) + len(parity_batches))
        longest = max(len(row.token_ids) for row in (*calibration, *parity))
        self.rotary = Rotary(architecture, longest, device)

        def stream(name: str, batches: list, dtype: torch.dtype) -> Stream:
            return Stream(
                batches,
                architecture.hidden_size,
                dtype,
                device=device,
                directory=directory if batches else None,
                name=name,
                finished_blocks=finished_blocks,
            )

        everything = calibration_batches + parity_batches
        self.reference = stream("reference", everything, numerics.stream)
        self.quantized = stream("quantized", everything, numerics.stream)
        self.noise_floor = stream("noise-floor", parity_batches, PLAIN_BFLOAT16.stream)

    @property
    def all(self) -> tuple[Stream, Stream, Stream]:
        return self.reference, self.quantized, self.noise_floor

    def embed(self, embedding: torch.Tensor) -> None:
        """Start all streams before the first block."""
        for stream in self.all:
            stream.embed(embedding)

    def block(self, tensors: Tensors, numerics: Numerics | None = None) -> Block:
        """An unquantized block over `tensors`, which it shares."""
        return Block.from_tensors(self.architecture, tensors, self.rotary, numerics or self.numerics)

    def advance_noise_floor(self, tensors: Tensors, index: int) -> None:
        """Push the noise floor through unquantized block `index`."""
        self.noise_floor.advance(self.block(tensors, PLAIN_BFLOAT16), index)

    def hidden_errors(self) -> torch.Tensor:
        """Relative error of the quantized hidden state at each parity row's scored token, after the block."""
        reference = self.reference.at_scored(following=True)[self.calibration_rows :]
        quantized = self.quantized.at_scored(following=True)[self.calibration_rows :]
        return (quantized - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30)

    def sync(self) -> None:
        """Bring what the block wrote to disk."""
        for stream in self.all:
            stream.sync()

    def turn_over(self) -> None:
        """The block is done."""
        for stream in self.all:
            stream.turn_over()

    def features(self, head: ScoreHead) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the head sees of (reference, quantized, noise floor): [rows, H] each, after the last block.

        The noise floor has parity rows only.
        """
        reference, quantized, floor = (head.features(stream.at_scored()) for stream in self.all)
        return reference, quantized, floor
