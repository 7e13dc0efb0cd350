"""Convert SmolLM2's GGUF file to the backbone of a WorldPM-style checkpoint.

SmolLM2 has the Llama architecture: Qwen2 with zero q, k and v biases. So all its weights fit the WorldPM layout.
Tensors are dequantized to bfloat16. The rows of q and k are reordered from llama.cpp's interleaved rotary layout to the
rotate-half layout of transformers.
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

# Without a system turn the prompt starts with an empty system block, as in the score head's training.
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
    """A Llama GGUF file, converted to the files of a `Qwen2ForRewardModel` checkpoint, without the score head."""

    def __init__(self, path: Path):
        self._reader = gguf.GGUFReader(path)

    def config(self) -> dict[str, Any]:
        """Contents of `config.json`."""
        heads, hidden = (
            self._metadata_value("llama.attention.head_count"),
            self._metadata_value("llama.embedding_length"),
        )
        return {
            "architectures": ["Qwen2ForRewardModel"],
            "model_type": "qwen2",
            "vocab_size": self._metadata_value("llama.vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": self._metadata_value("llama.feed_forward_length"),
            "num_hidden_layers": self._metadata_value("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._metadata_value("llama.attention.head_count_kv"),
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "max_position_embeddings": self._metadata_value("llama.context_length"),
            # GGUF stores both as float32; six digits restore the values in the original config.
            "rms_norm_eps": float(f"{self._metadata_value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(f"{self._metadata_value('llama.rope.freq_base'):.6g}"),
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "bos_token_id": self._metadata_value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._metadata_value("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._metadata_value("tokenizer.ggml.padding_token_id"),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors except the head's, bfloat16, with the names of the WorldPM layout."""
        tensors = {}
        for stored in self._reader.tensors:
            name = _checkpoint_name(stored.name)
            values = gguf.dequantize(stored.data, stored.tensor_type)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = rotate_half_order(values, self._metadata_value("llama.rope.dimension_count"))
            tensors[name] = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensors[name.replace(".weight", ".bias")] = torch.zeros(len(values), dtype=torch.bfloat16)
        return tensors

    def tokenizer(self) -> Tokenizer:
        """Byte-level BPE that splits digits one by one; the file's control tokens become special tokens."""
        kind = self._metadata_value("tokenizer.ggml.pre")
        assert kind == PRE_TOKENIZER, f"the pinned file has pre-tokenizer {kind!r}"
        tokens, kinds = self._metadata_value("tokenizer.ggml.tokens"), self._metadata_value("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._metadata_value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """Contents of `tokenizer_config.json`, with which transformers reads `tokenizer.json` unchanged."""
        tokens = self._metadata_value("tokenizer.ggml.tokens")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._metadata_value("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "bos_token": tokens[self._metadata_value("tokenizer.ggml.bos_token_id")],
            "eos_token": tokens[self._metadata_value("tokenizer.ggml.eos_token_id")],
            "pad_token": tokens[self._metadata_value("tokenizer.ggml.padding_token_id")],
            "chat_template": CHAT_TEMPLATE,
        }

    def _metadata_value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        assert field is not None, f"the pinned file has no {key}"
        return field.contents()


def rotate_half_order(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of q or k [heads * head_dim, in] from llama.cpp's rotary layout to that of transformers.

    llama.cpp rotates rows (2i, 2i + 1) of a head together, transformers rows (i, i + head_dim / 2).
    """
    out_features, in_features = weight.shape
    pairs = weight.reshape(out_features // head_dim, head_dim // 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(out_features, in_features)


def _checkpoint_name(name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    _, block, tensor, suffix = name.split(".")
    return f"model.layers.{block}.{_BLOCK_NAMES[tensor]}.{suffix}"
