"""The score heads that the kit knows, and other heads, which are refused by name.

A head is `Linear -> ReLU -> Linear`, both with bias (`Qwen2ForRewardModel`), or one linear without bias
(`Qwen2ForSequenceClassification` with one label).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoints.safetensors_file import TensorInfo
from runtime.common.errors import CheckpointError, brief

MLP_HEAD = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")
LINEAR_HEAD = ("score.weight",)
HEAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

CLASSIFIER = "Qwen2ForSequenceClassification"
ARCHITECTURES = {MLP_HEAD: "Qwen2ForRewardModel", LINEAR_HEAD: CLASSIFIER}
_PROCESS_REWARD = (
    "is a process reward model, which classifies every step of a response; the kit reads one score at the end: use an "
    "outcome reward model"
)
_LANGUAGE_MODEL = (
    "is a language model without a score head; use a reward model, or start again from the published one if a loader "
    "for language models has dropped the head"
)
_REFUSED = {
    "Qwen2ForProcessRewardModel": _PROCESS_REWARD,
    "Qwen2ForTokenClassification": _PROCESS_REWARD,
    "Qwen2ForCausalLM": _LANGUAGE_MODEL,
}
_ADAPTER = "is a LoRA adapter and no whole model; merge it into its base model (peft's merge_and_unload) and save that"
_VALUE_HEAD = (
    "is the value head of another library; save it as score.weight of a Qwen2ForSequenceClassification with one label "
    "(without its bias, which moves all scores alike)"
)
_QUANTIZED_SUFFIXES = ("qweight", "qzeros", "scales", "SCB", "absmax")


def head_of_config(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the tensors of the head that `architectures` names, `MLP_HEAD` if it names none.

    Raises:
        CheckpointError: the named model has another head, or none.
    """
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if isinstance(name, str) and name in _REFUSED:
        raise CheckpointError(f"{where}: {name} {_REFUSED[name]}.")
    if name != CLASSIFIER:
        return MLP_HEAD
    labels = config.get("num_labels", config.get("id2label"))
    count = len(labels) if isinstance(labels, dict) else labels
    if count is not None and count != 1:
        raise _several_labels(where, brief(count))
    return LINEAR_HEAD


def head_of_tensors(tensors: Mapping[str, TensorInfo], where: str) -> tuple[str, ...]:
    """Return the tensors of the head that is stored.

    Raises:
        CheckpointError: the head is quantized, incomplete, another one, or missing.
    """
    _check_unquantized(tensors, where)
    for name in tensors:
        if ".lora_" in name:
            raise CheckpointError(f"{where} {_ADAPTER} (it holds {name}).")
        if name.startswith(("v_head.", "value_head.")):
            raise CheckpointError(f"{where}: {name} {_VALUE_HEAD}.")
    linear, outer = tensors.get(LINEAR_HEAD[0]), tensors.get("score.2.weight")
    if linear is not None and len(linear.shape) == 2 and linear.shape[0] != 1:
        raise _several_labels(where, str(linear.shape[0]))
    if outer is not None and len(outer.shape) == 2 and outer.shape[0] != 1:
        raise CheckpointError(f"{where}: score.2.weight has {outer.shape[0]} rows: this {_PROCESS_REWARD}.")
    head = LINEAR_HEAD if linear is not None else MLP_HEAD
    missing = [name for name in head if name not in tensors]
    if len(missing) == len(head):
        other = next((name for name in tensors if not name.startswith("model.")), None)
        found = f" (its head holds {brief(other)})" if other else ""
        raise CheckpointError(f"{where}: score.* is missing{found}: this {_LANGUAGE_MODEL}.")
    if missing:
        raise CheckpointError(
            f"{where}: {', '.join(missing)} is missing, so this checkpoint cannot score. Loaders for language models "
            "drop the score head; start again from the published reward model."
        )
    return head


def check_no_adapter(directory: Path) -> None:
    """Refuse a directory with a LoRA adapter, which transformers would apply to the weights beside it."""
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(f"{directory} {_ADAPTER} (it holds adapter_config.json).")


def _check_unquantized(tensors: Mapping[str, TensorInfo], where: str) -> None:
    quantized = [
        name
        for name, stored in tensors.items()
        if name.startswith("score.")
        and (
            name.endswith(_QUANTIZED_SUFFIXES)
            or (name in (*MLP_HEAD, *LINEAR_HEAD) and stored.dtype not in HEAD_DTYPES)
        )
    ]
    if quantized:
        raise CheckpointError(
            f"{where}: the score head is quantized ({', '.join(quantized[:6])}), which makes scores meaningless; "
            "quantize the original model again and exclude `score`."
        )


def _several_labels(where: str, count: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {CLASSIFIER} classifies into {count} labels; a reward model has one (num_labels 1): use one that "
        "was trained to give a single score."
    )
