"""SmolLM2's GGUF file as a WorldPM-style checkpoint: the backbone of the demo model.

Llama is Qwen2 with zero q, k and v biases, so every weight has a place in the WorldPM layout. Only two
things differ between the file and a checkpoint: tensors are dequantized to bfloat16, and the rows of q and k,
which GGUF keeps in llama.cpp's interleaved rotary order, go back to the rotate-half order of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PRE_TOKENIZER = "smollm"
CONTROL_TOKEN = int(gguf.TokenType.CONTROL)

# The empty system block stands where training had it, whether or not the caller names a system turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\n<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% if loop.last %}{{ '<|endoftext|>' }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)

_OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class SmolLM2:
    """A Llama GGUF file, read into the pieces of a `Qwen2ForRewardModel` directory. All but the head."""

    def __init__(self, path: Path):
        self._reader = gguf.GGUFReader(path)

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        heads, hidden = self._value("llama.attention.head_count"), self._value("llama.embedding_length")
        return {
            "architectures": ["Qwen2ForRewardModel"],
            "model_type": "qwen2",
            "vocab_size": self._value("llama.vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": self._value("llama.feed_forward_length"),
            "num_hidden_layers": self._value("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._value("llama.attention.head_count_kv"),
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "max_position_embeddings": self._value("llama.context_length"),
            # GGUF stores both as float32; six digits give back what the model's authors wrote.
            "rms_norm_eps": float(f"{self._value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(f"{self._value('llama.rope.freq_base'):.6g}"),
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._value("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._value("tokenizer.ggml.padding_token_id"),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor but the head's, bfloat16, named as WorldPM names them."""
        tensors = {}
        for stored in self._reader.tensors:
            name = _checkpoint_name(stored.name)
            values = gguf.dequantize(stored.data, stored.tensor_type)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = rotate_half_order(values, self._value("llama.rope.dimension_count"))
            tensors[name] = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensors[name.replace(".weight", ".bias")] = torch.zeros(len(values), dtype=torch.bfloat16)
        return tensors

    def tokenizer(self) -> Tokenizer:
        """Byte-level BPE that splits digits one by one, with the file's control tokens special."""
        kind = self._value("tokenizer.ggml.pre")
        assert kind == PRE_TOKENIZER, f"the pinned file has pre-tokenizer {kind!r}"
        tokens, kinds = self._value("tokenizer.ggml.tokens"), self._value("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """`tokenizer_config.json`, with which transformers reads `tokenizer.json` as it stands."""
        tokens = self._value("tokenizer.ggml.tokens")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._value("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "bos_token": tokens[self._value("tokenizer.ggml.bos_token_id")],
            "eos_token": tokens[self._value("tokenizer.ggml.eos_token_id")],
            "pad_token": tokens[self._value("tokenizer.ggml.padding_token_id")],
            "chat_template": CHAT_TEMPLATE,
        }

    def _value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        assert field is not None, f"the pinned file has no {key}"
        return field.contents()


def rotate_half_order(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k [heads * head_dim, in] from llama.cpp's rotary order to that of transformers.

    llama.cpp turns rows (2i, 2i + 1) of a head together, transformers rows (i, i + head_dim / 2).
    """
    out_features, in_features = weight.shape
    pairs = weight.reshape(out_features // head_dim, head_dim // 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(out_features, in_features)


def _checkpoint_name(name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    _, block, tensor, suffix = name.split(".")
    return f"model.layers.{block}.{_BLOCK_NAMES[tensor]}.{suffix}"
