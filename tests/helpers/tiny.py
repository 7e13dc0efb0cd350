"""A random checkpoint of a few hundred kilobytes with the exact layout of the 72B: what unit tests run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from runtime.checkpoints.heads import ARCHITECTURES, LINEAR_HEAD, MLP_HEAD
from runtime.checkpoints.model_config import ModelConfig, block_prefix
from runtime.common.qwen2_tokenizer import set_qwen2_rules
from runtime.conversations.scoring_rule import ScoringRule

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\n<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% if loop.last %}{{ '<|endoftext|>' }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
# As Qwen2.5-Math-RM's: a default system text of its own, and nothing after the last <|im_end|> and line break.
MATH_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nThink step by step.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
)
WORLDPM = ScoringRule("<|endoftext|>", "the final `<|endoftext|>`")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 320  # 256 bytes, the merges, the special tokens, and rows no token reaches, as in Qwen
_MERGES = ("t h", "th e", "Ġ the", "i n", "in g", "e r", "a n", "an d", "Ġ and", "o u", "s t", "Ġ t", "Ġ a")
_MERGES += (
    "s y",
    "sy st",
    "syst e",
    "syste m",
    "u s",
    "us er",
    "a s",
    "as s",
    "i st",
    "ass ist",
    "an t",
    "assist ant",
)


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE with a few merges and the rules of Qwen2; encodes any text."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left, right in (merge.split(" ") for merge in _MERGES)]
    vocabulary = {piece: index for index, piece in enumerate(pieces + [left + right for left, right in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    set_qwen2_rules(tokenizer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(directory: Path, template: str = CHAT_TEMPLATE) -> None:
    """`tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (directory / "chat_template.jinja").write_text(template)


def tiny_config(
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    dtype: torch.dtype,
    head: tuple[str, ...] = MLP_HEAD,
) -> dict[str, Any]:
    """The `config.json` of a tiny reward model."""
    return {
        "architectures": [ARCHITECTURES[head]],
        **({"id2label": {"0": "LABEL_0"}} if head == LINEAR_HEAD else {}),
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def tiny_tensors(model_config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, random, scaled to keep activations of order 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(model_config.non_block_shapes())
    for index in range(model_config.num_hidden_layers):
        shapes |= {block_prefix(index) + name: shape for name, shape in model_config.block_shapes().items()}
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif name.endswith(".bias"):
            values = 0.1 * values
        elif name != "model.embed_tokens.weight":
            values = values * shape[1] ** -0.5
        tensors[name] = values.to(model_config.dtype)
    return tensors


def write_tiny_checkpoint(
    directory: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = VOCABULARY,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shards: int = 1,
    head: tuple[str, ...] = MLP_HEAD,
    template: str = CHAT_TEMPLATE,
) -> Path:
    """Write a checkpoint (config, weights, tokenizer, chat template) and return its directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        vocab=vocab,
        dtype=dtype,
        head=head,
    )
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(directory, template)
    write_shards(directory, tiny_tensors(ModelConfig.from_config(config), seed), shards)
    return directory


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write `model.safetensors`, or numbered shards and their index."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
