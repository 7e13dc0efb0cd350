"""What a checkpoint takes where it is computed, in bytes, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from runtime.architecture import BLOCK_LINEARS, block_prefix
from runtime.checkpoint import Checkpoint
from runtime.kernels.pieces import WEIGHTS_AT_ONCE
from runtime.numerics import Numerics
from runtime.quantization import BLOCK_LINEAR_GROUPS

PIECE_BYTES = 12  # what CPU kernels hold of each weight while they unpack it


@dataclass(frozen=True)
class Footprint:
    """Sizes in bytes of a checkpoint that is computed in certain dtypes."""

    checkpoint: Checkpoint
    numerics: Numerics

    @property
    def blocks(self) -> int:
        """How many blocks there are; not a size."""
        return self.checkpoint.architecture.num_hidden_layers

    @property
    def is_ready(self) -> bool:
        """Whether weights are stored as products take them, so that nothing is unpacked or cast."""
        return self.checkpoint.quantization is None and self.checkpoint.architecture.dtype == self.numerics.matmul

    @cached_property
    def stored_block(self) -> int:
        """The largest block as it is stored."""
        return max(self.checkpoint.nbytes(block_prefix(index)) for index in range(self.blocks))

    @cached_property
    def pinned_block(self) -> int:
        """The largest block in pinned host memory, of which torch takes a power of two for each tensor."""
        return max(
            sum(1 << (size - 1).bit_length() for size in self.checkpoint.sizes(block_prefix(index)))
            for index in range(self.blocks)
        )

    def block(self, *, keep: bool) -> int:
        """The largest block as it is computed: as stored, or with `keep` dequantized."""
        if not keep:
            return self.stored_block + self._zeros
        architecture = self.checkpoint.architecture
        small = [shape for shape in architecture.block_shapes().values() if len(shape) == 1]
        return self._weights(BLOCK_LINEARS) * self._width + 4 * sum(map(prod, small))

    @property
    def embedding(self) -> int:
        """The embedding, which stays on the host: a pass looks a few of its rows up."""
        return self.checkpoint.nbytes("model.embed_tokens.")

    @property
    def outer(self) -> int:
        """Final norm, score head, and the tables of rotary positions."""
        architecture = self.checkpoint.architecture
        tables = 2 * 4 * architecture.max_position_embeddings * architecture.head_dim
        return self.checkpoint.nbytes("model.norm.") + self.checkpoint.nbytes("score.") + tables

    def products(self, *, keep: bool) -> int:
        """The buffer in which a weight lasts for one product."""
        if keep or self.is_ready:
            return 0
        weights = max(map(self._weights, BLOCK_LINEAR_GROUPS))
        return weights * self.numerics.products.itemsize + min(weights, WEIGHTS_AT_ONCE["cpu"]) * PIECE_BYTES

    def activations(self, tokens: int) -> int:
        """What so many tokens take inside a block; a conversation that is longer takes more.

        At its widest, the MLP: the residual stream before and after and what is normalised of it; gate and up, both
        once more in the stream's dtype, and their product.
        """
        architecture, stream = self.checkpoint.architecture, self.numerics.stream.itemsize
        again = 0 if self.numerics.stream == self.numerics.matmul else 2 * stream
        inner = architecture.intermediate_size * (3 * self._width + stream + again)
        return tokens * (inner + 6 * architecture.hidden_size * stream)

    def hidden(self, tokens: int) -> int:
        """The residual stream of so many tokens."""
        return tokens * self.checkpoint.architecture.hidden_size * self.numerics.stream.itemsize

    @property
    def _width(self) -> int:
        return self.numerics.matmul.itemsize

    @property
    def _zeros(self) -> int:
        """What GPTQ weights hold beside their tensors: zeros in fp16."""
        quantization = self.checkpoint.quantization
        if quantization is None or quantization.method != "gptq":
            return 0
        shapes = [self.checkpoint.architecture.linear_shape(name) for name in BLOCK_LINEARS]
        return sum(2 * out_features * quantization.groups(in_features) for out_features, in_features in shapes)

    def _weights(self, names: tuple[str, ...]) -> int:
        return sum(prod(self.checkpoint.architecture.linear_shape(name)) for name in names)
