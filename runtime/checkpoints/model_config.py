"""Shapes of a Qwen2 reward model, read from `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from runtime.checkpoints.heads import ARCHITECTURES, MLP_HEAD, head_of_config
from runtime.common.errors import CheckpointError, brief

BLOCK_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
BIASED_LINEARS = frozenset(BLOCK_LINEARS[:3])
BLOCK_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")

LARGEST_SIZE, MOST_BLOCKS = 1 << 28, 4096  # far above any model; else a plan might count for hours

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelConfig:
    """The parts of `config.json` that the forward pass and the tensor checks need.

    Attributes:
        head_tensors: names of the score head's tensors, `MLP_HEAD` or `LINEAR_HEAD`.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    dtype: torch.dtype
    head_tensors: tuple[str, ...] = MLP_HEAD

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read a transformers config of version 4 or 5.

        Args:
            where: name of the config in error messages.

        Raises:
            CheckpointError: a key is missing, or its value is not supported.
        """
        _check_supported(config, where)
        counts = {key: _positive(config, key, where) for key in _INTEGER_KEYS}
        heads, hidden = counts["num_attention_heads"], counts["hidden_size"]
        head_dim = int(config.get("head_dim") or hidden // heads)
        if heads * head_dim != hidden or heads % counts["num_key_value_heads"]:
            raise CheckpointError(
                f"{where}: hidden_size {hidden}, num_attention_heads {heads}, head_dim {head_dim} and "
                f"num_key_value_heads {counts['num_key_value_heads']} contradict each other; restore the "
                "original config."
            )
        return cls(
            **counts,
            head_dim=head_dim,
            rms_norm_eps=_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
            rope_theta=_rope_theta(config, where),
            dtype=_dtype(config, where),
            head_tensors=head_of_config(config, where),
        )

    @property
    def architecture(self) -> str:
        """The class of the model in transformers' terms."""
        return ARCHITECTURES[self.head_tensors]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """Return (out_features, in_features) of a linear in `BLOCK_LINEARS`."""
        hidden, inner = self.hidden_size, self.intermediate_size
        key_value_features = self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_value_features, hidden),
            "self_attn.v_proj": (key_value_features, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }[name]

    def linear_flops(self, tokens: int, scored: int) -> int:
        """Return the FLOPs of the block linears for `tokens` tokens, of which `scored` are scored tokens.

        In the last block, only k_proj and v_proj run on all tokens; the others run on the scored tokens.
        """
        sizes = {name: math.prod(self.linear_shape(name)) for name in BLOCK_LINEARS}
        key_value_size = sizes["self_attn.k_proj"] + sizes["self_attn.v_proj"]
        block = sum(sizes.values())
        return 2 * (
            tokens * ((self.num_hidden_layers - 1) * block + key_value_size) + scored * (block - key_value_size)
        )

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return shapes by name of one unquantized block, without the `model.layers.N.` prefix."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(BLOCK_NORMS, (self.hidden_size,))
        for name in BLOCK_LINEARS:
            out_features, in_features = self.linear_shape(name)
            shapes[f"{name}.weight"] = (out_features, in_features)
            if name in BIASED_LINEARS:
                shapes[f"{name}.bias"] = (out_features,)
        return shapes

    def non_block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return shapes by name of the embedding, final norm and score head, which are never quantized."""
        hidden = self.hidden_size
        head = {
            "score.0.weight": (hidden, hidden),
            "score.0.bias": (hidden,),
            "score.2.weight": (1, hidden),
            "score.2.bias": (1,),
            "score.weight": (1, hidden),
        }
        return {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
            **{name: head[name] for name in self.head_tensors},
        }


_INTEGER_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def block_prefix(index: int) -> str:
    """Return `model.layers.N.`, the prefix of block `index` in tensor names."""
    return f"model.layers.{index}."


def _positive(config: dict[str, Any], key: str, where: str) -> int:
    value, most = config.get(key), MOST_BLOCKS if key == "num_hidden_layers" else LARGEST_SIZE
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise CheckpointError(
            f"{where}: {key} is {brief(value)}; a positive whole number was expected, at most {most:,}."
        )
    return value


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {key} is {brief(value)}; a positive number was expected.")
    return float(value)


def _check_supported(config: dict[str, Any], where: str) -> None:
    if config.get("model_type") != "qwen2":
        raise CheckpointError(
            f"{where}: model_type is {brief(config.get('model_type'))}; only reward models with a Qwen2 backbone "
            "(model_type qwen2), such as Qwen/WorldPM-72B, are supported."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act is {brief(config['hidden_act'])}; Qwen2 uses 'silu'.")
    layers = config.get("layer_types") or []
    if config.get("use_sliding_window") or any(each != "full_attention" for each in layers):
        key = "use_sliding_window" if config.get("use_sliding_window") else "layer_types"
        raise CheckpointError(
            f"{where}: {key} is {brief(config[key])}; sliding windows are not supported, use a model whose layers all "
            "have full attention."
        )


def _rope_theta(config: dict[str, Any], where: str) -> float:
    """Read the base of the rotary embedding from either spelling; readers of one must not differ from the other."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: rope_parameters is {brief(rope)}; an object was expected.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{where}: rope type is {brief(kind)}; only plain rotary embeddings are supported.")
    values = [value for value in (rope.get("rope_theta"), config.get("rope_theta")) if value is not None]
    theta, *others = (_number(value, "rope_theta", where) for value in values or [None])
    if others and others != [theta]:
        raise CheckpointError(
            f"{where}: rope_theta is {others[0]:g}, but {theta:g} in rope_parameters; restore the original config."
        )
    return theta


def _dtype(config: dict[str, Any], where: str) -> torch.dtype:
    """Read the dtype; without one, that of the published models, until the tensors show theirs."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if name not in DTYPES:
        raise CheckpointError(f"{where}: dtype is {brief(name)}; one of {', '.join(DTYPES)} was expected.")
    return DTYPES[name]
