"""Expected tensors of a checkpoint: names, dtypes and shapes, and the errors for those that differ."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoints.model_config import (
    BIASED_LINEARS,
    BLOCK_LINEARS,
    BLOCK_NORMS,
    ModelConfig,
    block_prefix,
)
from runtime.checkpoints.quantization_config import (
    NF4_BLOCKSIZE,
    NF4_NESTED_BLOCKSIZE,
    NF4_QUANT_STATE,
    ExpectedTensor,
    QuantizationConfig,
)
from runtime.checkpoints.safetensors_file import TensorInfo
from runtime.common.errors import CheckpointError, brief

FLOATING = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


def is_ignored(name: str) -> bool:
    """Return whether a tensor is unused: an LM head (2.5 GB in the 72B), or rotary tables stored by old writers."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def check_layout(
    tensors: Mapping[str, TensorInfo],
    model_config: ModelConfig,
    quantization: QuantizationConfig | None,
    where: str,
) -> None:
    """Compare names, dtypes and shapes of the stored tensors with those that the config implies.

    Raises:
        CheckpointError: tensors are missing, unexpected or different.
    """
    _check_block_count(tensors, model_config.num_hidden_layers, where)
    expected = expected_tensors(model_config, quantization)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    mismatches = [
        mismatch for name in expected if name in tensors for mismatch in _mismatch(name, tensors[name], expected[name])
    ]
    if not (missing or unexpected or mismatches):
        return
    parts = [
        f"{label} ({len(names)}): {_join_names(names)}."
        for label, names in (("Missing", missing), ("Unexpected", unexpected), ("Different", mismatches))
        if names
    ]
    raise CheckpointError(f"{where}: the tensors do not match config.json. " + " ".join(parts))


def expected_tensors(model_config: ModelConfig, quantization: QuantizationConfig | None) -> dict[str, ExpectedTensor]:
    """Return dtype and shape by tensor name. A dtype of None means any in `FLOATING`, a shape of None any vector."""
    # Some writers keep norms and head in fp32, or other tensors in fp16 beside quantized weights. Both are accepted.
    unquantized_dtype = model_config.dtype if quantization is None else None
    expected: dict[str, ExpectedTensor] = {
        name: (unquantized_dtype if name == "model.embed_tokens.weight" else None, shape)
        for name, shape in model_config.non_block_shapes().items()
    }
    block: dict[str, ExpectedTensor] = {}
    for index in range(model_config.num_hidden_layers):
        if index == 0 or (quantization and quantization.overrides):  # otherwise all blocks are alike
            quantizations = quantization.of_block(index) if quantization else None
            block = _expected_block(model_config, quantizations, unquantized_dtype)
        expected |= {block_prefix(index) + name: entry for name, entry in block.items()}
    return expected


def _expected_block(
    model_config: ModelConfig,
    quantizations: Mapping[str, QuantizationConfig] | None,
    unquantized_dtype: torch.dtype | None,
) -> dict[str, ExpectedTensor]:
    shapes = model_config.block_shapes()
    block: dict[str, ExpectedTensor] = {name: (None, shapes[name]) for name in BLOCK_NORMS}
    for name in BLOCK_LINEARS:
        if quantizations is None:
            suffixes = ("weight", "bias") if name in BIASED_LINEARS else ("weight",)
            block |= {f"{name}.{suffix}": (unquantized_dtype, shapes[f"{name}.{suffix}"]) for suffix in suffixes}
        else:
            stored = quantizations[name].linear_tensors(*model_config.linear_shape(name), bias=name in BIASED_LINEARS)
            block |= {f"{name}.{suffix}": entry for suffix, entry in stored.items()}
    return block


def common_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype | None:
    """Return the dtype of embedding and blocks, apart from the norms; None if they have several, or another kind."""
    dtypes = {
        stored.dtype
        for name, stored in tensors.items()
        if name == "model.embed_tokens.weight" or (_BLOCK.match(name) and not name.endswith(BLOCK_NORMS))
    }
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(FLOATING) else None


def _check_block_count(tensors: Iterable[str], count: int, where: str) -> None:
    """Check num_hidden_layers against the tensor names, before names are generated for each block."""
    found = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
    if len(found) != count or max(found, default=-1) != count - 1:
        raise CheckpointError(
            f"{where}: config.json says num_hidden_layers {count}, but the weights hold {len(found)} blocks "
            f"(the last is number {max(found, default=None)}); config and weights belong to different models."
        )


def _mismatch(name: str, stored: TensorInfo, expected: ExpectedTensor) -> list[str]:
    dtype, shape = expected
    fits_dtype = stored.dtype in FLOATING if dtype is None else stored.dtype == dtype
    fits_shape = len(stored.shape) == 1 if shape is None else stored.shape == shape
    if fits_dtype and fits_shape:
        return []
    wanted = f"{_dtype_name(dtype) if dtype else 'floating'} {list(shape) if shape is not None else '[any]'}"
    return [f"{name} is {_dtype_name(stored.dtype)} {list(stored.shape)}, expected {wanted}"]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _join_names(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_nf4_quant_state(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    """Parse the JSON quant state of an NF4 linear and check it against `shape` and the supported block sizes.

    Raises:
        CheckpointError: the JSON is damaged, or describes another shape or another block size than 64.
    """
    try:
        state = json.loads(tensors[NF4_QUANT_STATE].cpu().numpy().tobytes())
        found = {key: state.get(key) for key in ("quant_type", "blocksize", "shape")}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{NF4_QUANT_STATE} is not the JSON text that bitsandbytes writes ({error}).") from error
    expected: dict[str, Any] = {"quant_type": "nf4", "blocksize": NF4_BLOCKSIZE, "shape": list(shape)}
    if "weight.nested_absmax" in tensors:
        expected["nested_blocksize"] = NF4_NESTED_BLOCKSIZE
        found["nested_blocksize"] = state.get("nested_blocksize")
        offset = state.get("nested_offset")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise CheckpointError(f"{NF4_QUANT_STATE} has nested_offset {brief(offset)}; a finite number was expected.")
    if found != expected:
        raise CheckpointError(f"{NF4_QUANT_STATE} is {found}; {expected} was expected.")
    return dict(state)
