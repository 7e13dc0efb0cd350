"""Which tensors a checkpoint must hold, and what it means when it holds others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from runtime.architecture import (
    BIASED_LINEARS,
    BLOCK_LINEARS,
    BLOCK_NORMS,
    HEAD_TENSORS,
    Architecture,
    block_prefix,
)
from runtime.errors import CheckpointError
from runtime.quantization import Expected, Quantization
from runtime.shard import StoredTensor

FLOATING = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = re.compile(r"model\.layers\.(\d+)\.")
_QUANTIZED_SUFFIXES = ("qweight", "qzeros", "scales", "SCB", "absmax")


def is_ignored(name: str) -> bool:
    """A stray language-model head (2.5 GB in the 72B), and tables that old writers stored."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def check_layout(
    tensors: Mapping[str, StoredTensor],
    architecture: Architecture,
    quantization: Quantization | None,
    where: str,
) -> None:
    """Compare names, dtypes and shapes with what the config promises.

    Raises:
        CheckpointError: the head is missing or quantized, or tensors are missing, unexpected or different.
    """
    check_head(tensors, where)
    _check_block_count(tensors, architecture.num_hidden_layers, where)
    expected = expected_tensors(architecture, quantization)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    misfits = [fault for name in expected if name in tensors for fault in _misfit(name, tensors[name], expected[name])]
    if not (missing or unexpected or misfits):
        return
    parts = [
        f"{label} ({len(names)}): {_listed(names)}."
        for label, names in (("Missing", missing), ("Unexpected", unexpected), ("Different", misfits))
        if names
    ]
    raise CheckpointError(f"{where}: the tensors are not those its config.json describes. " + " ".join(parts))


def expected_tensors(architecture: Architecture, quantization: Quantization | None) -> dict[str, Expected]:
    """Every tensor by its full name. A dtype of None means any of `FLOATING`, a shape of None any vector."""
    # Writers keep norms and head in fp32, or leave fp16 beside quantized weights; both lose nothing.
    plain = architecture.dtype if quantization is None else None
    outer: dict[str, Expected] = {
        name: (plain if name == "model.embed_tokens.weight" else None, shape)
        for name, shape in architecture.outer_shapes().items()
    }
    block: dict[str, Expected] = {}
    shapes = architecture.block_shapes()
    for name in BLOCK_NORMS:
        block[name] = (None, shapes[name])
    for name in BLOCK_LINEARS:
        if quantization is None:
            suffixes = ("weight", "bias") if name in BIASED_LINEARS else ("weight",)
            block |= {f"{name}.{suffix}": (plain, shapes[f"{name}.{suffix}"]) for suffix in suffixes}
        else:
            stored = quantization.linear_tensors(*architecture.linear_shape(name), bias=name in BIASED_LINEARS)
            block |= {f"{name}.{suffix}": entry for suffix, entry in stored.items()}
    blocks = range(architecture.num_hidden_layers)
    return outer | {block_prefix(index) + name: entry for index in blocks for name, entry in block.items()}


def check_head(tensors: Mapping[str, StoredTensor], where: str) -> None:
    """The four tensors of the score head are there and floating.

    Raises:
        CheckpointError: with the tensors that are not.
    """
    quantized = [
        name
        for name, stored in tensors.items()
        if name.startswith("score.")
        and (name.endswith(_QUANTIZED_SUFFIXES) or (name in HEAD_TENSORS and stored.dtype not in FLOATING))
    ]
    if quantized:
        raise CheckpointError(
            f"{where}: the score head is quantized ({_listed(quantized)}), which makes scores meaningless; "
            "quantize the original again with `score` left out."
        )
    missing = [name for name in HEAD_TENSORS if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{where}: {_listed(missing)} is missing, so this checkpoint cannot score; loaders that take it "
            "for a language model drop the score head, so start again from the published reward model."
        )


def _check_block_count(tensors: Iterable[str], count: int, where: str) -> None:
    """Before any name is made up for a block: a config may claim a billion of them."""
    found = {int(match[1]) for name in tensors if (match := _BLOCK.match(name))}
    if len(found) != count or max(found, default=-1) != count - 1:
        raise CheckpointError(
            f"{where}: config.json says num_hidden_layers {count}, but the weights hold {len(found)} blocks "
            f"(the last is number {max(found, default=None)}); config and weights belong to different models."
        )


def _misfit(name: str, stored: StoredTensor, expected: Expected) -> list[str]:
    dtype, shape = expected
    fits_dtype = stored.dtype in FLOATING if dtype is None else stored.dtype == dtype
    fits_shape = len(stored.shape) == 1 if shape is None else stored.shape == shape
    if fits_dtype and fits_shape:
        return []
    wanted = f"{_short(dtype) if dtype else 'floating'} {list(shape) if shape is not None else '[any]'}"
    return [f"{name} is {_short(stored.dtype)} {list(stored.shape)}, expected {wanted}"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
