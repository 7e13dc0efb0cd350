"""Quantize and pack the linears of one block, and record their loss and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from quantize.gradients.statistics import GradientStatistics
from quantize.job.recipe import Recipe
from quantize.solver.correction import TargetCorrection
from quantize.solver.data_free import quantize_int8, quantize_nf4, round_to_nearest
from quantize.solver.factor import CholeskyFactor, factorise
from quantize.solver.gptq import solve
from quantize.solver.hessian import Hessian
from quantize.solver.nf4_grid import pack_nf4
from quantize.solver.output_factor import OutputFactor
from quantize.solver.settings import GPTQSettings
from quantize.solver.solved_linear import SolvedLinear
from runtime.checkpoints.model_config import BLOCK_LINEARS, BLOCK_NORMS
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.common.process_memory import release_freed_memory
from runtime.kernels.reference import pack_gptq
from runtime.kernels.workspace import Workspace
from runtime.modeling.linear import Tensors, make_linear
from runtime.modeling.qwen2 import Block

ProgressCallback = Callable[[str, float | None], None]
"""Called with each linear before its solve, and the previous relative loss."""


@dataclass
class LinearMetrics:
    """Loss and time of one quantized linear.

    Attributes:
        loss: mean squared error of the output over calibration tokens; without calibration, of the weights.
        relative_loss: `loss` divided by the mean squared output (or weight).
        sqnr_db: signal-to-quantization-noise ratio in decibels; None if the loss is 0.
        damp: mean of the values added to the Hessian's diagonal; 0 without calibration.
        dead_columns: input features that were 0 on all calibration tokens.
    """

    loss: float
    relative_loss: float
    sqnr_db: float | None
    damp: float = 0.0
    dead_columns: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class PackedBlock:
    """The tensors of a packed block, named without `model.layers.N.`, and its metrics.

    Attributes:
        linears: by linear name.
        seconds: by stage.
    """

    tensors: Tensors
    linears: dict[str, LinearMetrics]
    seconds: dict[str, float]

    def metrics(self) -> dict[str, Any]:
        """The entries of the job's log."""
        return {"linears": {name: asdict(each) for name, each in self.linears.items()}, "seconds": self.seconds}


class BlockQuantizer:
    """Replaces the linears of `block` by packed ones.

    With calibration, for each group of linears that share an input: `start_group`, add all tokens to the returned
    statistics, `quantize_group`. Otherwise `quantize_without_data` for each linear.

    Attributes:
        seconds: by stage.
    """

    def __init__(
        self,
        block: Block,
        recipe: Recipe,
        quantizations: Mapping[str, QuantizationConfig],
        index: int,
        device: torch.device | str,
        on_linear: ProgressCallback,
    ):
        """
        Args:
            quantizations: how each linear is stored, by name.
            index: the block's number, for messages.
            device: where activations and Hessians are.
        """
        self.block, self.recipe, self.index, self.device, self.on_linear = block, recipe, index, device, on_linear
        self.quantizations = quantizations
        self.seconds = dict.fromkeys(("inputs", "hessian", "correct", "factorise", "solve", "pack"), 0.0)
        self._tensors: Tensors = {name: block.norms[name] for name in BLOCK_NORMS}
        self._linears: dict[str, LinearMetrics] = {}
        self._linear_seconds: dict[str, float] = dict.fromkeys(BLOCK_LINEARS, 0.0)
        self._loss: float | None = None

    def start_group(self, group: Sequence[str]) -> tuple[Hessian, TargetCorrection]:
        """Return empty statistics of linears that share an input."""
        self.on_linear(group[0], self._loss)
        linears = [self.block.linears[name] for name in group]
        hessian = Hessian(linears[0].shape[1], self.device, self._label(group))
        return hessian, TargetCorrection(linears, self.device)

    def quantize_group(
        self, group: Sequence[str], hessian: Hessian, correction: TargetCorrection, gradients: GradientStatistics
    ) -> None:
        """Quantize the linears of `group` under the accumulated statistics, which are consumed.

        Args:
            gradients: of the scores, by the outputs of the linears.

        Raises:
            NonFiniteError: a calibration input or a weight is not finite.
            UnresumableJobError: the Hessian cannot be factorised.
        """
        targets, factor = self._factorise(group, hessian, correction)
        for name in group:
            self.on_linear(name, self._loss)
            with self._timed("solve", name):
                outputs = OutputFactor.from_low_rank(*gradients.output_moment(name))
                solved = solve(targets.pop(0), factor, self._settings(name), outputs=outputs)
            self._loss = solved.relative_loss
            self._pack(name, solved)

    def quantize_without_data(self, name: str) -> None:
        """Quantize a linear from its weight alone."""
        self.on_linear(name, self._loss)
        with self._timed("solve", name):
            weight = self.block.linears[name].weight(self.block.model_config.dtype)
            packed = self._round(weight, name)
            before = weight.float()
            after = make_linear(packed, self.quantizations[name], self.block.model_config.linear_shape(name))
            error = after.weight(torch.float32).sub_(before)
            loss, power = (float(torch.linalg.vector_norm(each)) ** 2 / each.numel() for each in (error, before))
            relative = loss / power if power else 0.0
        self._replace(name, packed, LinearMetrics(loss, relative, _decibels(relative)))

    def result(self) -> PackedBlock:
        """The packed block, once all linears are quantized."""
        return PackedBlock(self._tensors, self._linears, self.seconds)

    def _label(self, group: Sequence[str]) -> str:
        return f"block {self.index}, {', '.join(group)}"

    def _settings(self, linear: str) -> GPTQSettings:
        return self.recipe.settings(self.quantizations[linear])

    def _factorise(
        self, group: Sequence[str], hessian: Hessian, correction: TargetCorrection
    ) -> tuple[list[torch.Tensor], CholeskyFactor]:
        """Compute the target weights, then factorise the Hessian. Freed memory is released first: this is the peak."""
        start = time.perf_counter()
        Workspace.of(torch.device(self.device)).clear()
        release_freed_memory()
        matrix = hessian.matrix()
        hessian.free()
        targets = correction.targets(matrix, hessian.weight)
        middle = time.perf_counter()
        factor = factorise(matrix, self._settings(group[0]), self._label(group))
        del matrix
        self.seconds["correct"] += middle - start
        self.seconds["factorise"] += time.perf_counter() - middle
        return targets, factor

    def _pack(self, name: str, solved: SolvedLinear) -> None:
        with self._timed("pack", name):
            if solved.quant_state is None:
                bits = self.quantizations[name].bits
                packed = pack_gptq(solved.codes, solved.zeros, solved.scales, solved.g_idx, bits)
            else:
                packed = pack_nf4(solved.codes, solved.quant_state, self.block.model_config.dtype)
        metrics = LinearMetrics(
            solved.loss,
            solved.relative_loss,
            _decibels(solved.relative_loss),
            solved.damp,
            solved.dead_columns,
            list(solved.notes),
        )
        self._replace(name, packed, metrics)

    def _round(self, weight: torch.Tensor, name: str) -> Tensors:
        if self.recipe.method == "nf4":
            return quantize_nf4(weight)
        if self.recipe.method == "int8":
            return quantize_int8(weight)
        solved = round_to_nearest(weight.float(), self._settings(name))
        return pack_gptq(solved.codes, solved.zeros, solved.scales, solved.g_idx, self.quantizations[name].bits)

    def _replace(self, name: str, packed: Tensors, metrics: LinearMetrics) -> None:
        """Put the packed linear into the block and record its tensors and metrics."""
        bias = {} if (stored := self.block.linears[name].bias) is None else {"bias": stored}
        shape = self.block.model_config.linear_shape(name)
        self.block.linears[name] = make_linear(packed | bias, self.quantizations[name], shape)
        self._tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in (packed | bias).items()}
        self._linears[name] = replace(metrics, seconds=self._linear_seconds[name])
        self._loss = metrics.relative_loss

    @contextmanager
    def _timed(self, stage: str, name: str) -> Generator[None, None, None]:
        """Add the time of the `with` block to the stage and to the linear."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.seconds[stage] += elapsed
        self._linear_seconds[name] += elapsed


def _decibels(relative_loss: float) -> float | None:
    return float(-10 * torch.tensor(relative_loss, dtype=torch.float64).log10()) if relative_loss > 0 else None
