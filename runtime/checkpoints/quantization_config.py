"""Storage layouts of quantized block linears: GPTQ, and NF4 and LLM.int8 of bitsandbytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig, block_prefix
from runtime.common.errors import CheckpointError

Method = Literal["gptq", "nf4", "int8"]
ExpectedTensor = tuple["torch.dtype | None", "tuple[int, ...] | None"]

NF4_BLOCKSIZE = 64
NF4_NESTED_BLOCKSIZE = 256
NF4_QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"

# Linears with the same input, which therefore share a Hessian: q, k, v; o; gate, up; down.
BLOCK_LINEAR_GROUPS = (BLOCK_LINEARS[:3], BLOCK_LINEARS[3:4], BLOCK_LINEARS[4:6], BLOCK_LINEARS[6:])

_FUSED_NAMES = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}  # by the first linear of the group
OVERRIDABLE_OPTIONS = ("bits", "group_size", "sym", "desc_act")  # of single linears, in `dynamic` rules


@dataclass(frozen=True)
class Override:
    """Options of the linears whose full name `pattern` matches from its start: a rule in GPTQModel's `dynamic`."""

    pattern: str
    quantization: QuantizationConfig

    @classmethod
    def of_linears(cls, blocks: Iterable[int], names: Sequence[str], quantization: QuantizationConfig) -> Override:
        """The rule for some linears of some blocks: `names` share an input and a module, such as `self_attn`.

        vLLM and SGLang look for their fused linears only, so the names of those are part of the pattern.
        """
        module = names[0].rpartition(".")[0]
        own = [name.rpartition(".")[2] for name in names]
        choices = "|".join(own + ([_FUSED_NAMES[own[0]]] if own[0] in _FUSED_NAMES else []))
        return cls(rf"model\.layers\.(?:{'|'.join(map(str, blocks))})\.{module}\.(?:{choices})$", quantization)


@dataclass(frozen=True)
class QuantizationConfig:
    """Quantization method and its options; `group_size` to `checkpoint_format` apply to GPTQ only.

    Attributes:
        overrides: GPTQ only; the first one that matches a linear holds. `of_block` applies them.
    """

    method: Method
    bits: int
    group_size: int = -1  # input features that share a scale; -1: all
    sym: bool = True
    desc_act: bool = False
    damp_percent: float = 0.01
    static_groups: bool = False
    true_sequential: bool = True
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    double_quant: bool = True  # NF4: absmax is quantized too
    compute_dtype: str = "bfloat16"  # NF4: matmul dtype of other readers
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        assert self.bits in {"gptq": (4, 8), "nf4": (4,), "int8": (8,)}[self.method], self

    def to_config(self) -> dict[str, Any]:
        """Return a `quantization_config` that makes other readers leave the score head unquantized."""
        if self.method == "gptq":
            return {
                "quant_method": "gptq",
                "bits": self.bits,
                "group_size": self.group_size,
                "desc_act": self.desc_act,
                "sym": self.sym,
                "damp_percent": self.damp_percent,
                "true_sequential": self.true_sequential,
                "static_groups": self.static_groups,
                "lm_head": False,
                "checkpoint_format": self.checkpoint_format,
                "pack_dtype": "int32",
                "modules_in_block_to_quantize": [list(group) for group in BLOCK_LINEAR_GROUPS],
                "dynamic": {"-:score": {}}
                | {f"+:{each.pattern}": self._changed_options(each.quantization) for each in self.overrides},
            }
        config: dict[str, Any] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": self.method == "nf4",
            "load_in_8bit": self.method == "int8",
            "llm_int8_skip_modules": ["score"],
        }
        if self.method == "nf4":
            return config | {
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": self.double_quant,
                "bnb_4bit_compute_dtype": self.compute_dtype,
                "bnb_4bit_quant_storage": "uint8",
            }
        return config | {"llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False}

    def of_block(self, index: int) -> dict[str, QuantizationConfig]:
        """The configs of the linears of block `index`, by name, without overrides."""
        return {name: self._of_linear(block_prefix(index) + name) for name in BLOCK_LINEARS}

    def linear_tensors(self, out_features: int, in_features: int, bias: bool) -> dict[str, ExpectedTensor]:
        """Return the stored tensors of one linear: suffix -> (dtype, shape).

        A dtype of None means any floating-point dtype, a shape of None any one-dimensional shape.

        Raises:
            CheckpointError: the shape cannot be packed with `bits`.
        """
        if self.method == "gptq":
            tensors = self._gptq_tensors(out_features, in_features)
        elif self.method == "nf4":
            tensors = self._nf4_tensors(out_features * in_features)
        else:
            tensors = {
                "weight": (torch.int8, (out_features, in_features)),
                "SCB": (torch.float32, (out_features,)),
                "weight_format": (torch.uint8, ()),
            }
        return tensors | ({"bias": (None, (out_features,))} if bias else {})

    def linear_bytes(self, out_features: int, in_features: int) -> int:
        """Return the stored bytes of one linear, without its bias and the NF4 quant state."""
        return sum(
            dtype.itemsize * torch.Size(shape).numel()
            for dtype, shape in self.linear_tensors(out_features, in_features, bias=False).values()
            if dtype is not None and shape is not None
        )

    def block_bytes(self, model_config: ModelConfig, index: int) -> int:
        """Return the stored bytes of the linears of block `index`, as `linear_bytes`."""
        return sum(
            quantization.linear_bytes(*model_config.linear_shape(name))
            for name, quantization in self.of_block(index).items()
        )

    def bits_per_weight(self, model_config: ModelConfig) -> float:
        """Return the stored bits per weight of the block linears, including scales and zeros."""
        blocks = model_config.num_hidden_layers if self.overrides else 1
        stored = sum(self.block_bytes(model_config, index) for index in range(blocks))
        shapes = [model_config.linear_shape(name) for name in BLOCK_LINEARS]
        return 8 * stored / (blocks * sum(out_features * in_features for out_features, in_features in shapes))

    def nominal_bits(self, model_config: ModelConfig) -> float:
        """Return `bits` plus the stored bits per weight that the overrides add: what `--bits` was, for a mix."""
        if not self.overrides:
            return self.bits
        uniform = replace(self, overrides=())
        return round(self.bits + self.bits_per_weight(model_config) - uniform.bits_per_weight(model_config), 2)

    def num_groups(self, in_features: int) -> int:
        """Return the number of groups per output row; the last group may be shorter."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def _of_linear(self, name: str) -> QuantizationConfig:
        for override in self.overrides:
            if _compiled(override.pattern).match(name):
                return override.quantization
        return replace(self, overrides=()) if self.overrides else self

    def _changed_options(self, other: QuantizationConfig) -> dict[str, Any]:
        """The options of `other` that differ; those of a rule are never empty, which some readers take for a skip."""
        changed = {key: getattr(other, key) for key in OVERRIDABLE_OPTIONS if getattr(other, key) != getattr(self, key)}
        return changed or {"bits": other.bits}

    def _gptq_tensors(self, out_features: int, in_features: int) -> dict[str, ExpectedTensor]:
        rows = packed_word_count(in_features, self.bits, "in_features")
        columns = packed_word_count(out_features, self.bits, "out_features")
        num_groups = self.num_groups(in_features)
        return {
            "qweight": (torch.int32, (rows, out_features)),
            "qzeros": (torch.int32, (num_groups, columns)),
            "scales": (torch.float16, (num_groups, out_features)),
            "g_idx": (torch.int32, (in_features,)),
        }

    def _nf4_tensors(self, elements: int) -> dict[str, ExpectedTensor]:
        blocks = -(-elements // NF4_BLOCKSIZE)
        tensors: dict[str, ExpectedTensor] = {
            "weight": (torch.uint8, ((elements + 1) // 2, 1)),
            "weight.absmax": (torch.uint8 if self.double_quant else torch.float32, (blocks,)),
            "weight.quant_map": (torch.float32, (16,)),
            NF4_QUANT_STATE: (torch.uint8, None),  # JSON text
        }
        if self.double_quant:
            tensors["weight.nested_absmax"] = (torch.float32, (-(-blocks // NF4_NESTED_BLOCKSIZE),))
            tensors["weight.nested_quant_map"] = (torch.float32, (256,))
        return tensors


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compiled patterns; the re module keeps 512 of them, and a rule per linear of the 72B takes 560."""
    return re.compile(pattern)


def packed_word_count(count: int, bits: int, what: str) -> int:
    """Return the number of 32-bit words that hold `count` codes.

    Raises:
        CheckpointError: `count` does not fill whole words, which the GPTQ layout requires.
    """
    codes_per_word = 32 // bits
    if count % codes_per_word:
        raise CheckpointError(
            f"{what} {count} is not a multiple of {codes_per_word}, the {bits}-bit codes in one 32-bit word; "
            "GPTQ cannot store this linear, use NF4."
        )
    return count // codes_per_word
