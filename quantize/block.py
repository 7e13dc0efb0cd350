"""One block in, its packed tensors and figures out.

Within a block the linears are solved in the order in which data reaches them, and what a later linear sees
has already passed the earlier ones as they will be ("true sequential"). q, k and v share one Hessian and one
factorisation, and so do gate and up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from quantize.correction import Correction
from quantize.gptq import Factor, SolvedLinear, factorise, solve
from quantize.hessian import Hessian
from quantize.int8 import quantize_int8
from quantize.nf4 import quantize_nf4
from quantize.recipe import Recipe
from quantize.refine import refine
from quantize.rounding import round_to_nearest
from quantize.streams import Streams
from runtime.architecture import BLOCK_LINEARS, BLOCK_NORMS
from runtime.linear import Tensors, make_linear
from runtime.memory import give_back_freed_memory
from runtime.packing import pack_gptq
from runtime.quantization import BLOCK_LINEAR_GROUPS
from runtime.qwen2 import Block
from runtime.sweep import Stream, check_finite
from runtime.workspace import Workspace

Inputs = Iterator[tuple[int, torch.Tensor]]
"""Batches, and what a group of linears sees of each, [T, K]."""
Watch = Callable[[str, float | None], None]
"""Told of each linear as it is solved and as it is refined, with the relative loss of the one before."""


@dataclass
class LinearFigures:
    """What quantizing one linear cost.

    Attributes:
        loss: mean over tokens of the squared difference from the output asked for; for methods that see no data,
            of the weights' error.
        relative_loss: the same over the mean squared output (or weight).
        sqnr_db: signal to quantization noise in decibels, None where nothing was lost.
        damp: what was added to the Hessian's diagonal; 0 without one.
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
    """The tensors of a packed block, named without `model.layers.N.`, and the figures of its linears."""

    tensors: Tensors
    linears: dict[str, LinearFigures]
    seconds: dict[str, float]

    def figures(self) -> dict[str, Any]:
        """For the job's log."""
        return {"linears": {name: asdict(each) for name, each in self.linears.items()}, "seconds": self.seconds}


def quantize_block(
    block: Block, original: Block, streams: Streams, index: int, recipe: Recipe, watch: Watch
) -> PackedBlock:
    """Replace the linears of `block` one group after another, and push both streams through.

    Args:
        block, original: the same unquantized block twice; the linears of `block` are replaced by packed ones.
        streams: at this block; `following` of the reference and of the quantized stream is filled, of the latter
            with what comes of the packed block.
        index: the block's number, for messages.

    Raises:
        NonFiniteError: an activation or a weight is not finite.
    """
    packer = _Packer(block, recipe, index, watch)
    reference, quantized, calibration = streams.reference, streams.quantized, streams.calibration_batches
    # The unquantized block comes first, so that a fault of the checkpoint is told from one of the packed weights.
    reference.advance(original, index, streams.parity_batches if recipe.calibrated else None)
    if not recipe.calibrated:
        for name in BLOCK_LINEARS:
            packer.round(name)
        quantized.advance(block, index)
        return packer.result()
    there, wanted = _stops(block, quantized, calibration), _stops(original, reference, calibration, leaving=index)
    for group in BLOCK_LINEAR_GROUPS:
        packer.calibrate(group, next(there), next(wanted), quantized)
    for batch in calibration:  # a second time through gate and up, as the packed down projection is there only now
        activation = block.mlp_activation(block.mlp_input(quantized.read(batch, following=True)))
        _leave(block, quantized, batch, activation, index)
    quantized.advance(block, index, streams.parity_batches)
    return packer.result()


def _stops(block: Block, stream: Stream, batches: Sequence[int], *, leaving: int | None = None) -> Iterator[Inputs]:
    """Inputs of the four linear groups, batch by batch. A group must be replaced before the next is asked for.

    `stream.following` holds the attention's context, then the residual after attention, so neither is
    computed twice. A block of which nothing is replaced has a number, `leaving`, and its output there in the end.
    """

    def attention_inputs() -> Inputs:
        for batch in batches:
            yield batch, block.attention_input(stream.read(batch))

    def contexts() -> Inputs:
        for batch in batches:
            context = block.attention_context(block.attention_input(stream.read(batch)), stream.batches[batch])
            stream.write(batch, context)
            yield batch, context

    def mlp_inputs() -> Inputs:
        for batch in batches:
            context = stream.read(batch, following=True).to(block.numerics.matmul)
            hidden = block.after_attention(stream.read(batch), context)
            stream.write(batch, hidden)
            yield batch, block.mlp_input(hidden)

    def activations() -> Inputs:
        for batch in batches:
            activation = block.mlp_activation(block.mlp_input(stream.read(batch, following=True)))
            yield batch, activation
            if leaving is not None:
                _leave(block, stream, batch, activation, leaving)

    yield from (attention_inputs(), contexts(), mlp_inputs(), activations())


def _leave(block: Block, stream: Stream, batch: int, activation: torch.Tensor, index: int) -> None:
    """From the last stop, and its `activation` [T, intermediate], to the block's output."""
    hidden = block.after_mlp(stream.read(batch, following=True), activation)
    check_finite(hidden, stream.batches[batch], index, stream.name)
    stream.write(batch, hidden)


class _Packer:
    """Quantizes the linears of one block, keeping tensors, figures and seconds."""

    def __init__(self, block: Block, recipe: Recipe, index: int, watch: Watch):
        self.block, self.recipe, self.index, self.watch = block, recipe, index, watch
        self.quantization = recipe.quantization()
        self.tensors: Tensors = {name: block.norms[name] for name in BLOCK_NORMS}
        self.linears: dict[str, LinearFigures] = {}
        self.seconds = dict.fromkeys(("inputs", "hessian", "factorise", "solve", "refine", "pack"), 0.0)
        self._spent: dict[str, float] = dict.fromkeys(BLOCK_LINEARS, 0.0)
        self._loss: float | None = None

    def calibrate(self, group: Sequence[str], there: Inputs, wanted: Inputs, stream: Stream) -> None:
        """Solve the linears of `group` under the Hessian of their common input.

        Args:
            there, wanted: that input in the quantized stream, which is `stream`, and in the reference.
        """
        in_features = self.block.architecture.linear_shape(group[0])[1]
        label = f"block {self.index}, {', '.join(group)}"
        self.watch(group[0], self._loss)
        hessian = Hessian(in_features, stream.device, label)
        linears = [self.block.linears[name] for name in group]
        correction = Correction(linears, in_features, stream.device) if self.recipe.correction else None
        self._accumulate(hessian, correction, there, wanted, stream)
        start = time.perf_counter()
        Workspace.of(torch.device(stream.device)).clear()  # room for the factor
        give_back_freed_memory()
        matrix = hessian.matrix()
        hessian.finish()
        factor = factorise(matrix, self.recipe.settings(), label)
        del matrix
        self.seconds["factorise"] += time.perf_counter() - start
        targets = []
        for name, linear in zip(group, linears, strict=True):
            with self._timed("solve", name):
                if correction:
                    targets.append(correction.target(linear, factor, hessian.weight))
                else:
                    targets.append(linear.weight(torch.float32))
        self._pack(group, self._solve(group, targets, factor))

    def _accumulate(
        self, hessian: Hessian, correction: Correction | None, there: Inputs, wanted: Inputs, stream: Stream
    ) -> None:
        """Add all batches. No batch outlives this: the last one's inputs would stand beside the factor."""
        start = time.perf_counter()
        for (batch, x), (_, reference) in zip(there, wanted, strict=True):
            middle = time.perf_counter()
            weights = token_weights(stream, batch, self.recipe.scored_share)
            hessian.add(x, weights)
            if correction:
                correction.add(x, reference, weights)
            self.seconds["inputs"] += middle - start
            start = time.perf_counter()
            self.seconds["hessian"] += start - middle

    def _solve(self, group: Sequence[str], targets: Sequence[torch.Tensor], factor: Factor) -> list[SolvedLinear]:
        """Codes and scales of each linear, refined once the factor is no longer needed."""
        settings, solved = self.recipe.settings(), []
        for name, target in zip(group, targets, strict=True):
            self.watch(name, self._loss)
            with self._timed("solve", name):
                solved.append(solve(target, factor, settings))
            self._loss = solved[-1].relative_loss
        if not settings.refine_passes:
            return solved
        with self._timed("refine", group[0]):
            matrix = factor.into_hessian()
        for index, (name, target) in enumerate(zip(group, targets, strict=True)):
            self.watch(name, self._loss)
            with self._timed("refine", name):
                solved[index] = refine(target, solved[index], matrix, factor, settings)
            self._loss = solved[index].relative_loss
        return solved

    def _pack(self, group: Sequence[str], solved: Sequence[SolvedLinear]) -> None:
        for name, each in zip(group, solved, strict=True):
            with self._timed("pack", name):
                packed = pack_gptq(each.codes, each.zeros, each.scales, each.g_idx, self.recipe.bits)
            figures = LinearFigures(
                each.loss,
                each.relative_loss,
                _decibels(each.relative_loss),
                each.damp,
                each.dead_columns,
                list(each.notes),
            )
            self._replace(name, packed, figures)

    def round(self, name: str) -> None:
        """Quantize a linear from its weight alone."""
        self.watch(name, self._loss)
        with self._timed("solve", name):
            weight = self.block.linears[name].weight(self.block.architecture.dtype)
            packed = self._round(weight)
            before = weight.float()
            after = make_linear(packed, self.quantization, self.block.architecture.linear_shape(name))
            error = after.weight(torch.float32).sub_(before)
            loss, power = (float(torch.linalg.vector_norm(each)) ** 2 / each.numel() for each in (error, before))
            relative = loss / power if power else 0.0
        self._replace(name, packed, LinearFigures(loss, relative, _decibels(relative)))

    def result(self) -> PackedBlock:
        return PackedBlock(self.tensors, self.linears, self.seconds)

    @contextmanager
    def _timed(self, stage: str, name: str) -> Generator[None, None, None]:
        """Count what is done within as this stage of this linear."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.seconds[stage] += elapsed
        self._spent[name] += elapsed

    def _round(self, weight: torch.Tensor) -> Tensors:
        if self.recipe.method == "nf4":
            return quantize_nf4(weight)
        if self.recipe.method == "int8":
            return quantize_int8(weight)
        solved = round_to_nearest(weight.float(), self.recipe.settings())
        return pack_gptq(solved.codes, solved.zeros, solved.scales, solved.g_idx, self.recipe.bits)

    def _replace(self, name: str, packed: Tensors, figures: LinearFigures) -> None:
        bias = {} if (given := self.block.linears[name].bias) is None else {"bias": given}
        shape = self.block.architecture.linear_shape(name)
        self.block.linears[name] = make_linear(packed | bias, self.quantization, shape)
        self.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in (packed | bias).items()}
        self.linears[name] = replace(figures, seconds=self._spent[name])
        self._loss = figures.relative_loss


def token_weights(stream: Stream, batch: int, scored_share: float) -> torch.Tensor | None:
    """Weights [T] that give each sequence's scored token `scored_share` of the sequence's weight.

    One token in some hundreds is the scored one; the others matter only through it, and weigh 1. None where
    all tokens weigh alike.
    """
    if scored_share <= 0:
        return None
    layout = stream.batches[batch]
    weights = torch.ones(layout.tokens, device=stream.device)
    before = layout.positions[layout.scored].float()
    weights[layout.scored] = (before * scored_share / (1 - scored_share)).clamp_min(1.0)
    return weights


def _decibels(relative_loss: float) -> float | None:
    return float(-10 * torch.tensor(relative_loss, dtype=torch.float64).log10()) if relative_loss > 0 else None
