"""What the solver needs of the score's gradients: weights of the tokens and second moments of the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from quantize.gradients.sensitivity import BlockSensitivity
from quantize.solver.output_moment import OutputMoment
from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS
from runtime.common.errors import NonFiniteError
from runtime.common.safetensors_writer import write_safetensors
from runtime.modeling.linear import Tensors


class BlockGradients:
    """Accumulates the statistics of one block over the calibration batches."""

    def __init__(
        self,
        model_config: ModelConfig,
        tokens: int,
        device: torch.device | str,
        sensitivity: BlockSensitivity | None = None,
    ) -> None:
        """
        Args:
            sensitivity: of the block, if bits are to be chosen by it.
        """
        self._sensitivity = sensitivity
        self._squares = torch.zeros(len(BLOCK_LINEAR_GROUPS), tokens, device=device)
        self._moments = {name: OutputMoment(model_config.linear_shape(name)[0], device) for name in BLOCK_LINEARS}

    def add(
        self, tokens: slice, tries: torch.Tensor | None, linear: str, gradients: torch.Tensor, x: torch.Tensor
    ) -> None:
        """Add the gradients [T, N] of one linear's output at a batch's `tokens`, where its input was x [T, K].

        Args:
            tries: as `tries_of_tokens`; only the sensitivity needs it.
        """
        group = next(index for index, names in enumerate(BLOCK_LINEAR_GROUPS) if linear in names)
        self._squares[group, tokens] += self._moments[linear].add(gradients)
        if self._sensitivity and tries is not None:
            self._sensitivity.add(group, linear, gradients, x, tries)

    def check_finite(self, index: int) -> None:
        """Raise NonFiniteError naming block `index` if a gradient was NaN or infinite."""
        if not self._squares.sum().isfinite():
            raise NonFiniteError(
                f"block {index}: a gradient of the scores is not finite; compute with --dtype float32."
            )

    def save(self, path: Path) -> None:
        """Write the statistics; after a crash the file is complete or absent."""
        tensors = {
            f"{group[0]}.squares": row.cpu() for group, row in zip(BLOCK_LINEAR_GROUPS, self._squares, strict=True)
        }
        for name, moment in self._moments.items():
            vectors, diagonal = moment.low_rank()
            tensors |= {f"{name}.vectors": vectors.cpu(), f"{name}.diagonal": diagonal.cpu()}
        if self._sensitivity:
            tensors["errors"] = self._sensitivity.errors()
        write_safetensors(path, tensors)


class GradientStatistics:
    """The statistics of one block, read from a file.

    Attributes:
        tensors: `LINEAR.vectors` and `LINEAR.diagonal`, as `OutputMoment.low_rank`; `LINEAR.squares`, fp32 [T], for the
            first linear of each group: the squared norm of the group's gradients at each calibration token.
    """

    def __init__(self, path: Path, device: torch.device | str) -> None:
        self.tensors: Tensors = load_file(path, device=str(device))

    @property
    def errors(self) -> torch.Tensor:
        """As `BlockSensitivity.errors`; only if it was measured."""
        return self.tensors["errors"]

    def token_weights(self, group: Sequence[str], in_features: int) -> torch.Tensor:
        """Weights [T] of all calibration tokens, in the order of the batches, for the Hessian of `group`."""
        return token_weights(self.tensors[f"{group[0]}.squares"], in_features)

    def output_moment(self, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """V and diagonal of the linear's output moment."""
        return self.tensors[f"{linear}.vectors"], self.tensors[f"{linear}.diagonal"]


def token_weights(squares: torch.Tensor, in_features: int) -> torch.Tensor:
    """Mix equal weights with weights proportional to |g|^2: w = 1 - a + a |g|^2 / mean |g|^2, of mean 1.

    GuidedQuant (Kim et al. 2025, arXiv 2505.07004) takes a = 1. The gradients of a score sit on few tokens, and a
    Hessian of fewer tokens than inputs fits the calibration data alone. So a is the largest share that leaves
    (sum w)^2 / sum w^2, the number of equally weighted tokens with the same variance, at `in_features` or above.

    Args:
        squares: |g|^2, fp32 [T].
    """
    relative = squares / squares.mean().clamp_min(torch.finfo(torch.float32).tiny) - 1
    spread = float(relative.double().square().mean())
    surplus = max(len(squares) / in_features - 1, 0.0)
    share = min(1.0, (surplus / spread) ** 0.5) if spread > 0 and float(squares.max()) > 0 else 0.0
    return relative.mul_(share).add_(1)
