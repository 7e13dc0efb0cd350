"""A GGUF file of one small random block, as a demo wheel or a test bed holds one."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np

from tests.helpers.tiny import SPECIAL_TOKENS, tiny_tokenizer

HIDDEN, INNER, HEADS, KEY_HEADS, VOCABULARY = 64, 96, 4, 2, 320
UNUSED = "[PAD"


def write_toy_gguf(path: Path, architecture: str = "llama") -> None:
    """A model of one random block, in the tensor types of the demo's file: a Llama, or a Qwen2 with biases."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(100000.0)
    if architecture == "llama":
        writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    _add_tokenizer(writer, {"llama": "smollm", "qwen2": "qwen2"}[architecture])
    keys = KEY_HEADS * HIDDEN // HEADS
    small, large = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
    _add_tensor(writer, "token_embd", (VOCABULARY, HIDDEN), large)
    _add_tensor(writer, "output_norm", (HIDDEN,))
    _add_tensor(writer, "blk.0.attn_norm", (HIDDEN,))
    _add_tensor(writer, "blk.0.ffn_norm", (HIDDEN,))
    for name in ("attn_q", "attn_output"):
        _add_tensor(writer, f"blk.0.{name}", (HIDDEN, HIDDEN), small)
    for name in ("attn_k", "attn_v"):
        _add_tensor(writer, f"blk.0.{name}", (keys, HIDDEN), small)
    for name in ("ffn_gate", "ffn_up"):
        _add_tensor(writer, f"blk.0.{name}", (INNER, HIDDEN), small)
    _add_tensor(writer, "blk.0.ffn_down", (HIDDEN, INNER), small)
    if architecture == "qwen2":
        _add_tensor(writer, "output", (VOCABULARY, HIDDEN), large)  # the language model head
        for name, width in (("attn_q", HIDDEN), ("attn_k", keys), ("attn_v", keys)):
            writer.add_tensor(f"blk.0.{name}.bias", np.linspace(-9, 9, width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, pre_tokenizer: str) -> None:
    toy = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(toy["vocab"], key=toy["vocab"].get)
    tokens = [*SPECIAL_TOKENS, *tokens]
    tokens += [f"{UNUSED}{i}" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    kinds = dict.fromkeys(SPECIAL_TOKENS, 3) | {token: 5 for token in tokens if token.startswith(UNUSED)}
    writer.add_token_types([kinds.get(token, 1) for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in toy["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType | None = None
) -> None:
    values = np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
    if kind is None:
        writer.add_tensor(f"{name}.weight", values)
    else:
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
