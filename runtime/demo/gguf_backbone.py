"""Convert a GGUF file to the backbone of a WorldPM-style checkpoint: config, tensors, tokenizer and chat template.

The demo's file is SmolLM2, a Llama: the Qwen2 architecture with zero q, k and v biases, so all its weights fit the
WorldPM layout. Tensors are dequantized to bfloat16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models

from runtime.common.files import write_file_atomically
from runtime.common.qwen2_tokenizer import set_qwen2_rules
from runtime.common.safetensors_writer import write_safetensors

NORMAL_TOKEN, CONTROL_TOKEN, UNUSED_TOKEN = (
    int(kind) for kind in (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.UNUSED)
)

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


class GGUFBackbone:
    """A GGUF file, converted to the files of a `Qwen2ForRewardModel` checkpoint, without the score head.

    Attributes:
        architecture: the file's `general.architecture`, the prefix of its metadata.
        pre_tokenizer: the file's `tokenizer.ggml.pre`.
    """

    architecture: ClassVar[str]
    pre_tokenizer: ClassVar[str]

    def __init__(self, path: Path):
        self._reader = gguf.GGUFReader(path)
        for key, expected in (("general.architecture", self.architecture), ("tokenizer.ggml.pre", self.pre_tokenizer)):
            assert (found := self._metadata_value(key)) == expected, f"{path}: {key} is {found!r}, not {expected!r}"

    def config(self) -> dict[str, Any]:
        """Contents of `config.json`."""
        heads, hidden = self._value("attention.head_count"), self._value("embedding_length")
        return {
            "architectures": ["Qwen2ForRewardModel"],
            "model_type": "qwen2",
            "vocab_size": len(self._metadata_value("tokenizer.ggml.tokens")),
            "hidden_size": hidden,
            "intermediate_size": self._value("feed_forward_length"),
            "num_hidden_layers": self._value("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._value("attention.head_count_kv"),
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "max_position_embeddings": self._value("context_length"),
            # GGUF stores both as float32; six digits restore the values in the original config.
            "rms_norm_eps": float(f"{self._value('attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(f"{self._value('rope.freq_base'):.6g}"),
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
            if stored.name == "output.weight":  # a reward model has no language model head
                continue
            name = _checkpoint_name(stored.name)
            values = gguf.dequantize(stored.data, stored.tensor_type)
            tensors[name] = torch.from_numpy(np.array(self.reorder(name, values), dtype=np.float32)).bfloat16()
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                zeros = torch.zeros(len(values), dtype=torch.bfloat16)
                tensors.setdefault(name.replace(".weight", ".bias"), zeros)
        return tensors

    def reorder(self, name: str, values: np.ndarray) -> np.ndarray:
        """The rows of tensor `name` in the order of transformers."""
        return values

    def tokenizer(self) -> Tokenizer:
        """Byte-level BPE with the file's tokens and merges, and the rules of Qwen2.

        The file's control tokens become special tokens; its padding entries are left out.
        """
        tokens, kinds = self._metadata_value("tokenizer.ggml.tokens"), self._metadata_value("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._metadata_value("tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens) if kinds[index] != UNUSED_TOKEN}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        set_qwen2_rules(tokenizer)
        for token, kind in zip(tokens, kinds, strict=True):
            if kind not in (NORMAL_TOKEN, UNUSED_TOKEN):
                tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL_TOKEN, normalized=False)])
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """Contents of `tokenizer_config.json`, with which transformers reads `tokenizer.json` unchanged."""
        tokens = self._metadata_value("tokenizer.ggml.tokens")
        return {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": self._value("context_length"),
            "clean_up_tokenization_spaces": False,
            "bos_token": tokens[self._metadata_value("tokenizer.ggml.bos_token_id")],
            "eos_token": tokens[self._metadata_value("tokenizer.ggml.eos_token_id")],
            "pad_token": tokens[self._metadata_value("tokenizer.ggml.padding_token_id")],
            "chat_template": CHAT_TEMPLATE,
        }

    def write(self, directory: Path, head: dict[str, torch.Tensor]) -> None:
        """Write the files of a checkpoint with the score head `head`, byte-identical for the same inputs."""
        write_safetensors(directory / "model.safetensors", {**self.tensors(), **head}, {"format": "pt"})
        write_json(directory / "config.json", self.config())
        write_json(directory / "tokenizer_config.json", self.tokenizer_config())
        write_file_atomically(directory / "tokenizer.json", self.tokenizer().to_str(pretty=True) + "\n")
        write_file_atomically(directory / "chat_template.jinja", CHAT_TEMPLATE)

    def _value(self, key: str) -> Any:
        return self._metadata_value(f"{self.architecture}.{key}")

    def _metadata_value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        assert field is not None, f"the file has no {key}"
        return field.contents()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON."""
    write_file_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class SmolLM2(GGUFBackbone):
    """SmolLM2, a Llama: q and k rows are in llama.cpp's interleaved rotary layout."""

    architecture = "llama"
    pre_tokenizer = "smollm"

    def reorder(self, name: str, values: np.ndarray) -> np.ndarray:
        """Bring q and k to the rotate-half layout of transformers."""
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return values
        return rotate_half_order(values, self._value("rope.dimension_count"))


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
