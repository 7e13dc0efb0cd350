"""Estimate the memory that computing a checkpoint takes, from its tensor headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.model_config import BLOCK_LINEARS, block_prefix
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS
from runtime.kernels.workspace import CHUNK_WEIGHTS
from runtime.modeling.attention import MAX_SCORES, TILE
from runtime.modeling.precision import Precision

SCORE_COPIES = 3  # of one tile: attention scores, their softmax, and that in the matmul dtype
UNPACKING_BYTES_PER_WEIGHT = 12  # peak of the CPU kernels while they unpack a packed weight


@dataclass(frozen=True)
class MemoryEstimate:
    """Sizes in bytes of a checkpoint's parts when it is computed in `precision`."""

    checkpoint: Checkpoint
    precision: Precision

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return self.checkpoint.model_config.num_hidden_layers

    @property
    def stored_in_matmul_dtype(self) -> bool:
        """Whether the stored weights are already in the matmul dtype, so that nothing is unpacked or cast."""
        return (
            self.checkpoint.quantization is None and self.checkpoint.model_config.dtype == self.precision.matmul_dtype
        )

    @cached_property
    def stored_block_bytes(self) -> int:
        """The largest block as stored."""
        return max(self.checkpoint.nbytes(block_prefix(index)) for index in range(self.block_count))

    @cached_property
    def pinned_block_bytes(self) -> int:
        """The largest block in pinned host memory; torch rounds each tensor up to a power of two."""
        return max(
            sum(1 << (size - 1).bit_length() for size in self.checkpoint.tensor_nbytes(block_prefix(index)))
            for index in range(self.block_count)
        )

    def block_bytes(self, *, keep_dequantized: bool) -> int:
        """The largest block in memory: as stored, or dequantized to the matmul dtype with `keep_dequantized`."""
        if not keep_dequantized:
            return self.stored_block_bytes + self._zero_point_bytes
        model_config = self.checkpoint.model_config
        small = [shape for shape in model_config.block_shapes().values() if len(shape) == 1]
        return self._weight_count(BLOCK_LINEARS) * self._matmul_itemsize + 4 * sum(map(prod, small))

    @property
    def embedding_bytes(self) -> int:
        """The embedding table, which stays in host memory: only the rows of a batch's tokens are copied to a device."""
        return self.checkpoint.nbytes("model.embed_tokens.")

    @property
    def non_block_bytes(self) -> int:
        """Final norm and score head in the residual dtype, and the tables of the rotary embedding."""
        model_config = self.checkpoint.model_config
        tables = 2 * 4 * model_config.max_position_embeddings * model_config.head_dim
        shapes = model_config.non_block_shapes()
        head = sum(prod(shapes[name]) for name in ("model.norm.weight", *model_config.head_tensors))
        return head * self.precision.residual_dtype.itemsize + tables

    def product_buffer_bytes(self, *, keep_dequantized: bool) -> int:
        """The buffer that one dequantized linear group occupies during its product."""
        if keep_dequantized or self.stored_in_matmul_dtype:
            return 0
        weights = max(map(self._weight_count, BLOCK_LINEAR_GROUPS))
        return (
            weights * self.precision.product_dtype.itemsize
            + min(weights, CHUNK_WEIGHTS["cpu"]) * UNPACKING_BYTES_PER_WEIGHT
        )

    def activation_bytes(self, tokens: int, *, tiled_attention: bool = True) -> int:
        """Peak activations inside a block with chunks of `tokens`, for the longest conversation that the model takes.

        Of a conversation longer than a chunk, the residual stream, keys and values are whole. All other activations are
        those of a chunk. Their peak is in the MLP: the residual stream before and after, the normalized states, gate,
        up, copies of both in the residual dtype, and their product. Or it is in the attention to very many keys.

        Args:
            tiled_attention: attention works tile by tile, not in one flash attention kernel.
        """
        model_config, residual_size = self.checkpoint.model_config, self.precision.residual_dtype.itemsize
        copies = 0 if self.precision.residual_dtype == self.precision.matmul_dtype else 2 * residual_size
        inner = model_config.intermediate_size * (3 * self._matmul_itemsize + residual_size + copies)
        chunk = tokens * (inner + 6 * model_config.hidden_size * residual_size)
        longest = model_config.max_position_embeddings
        keys = longest * model_config.num_key_value_heads * model_config.head_dim
        whole = self.hidden_state_bytes(longest) + 2 * keys * self._matmul_itemsize if longest > tokens else 0
        if not tiled_attention:
            return whole + chunk
        shared = model_config.num_attention_heads // model_config.num_key_value_heads
        scores = min(model_config.num_attention_heads * TILE * longest, max(MAX_SCORES, shared * TILE * longest))
        attention = tokens * 5 * model_config.hidden_size * residual_size + keys * (4 + self._matmul_itemsize)
        return whole + max(chunk, attention + 4 * SCORE_COPIES * scores)

    def hidden_state_bytes(self, tokens: int) -> int:
        """The residual stream of `tokens` tokens."""
        return tokens * self.checkpoint.model_config.hidden_size * self.precision.residual_dtype.itemsize

    @property
    def _matmul_itemsize(self) -> int:
        return self.precision.matmul_dtype.itemsize

    @property
    def _zero_point_bytes(self) -> int:
        """Zero points in fp16, which a loaded GPTQ linear holds besides its stored tensors."""
        quantization = self.checkpoint.quantization
        if quantization is None or quantization.method != "gptq":
            return 0
        shapes = [self.checkpoint.model_config.linear_shape(name) for name in BLOCK_LINEARS]
        groups = [
            sum(shape[0] * each.num_groups(shape[1]) for each, shape in zip(block.values(), shapes, strict=True))
            for block in map(quantization.of_block, range(self.block_count))
        ]
        return 2 * max(groups)

    def _weight_count(self, names: tuple[str, ...]) -> int:
        return sum(prod(self.checkpoint.model_config.linear_shape(name)) for name in names)
