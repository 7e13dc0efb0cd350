"""Storage layouts of quantized block linears, read from and written to `quantization_config`.

Supported: GPTQ (as in AutoGPTQ, GPTQModel, vLLM and SGLang), and NF4 and LLM.int8 of bitsandbytes. Any other option
raises an error that names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig
from runtime.common.errors import CheckpointError

Method = Literal["gptq", "nf4", "int8"]
ExpectedTensor = tuple["torch.dtype | None", "tuple[int, ...] | None"]

NF4_BLOCKSIZE = 64
NF4_NESTED_BLOCKSIZE = 256
NF4_QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"

# Linears with the same input, which therefore share a Hessian: q, k, v; o; gate, up; down.
BLOCK_LINEAR_GROUPS = (BLOCK_LINEARS[:3], BLOCK_LINEARS[3:4], BLOCK_LINEARS[4:6], BLOCK_LINEARS[6:])

# GPTQ options that change the meaning of the stored tensors, with the only supported value.
_REQUIRED_GPTQ_OPTIONS = {"pack_dtype": "int32", "is_marlin_format": False, "rotation": None, "adapter": None}


@dataclass(frozen=True)
class QuantizationConfig:
    """Quantization method and its options; `group_size` to `checkpoint_format` apply to GPTQ only."""

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

    def __post_init__(self) -> None:
        assert self.bits in {"gptq": (4, 8), "nf4": (4,), "int8": (8,)}[self.method], self

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> QuantizationConfig:
        """Read a `quantization_config` of this kit or another writer; `where` names it in error messages.

        Raises:
            CheckpointError: an option is not supported; names the option and its value.
        """
        method = config.get("quant_method")
        if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
            method = "bitsandbytes"  # early transformers versions did not write it
        if method == "gptq":
            return _gptq_from_config(config, where)
        if method == "bitsandbytes":
            return _bitsandbytes_from_config(config, where)
        raise _unsupported(where, "quant_method", method, "'gptq' or 'bitsandbytes'")

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
                "dynamic": {"-:score\\..*": {}},
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

    def bits_per_weight(self, model_config: ModelConfig) -> float:
        """Return the stored bits per weight of the block linears, including scales and zeros."""
        shapes = [model_config.linear_shape(name) for name in BLOCK_LINEARS]
        weights = sum(out_features * in_features for out_features, in_features in shapes)
        return 8 * sum(self.linear_bytes(*shape) for shape in shapes) / weights

    def num_groups(self, in_features: int) -> int:
        """Return the number of groups per output row; the last group may be shorter."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

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


def _gptq_from_config(config: dict[str, Any], where: str) -> QuantizationConfig:
    for key, value in _REQUIRED_GPTQ_OPTIONS.items():
        _choice(config, key, (value,), value, where)
    _check_dynamic(config.get("dynamic") or {}, where)
    stored_as = "checkpoint_format" if config.get("checkpoint_format") else "format"  # GPTQModel writes both
    return QuantizationConfig(
        method="gptq",
        bits=_choice(config, "bits", (4, 8), None, where),
        group_size=_group_size(config, where),
        sym=_flag(config, "sym", True, where),
        desc_act=_flag(config, "desc_act", False, where),
        damp_percent=_damp_percent(config, where),
        static_groups=_flag(config, "static_groups", False, where),
        true_sequential=_flag(config, "true_sequential", True, where),
        checkpoint_format=_choice(config, stored_as, ("gptq", "gptq_v2"), "gptq", where),
    )


def _group_size(config: dict[str, Any], where: str) -> int:
    value = config.get("group_size", -1)
    if type(value) is not int or (value < 1 and value != -1):
        raise _unsupported(where, "group_size", value, "a positive whole number or -1")
    return value


def _damp_percent(config: dict[str, Any], where: str) -> float:
    value = config.get("damp_percent")
    if value is None:
        return 0.01
    if type(value) not in (int, float):
        raise _unsupported(where, "damp_percent", value, "a number")
    return float(value)


def _check_dynamic(dynamic: Any, where: str) -> None:
    """Accept rules that skip modules (the tensors show which); reject rules that change options of some modules."""
    if not isinstance(dynamic, dict):
        raise _unsupported(where, "dynamic", dynamic, "an object")
    for pattern, override in dynamic.items():
        if override and not pattern.startswith("-:"):
            raise _unsupported(where, f"dynamic[{pattern!r}]", override, "the same options for every block linear")


def _bitsandbytes_from_config(config: dict[str, Any], where: str) -> QuantizationConfig:
    if _flag(config, "load_in_8bit", False, where):
        _choice(config, "llm_int8_has_fp16_weight", (False,), False, where)
        return QuantizationConfig(method="int8", bits=8)
    if not _flag(config, "load_in_4bit", False, where):
        raise _unsupported(where, "load_in_4bit", config.get("load_in_4bit"), "true, or load_in_8bit true")
    _choice(config, "bnb_4bit_quant_type", ("nf4",), "fp4", where)  # bitsandbytes' own default is fp4
    _choice(config, "bnb_4bit_quant_storage", ("uint8",), "uint8", where)
    compute_dtype = _choice(config, "bnb_4bit_compute_dtype", ("bfloat16", "float16", "float32"), "float32", where)
    double_quant = _flag(config, "bnb_4bit_use_double_quant", False, where)
    return QuantizationConfig(method="nf4", bits=4, double_quant=double_quant, compute_dtype=compute_dtype)


def _choice(config: dict[str, Any], key: str, allowed: tuple[Any, ...], default: Any, where: str) -> Any:
    value = config.get(key)
    value = default if value is None else value
    # The type is compared too, because True == 1 == 1.0.
    if value not in allowed or type(value) not in {type(choice) for choice in allowed}:
        raise _unsupported(where, key, value, " or ".join(repr(choice) for choice in allowed))
    return value


def _flag(config: dict[str, Any], key: str, default: bool, where: str) -> bool:
    value: bool = _choice(config, key, (True, False), default, where)
    return value


def _unsupported(where: str, key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: quantization_config has {key} {value!r}, which is not supported; {expected} was expected."
    )
