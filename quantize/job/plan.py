"""Estimates of a quantization's disk, memory and arithmetic, computed before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from quantize.job.gradient_plan import GradientPlan
from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS, QuantizationConfig

FP32_STAGES = ("factorisation", "solve")  # stages of `QuantizationPlan.flops` that are always fp32
# Bytes of the process apart from tensors of the model. Measured on the demo.
INTERPRETER_BYTES = 480 << 20  # Python with torch, tokenizers and scipy
THREAD_BYTES = 128 << 20  # each further thread
MAX_COUNTED_THREADS = 8  # more were not measured
BF16_KERNEL_BYTES = 64 << 20  # oneDNN caches a compiled bf16 kernel per recent shape on a CPU
BITSANDBYTES_BYTES = 128 << 20  # the library and its imports
# Bytes per weight of a linear during its solve: reordered 16-bit weight, fp32 weight or error, fp32 dequantized weight,
# codes before and after packing, temporaries of a block of columns, error and residual of the two-sided solve.
SOLVE_BYTES_PER_WEIGHT = 2 + 4 + 4 + 2 + 2 + 4 + 4
DATA_FREE_BYTES_PER_WEIGHT = {"gptq": 18, "nf4": 14, "int8": 13}  # without calibration, by stored format; measured


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens in the calibration and parity batches; prefixes shared within a batch count once."""

    calibration_tokens: int
    parity_tokens: int
    longest_batch: int
    estimated: bool = False

    @property
    def tokens(self) -> int:
        return self.calibration_tokens + self.parity_tokens


@dataclass(frozen=True)
class QuantizationPlan:
    """Costs of one quantization, in bytes and floating-point operations.

    Attributes:
        quantization: the stored format, of most linears if bits are mixed.
        bits: bits per weight without scales; above `quantization.bits` if bits are mixed.
        gradients: costs of the backward sweep, or None without calibration.
        matmul_bytes: bytes per element of matmul inputs, 2 or 4.
        prefetch: whether the next block is read while the current one is quantized.
        device: `cpu` or a CUDA device.
    """

    model_config: ModelConfig
    quantization: QuantizationConfig
    bits: float
    token_counts: TokenCounts
    matmul_bytes: int
    prefetch: bool
    device: str
    gradients: GradientPlan | None = None

    # ---- sizes ------------------------------------------------------------------------------------------

    @property
    def block_weights(self) -> int:
        """Number of weights in the linears of one block."""
        return sum(map(self._size, BLOCK_LINEARS))

    @property
    def block_bytes(self) -> int:
        """Bytes of one unquantized block."""
        shapes = self.model_config.block_shapes().values()
        return sum(torch.Size(shape).numel() for shape in shapes) * self.model_config.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the block linears, including scales and zeros."""
        return self.quantization.bits_per_weight(self.model_config) + self.bits - self.quantization.bits

    @property
    def outer_bytes(self) -> int:
        """Bytes of embedding, final norm and head, which are not quantized."""
        shapes = self.model_config.non_block_shapes().values()
        return sum(torch.Size(shape).numel() for shape in shapes) * self.model_config.dtype.itemsize

    @property
    def reads(self) -> int:
        """How often the 16-bit checkpoint is read."""
        return 1 + (self.gradients.passes if self.gradients else 0)

    @property
    def disk_read(self) -> int:
        """Bytes of the 16-bit checkpoint."""
        return self.block_bytes * self.model_config.num_hidden_layers + self.outer_bytes

    @property
    def disk_written(self) -> int:
        """Bytes of the packed checkpoint."""
        norms_and_biases = self.block_bytes - self.block_weights * self.model_config.dtype.itemsize
        block = int(self.bits_per_weight * self.block_weights / 8) + norms_and_biases
        return block * self.model_config.num_hidden_layers + self.outer_bytes

    @property
    def hidden_state_bytes(self) -> int:
        """Bytes of both buffers of the reference and quantized hidden states (fp32) and of the noise floor (bf16)."""
        hidden = self.model_config.hidden_size
        return 2 * hidden * (2 * 4 * self.token_counts.tokens + 2 * self.token_counts.parity_tokens)

    @property
    def temporary_writes(self) -> int:
        """Bytes of temporary files written over the whole job: each block writes one of two buffers."""
        gradients = self.gradients.writes if self.gradients else 0
        return self.hidden_state_bytes // 2 * self.model_config.num_hidden_layers + gradients

    @property
    def mapped_bytes(self) -> int:
        """Largest size of the memory-mapped files in use: the backward sweep ends before hidden states are stored."""
        return max(self.hidden_state_bytes, self.gradients.buffer_bytes if self.gradients else 0)

    @property
    def temporary_bytes(self) -> int:
        """Largest size of the job's files that are deleted at the end."""
        return self.mapped_bytes + (self.gradients.statistics_bytes if self.gradients else 0)

    @property
    def tokens_per_input(self) -> float:
        """Calibration tokens per input of the widest linear; below 1 its Hessian is rank-deficient."""
        return self.token_counts.calibration_tokens / widest_input(self.model_config)

    # ---- memory -----------------------------------------------------------------------------------------

    @property
    def working_bytes(self) -> int:
        """Peak bytes of one block on the compute device: weights, activations, Hessian and solve."""
        block = self.block_bytes + self._packed_block
        cast = self._largest * self.matmul_bytes  # the largest weight, cast or dequantized
        forward = block + cast + self._activation_bytes
        if self.gradients is None:
            return max(forward, block + self._largest * DATA_FREE_BYTES_PER_WEIGHT[self.quantization.method])
        backward = self.block_bytes + self.gradients.working_bytes
        return max(forward, backward, *(self._group_bytes(group) for group in BLOCK_LINEAR_GROUPS))

    def _group_bytes(self, group: Sequence[str]) -> int:
        """Peak bytes while the linears of one group are calibrated, the largest of three steps.

        1. Accumulation: Hessian, moment of the correction and activations.
        2. Factorisation: Hessian, and its damped factor or the solver's; target weights, and the product for one more.
        3. Solve, one linear after the other: targets and factor; then the output factor and its copy in another order,
           or the output factor and the linear being solved.
        """
        out_features, in_features = self.model_config.linear_shape(group[0])
        hessian = 4 * in_features**2
        moment = 4 * in_features * (out_features if len(group) == 1 else in_features)
        accumulation = hessian + moment + self._activation_bytes + self._largest * self.matmul_bytes
        targets = 4 * sum(map(self._size, group))
        size = max(map(self._size, group))
        factorisation = 2 * hessian + targets + (moment if len(group) > 1 else 0) + 4 * size
        outputs = 4 * max(self.model_config.linear_shape(name)[0] for name in group) ** 2
        solve = hessian + targets + max(outputs + size * SOLVE_BYTES_PER_WEIGHT, 2 * outputs)
        return self.block_bytes + self._packed_block + max(accumulation, factorisation, solve)

    @property
    def peak_host_bytes(self) -> int:
        """Peak resident memory of the process, including the mapped pages of the hidden states."""
        embedding = self.model_config.vocab_size * self.model_config.hidden_size * self.model_config.dtype.itemsize
        ahead = self.block_bytes if self.prefetch else 0
        block = ahead + (self.working_bytes if self.device == "cpu" else self.block_bytes + self._packed_block)
        threads = THREAD_BYTES * (min(torch.get_num_threads(), MAX_COUNTED_THREADS) - 1)
        kernels = BF16_KERNEL_BYTES if self.matmul_bytes == 2 and self.device == "cpu" else 0
        bitsandbytes = BITSANDBYTES_BYTES if self.quantization.method == "nf4" else 0
        libraries = INTERPRETER_BYTES + threads + kernels + bitsandbytes
        return libraries + self.mapped_bytes + max(2 * embedding, block)

    @property
    def peak_gpu_bytes(self) -> int:
        """Peak memory on the GPU; 0 on a CPU."""
        return 0 if self.device == "cpu" else self.working_bytes

    @property
    def _largest(self) -> int:
        """Number of weights of the largest linear."""
        return max(self._size(name) for name in BLOCK_LINEARS)

    @property
    def _packed_block(self) -> int:
        """Bytes of the packed linears of the largest block: of 8 bits if bits are mixed."""
        bits = self.quantization.bits if self.bits == self.quantization.bits else 8
        return replace(self.quantization, bits=bits).block_bytes(self.model_config, 0)

    @property
    def _activation_bytes(self) -> int:
        """Bytes of temporaries in the MLP, the widest step: gate, up and their product."""
        hidden, inner = self.model_config.hidden_size, self.model_config.intermediate_size
        return self.token_counts.longest_batch * 4 * (4 * inner + 6 * hidden)

    # ---- work -------------------------------------------------------------------------------------------

    def flops(self) -> dict[str, float]:
        """Floating-point operations of one block by stage. `FP32_STAGES` run in fp32, others in the matmul dtype."""
        forward = 2.0 * self.block_weights
        stages = {
            "reference stream": forward * self.token_counts.tokens,
            "quantized stream": forward * self.token_counts.tokens,
        }
        if self.gradients is None:
            return stages
        gate_and_up = 2.0 * sum(self._size(name) for name in BLOCK_LINEARS[4:6])
        # The quantized model computes gate and up a second time, once down_proj is packed.
        stages["second gate and up"] = gate_and_up * self.token_counts.calibration_tokens
        stages["Hessians"] = sum(2.0 * k**2 for k in self._inputs) * self.token_counts.calibration_tokens
        moments = sum(2.0 * self.model_config.linear_shape(g[0])[1] ** 2 for g in BLOCK_LINEAR_GROUPS if len(g) > 1)
        moments += sum(4.0 * self._size(group[0]) for group in BLOCK_LINEAR_GROUPS if len(group) == 1)
        shapes = [self.model_config.linear_shape(name) for name in BLOCK_LINEARS]
        stages["correction"] = moments * self.token_counts.calibration_tokens + sum(2.0 * n * k * k for n, k in shapes)
        stages["factorisation"] = sum(2 * k**3 / 3.0 for k in self._inputs)
        stages["solve"] = sum(2.0 * n * k * (n + k) + n**3 / 3.0 for n, k in shapes)
        stages["backward sweep"] = self.gradients.flops
        return stages

    @property
    def _inputs(self) -> list[int]:
        """Input width of each group of linears that share a Hessian."""
        return [self.model_config.linear_shape(group[0])[1] for group in BLOCK_LINEAR_GROUPS]

    def _size(self, name: str) -> int:
        out_features, in_features = self.model_config.linear_shape(name)
        return out_features * in_features


def widest_input(model_config: ModelConfig) -> int:
    """Largest number of input features of a block linear."""
    return max(model_config.linear_shape(name)[1] for name in BLOCK_LINEARS)
