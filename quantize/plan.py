"""What a quantization will read, write, hold and take, said before anything heavy is done."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from runtime.architecture import BLOCK_LINEARS, Architecture
from runtime.devices import is_here
from runtime.errors import PlanError
from runtime.quantization import BLOCK_LINEAR_GROUPS, Quantization
from runtime.sizes import show_size

FP32_STAGES = ("factorisation", "solve", "refinement")  # of `Plan.work`, whatever the dtype
_INNER = [group for group in BLOCK_LINEAR_GROUPS if len(group) > 1]
_OUTER = [group for group in BLOCK_LINEAR_GROUPS if len(group) == 1]  # these write to the residual stream
# Python with torch, tokenizers and scipy, before any tensor, and what each further thread holds of its own
# (measured on the demo: 0.95 GiB in all with one thread, 1.05 with two).
INTERPRETER = 480 << 20
THREAD = 128 << 20
MOST_THREADS = 8  # beyond which none was measured
KERNELS = 64 << 20  # products in bf16 on a CPU keep a compiled kernel for each of the last shapes they met
BITSANDBYTES = 128 << 20  # and what it imports
# Of one linear while it is solved, by weight: its 16-bit original reordered, the fp32 weight that becomes the
# error, the dequantized weight in fp32, codes before and after packing, and room for what a block of columns takes.
SOLVE_BYTES = 2 + 4 + 4 + 2 + 2
# And what is solved for in fp32, where it has no buffer of its own already.
CORRECT_BYTES = 4
# Of one that is solved while others of its group are not: what was solved for, and codes.
SOLVED_BYTES = 4 + 1
# What one needs that is rounded without data, by stored layout (measured).
ROUND_BYTES = {"gptq": 18, "nf4": 14, "int8": 13}


@dataclass(frozen=True)
class Load:
    """The tokens that go through the sweep."""

    calibration_tokens: int
    parity_tokens: int
    longest_batch: int
    estimated: bool = False

    @property
    def tokens(self) -> int:
        return self.calibration_tokens + self.parity_tokens


@dataclass(frozen=True)
class Plan:
    """Costs of one quantization, in bytes and floating-point operations.

    Attributes:
        architecture: the model's shapes.
        quantization: the stored format.
        load: tokens of calibration and parity rows.
        calibrated: whether Hessians are accumulated (GPTQ) or weights rounded alone.
        correction: whether linears are corrected towards the reference stream.
        refine_passes: how often solved linears are visited again.
        matmul_bytes: bytes of a matmul input, 2 or 4.
        prefetch: whether the next block is read while this one is in use.
        device: `cpu` or a CUDA device.
    """

    architecture: Architecture
    quantization: Quantization
    load: Load
    calibrated: bool
    correction: bool
    refine_passes: int
    matmul_bytes: int
    prefetch: bool
    device: str

    # ---- sizes ------------------------------------------------------------------------------------------

    @property
    def block_weights(self) -> int:
        """Weights in the linears of one block."""
        return sum(self._size(name) for name in BLOCK_LINEARS)

    @property
    def block_bytes(self) -> int:
        """One unquantized block as stored."""
        shapes = self.architecture.block_shapes().values()
        return sum(torch.Size(shape).numel() for shape in shapes) * self.architecture.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the block linears, scales and zeros included."""
        return self.quantization.bits_per_weight(self.architecture)

    @property
    def outer_bytes(self) -> int:
        """Embedding, final norm and head, which stay as they are."""
        shapes = self.architecture.outer_shapes().values()
        return sum(torch.Size(shape).numel() for shape in shapes) * self.architecture.dtype.itemsize

    @property
    def disk_read(self) -> int:
        """The checkpoint, once."""
        return self.block_bytes * self.architecture.num_hidden_layers + self.outer_bytes

    @property
    def disk_written(self) -> int:
        """The packed checkpoint."""
        norms_and_biases = self.block_bytes - self.block_weights * self.architecture.dtype.itemsize
        return (self._packed_block + norms_and_biases) * self.architecture.num_hidden_layers + self.outer_bytes

    @property
    def stream_bytes(self) -> int:
        """Both buffers of the reference and the quantized stream (fp32) and of the bf16 noise floor."""
        hidden = self.architecture.hidden_size
        return 2 * hidden * (2 * 4 * self.load.tokens + 2 * self.load.parity_tokens)

    # ---- memory -----------------------------------------------------------------------------------------

    @property
    def working_bytes(self) -> int:
        """The most that one block needs where it is computed: weights, activations, Hessian and solve."""
        held = self.block_bytes + self._packed_block
        passing = held + self._cast_bytes + self._activation_bytes
        if not self.calibrated:
            return max(passing, held + self._largest * ROUND_BYTES[self.quantization.method])
        return max(passing, *(self._group_bytes(group) for group in BLOCK_LINEAR_GROUPS))

    def _group_bytes(self, group: Sequence[str]) -> int:
        """The most that calibrating the linears of one group needs.

        First the Hessian and the correction grow beside the activations, then the Hessian's factor is taken beside
        them, and last each linear is corrected and solved beside the factor. What was asked for and what came of it
        stays until all are solved, and is refined beside the Hessian in the factor's place, which takes no more.
        """
        out_features, in_features = self.architecture.linear_shape(group[0])
        hessian = 4 * in_features**2
        correction = 0 if not self.correction else 4 * in_features * (out_features if len(group) == 1 else in_features)
        growing = hessian + self._activation_bytes + self._cast_bytes
        each = SOLVE_BYTES + (CORRECT_BYTES if self.correction and len(group) > 1 else 0)
        sizes = sorted(self._size(name) for name in group)
        solving = hessian + sizes[-1] * each + sum(sizes[:-1]) * SOLVED_BYTES
        return self.block_bytes + self._packed_block + correction + max(growing, 2 * hessian, solving)

    @property
    def host_peak(self) -> int:
        """Peak resident memory of the process, the streams' mapped pages included."""
        embedding = self.architecture.vocab_size * self.architecture.hidden_size * self.architecture.dtype.itemsize
        ahead = self.block_bytes if self.prefetch else 0
        block = ahead + (self.working_bytes if self.device == "cpu" else self.block_bytes + self._packed_block)
        threads = THREAD * (min(torch.get_num_threads(), MOST_THREADS) - 1)
        kernels = KERNELS if self.matmul_bytes == 2 and self.device == "cpu" else 0
        libraries = INTERPRETER + threads + kernels + (BITSANDBYTES if self.quantization.method == "nf4" else 0)
        return libraries + self.stream_bytes + max(2 * embedding, block)

    @property
    def gpu_peak(self) -> int:
        """Peak memory on the GPU, 0 without one."""
        return 0 if self.device == "cpu" else self.working_bytes

    @property
    def _cast_bytes(self) -> int:
        """The largest linear's weight as a matmul input: cast, or dequantized."""
        return self._largest * self.matmul_bytes

    @property
    def _largest(self) -> int:
        """Weights of the largest linear."""
        return max(self._size(name) for name in BLOCK_LINEARS)

    @property
    def _packed_block(self) -> int:
        return sum(self._packed_size(name) for name in BLOCK_LINEARS)

    @property
    def _activation_bytes(self) -> int:
        """Temporaries of the widest step, the MLP: gate, up and their product."""
        hidden, inner = self.architecture.hidden_size, self.architecture.intermediate_size
        return self.load.longest_batch * 4 * (4 * inner + 6 * hidden)

    # ---- work -------------------------------------------------------------------------------------------

    def work(self) -> dict[str, float]:
        """Floating-point operations of one block, by stage; those of `FP32_STAGES` are in fp32."""
        forward = 2.0 * self.block_weights
        stages = {"reference stream": forward * self.load.tokens, "quantized stream": forward * self.load.tokens}
        if not self.calibrated:
            return stages
        gate_and_up = 2.0 * sum(self._size(name) for name in BLOCK_LINEARS[4:6])
        stages["calibration stops"] = gate_and_up * self.load.calibration_tokens  # a second time, in the quantized one
        stages["Hessians"] = sum(2.0 * k**2 for k in self._inputs) * self.load.calibration_tokens
        if self.correction:
            inner = sum(2.0 * self.architecture.linear_shape(group[0])[1] ** 2 for group in _INNER)
            outer = sum(4.0 * self._size(group[0]) for group in _OUTER)
            stages["correction"] = (inner + outer) * self.load.calibration_tokens + 2.0 * sum(
                self._size(name) * self.architecture.linear_shape(name)[1] for name in BLOCK_LINEARS
            )
        stages["factorisation"] = sum(k**3 / 3.0 for k in self._inputs)
        stages["solve"] = sum(self._size(name) * self.architecture.linear_shape(name)[1] for name in BLOCK_LINEARS)
        if self.refine_passes:
            stages["refinement"] = 2 * (1 + self.refine_passes) * stages["solve"]
        return stages

    @property
    def _inputs(self) -> list[int]:
        """Input width of each group of linears that share a Hessian."""
        return [self.architecture.linear_shape(group[0])[1] for group in BLOCK_LINEAR_GROUPS]

    def _size(self, name: str) -> int:
        out_features, in_features = self.architecture.linear_shape(name)
        return out_features * in_features

    def _packed_size(self, name: str) -> int:
        return self.quantization.linear_bytes(*self.architecture.linear_shape(name))


def check_disk(plan: Plan, output: Path) -> None:
    """Raise PlanError when the disk under `output` has no room for what is not written yet."""
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    wanted = plan.disk_written + plan.stream_bytes - written
    check_room(output, wanted, "free some, choose an --output on another disk, or take fewer --rows and --parity-pairs")


def check_room(output: Path, nbytes: int, remedy: str) -> None:
    """Raise PlanError, which ends with `remedy`, when the disk that `output` is or will be on has no such room."""
    place = output
    while not place.exists():
        place = place.parent
    if nbytes > (free := shutil.disk_usage(place).free):
        raise PlanError(f"{place} has {show_size(free)} free, but {show_size(nbytes)} will be written; {remedy}.")


def fit_memory(plan: Plan, budget: int | None) -> Plan:
    """The plan, without prefetch if that is what it takes to stay within `budget` bytes of host memory.

    Raises:
        PlanError: it does not fit even so; the message says what would.
    """
    limit = psutil.virtual_memory().available if budget is None else budget
    for prefetch in (True, False):
        candidate = replace(plan, prefetch=prefetch)
        # The streams' mapped pages go back to their files when memory is short: only a given budget holds them.
        needed = candidate.host_peak - (candidate.stream_bytes if budget is None else 0)
        if needed <= limit:
            break
    else:
        without = candidate.host_peak - candidate.stream_bytes
        tokens = int((limit - without) / max(1, candidate.stream_bytes) * plan.load.tokens)
        remedy = (
            f"take fewer --rows and --parity-pairs (about {tokens:,} tokens would fit)"
            if tokens > 0
            else f"one block alone needs {show_size(without)}: use a machine with more memory"
        )
        raise PlanError(
            f"the peak would be {show_size(needed)} of memory, with {show_size(limit)} "
            f"{'allowed by --ram-budget' if budget else 'available'}; {remedy}."
        )
    if plan.device != "cpu" and is_here(plan.device):
        free = torch.cuda.mem_get_info(plan.device)[0]
        if candidate.gpu_peak > free:
            raise PlanError(
                f"{plan.device} has {show_size(free)} free and one block needs {show_size(candidate.gpu_peak)}; "
                "use --device cpu, or a GPU with more memory."
            )
    return candidate
