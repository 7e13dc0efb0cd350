"""Test beds: a Qwen2 GGUF file becomes a checkpoint in WorldPM's layout."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from benchmarks.testbeds import TESTBEDS, Qwen2, empty_head
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.conversations.rendering import Renderer
from runtime.demo.gguf_backbone import SmolLM2
from tests.helpers.toy_gguf import HIDDEN, UNUSED, write_toy_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    write_toy_gguf(path, "qwen2")
    return path


def test_the_checkpoint_opens_and_renders(file: Path, tmp_path: Path) -> None:
    backbone = Qwen2(file)
    backbone.write(tmp_path, empty_head(backbone))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.model_config.num_hidden_layers == 1
    turns = [{"role": "user", "content": "the thing"}, {"role": "assistant", "content": "and 12"}]
    rendered = Renderer.from_directory(tmp_path, 512).render(turns)
    assert rendered.scored_index == len(rendered.token_ids) - 1


def test_biases_are_kept_rows_stay_in_order_and_the_output_layer_is_dropped(file: Path) -> None:
    tensors = Qwen2(file).tensors()
    stored = {each.name: each for each in gguf.GGUFReader(file).tensors}
    for part in "qk":
        source = stored[f"blk.0.attn_{part}.weight"]
        expected = torch.from_numpy(gguf.dequantize(source.data, source.tensor_type)).bfloat16()
        assert torch.equal(tensors[f"model.layers.0.self_attn.{part}_proj.weight"], expected)
    bias = tensors["model.layers.0.self_attn.q_proj.bias"]
    assert torch.equal(bias, torch.linspace(-9, 9, HIDDEN).bfloat16())
    assert not any(name.startswith("output") or "lm_head" in name for name in tensors)


def test_padding_entries_are_no_tokens(file: Path) -> None:
    tokenizer = Qwen2(file).tokenizer()
    assert not any(token.startswith(UNUSED) for token in tokenizer.get_vocab())
    assert Qwen2(file).config()["vocab_size"] > tokenizer.get_vocab_size()


def test_another_architecture_is_refused(file: Path) -> None:
    with pytest.raises(AssertionError, match="general.architecture is 'qwen2', not 'llama'"):
        SmolLM2(file)


def test_test_beds_are_pinned() -> None:
    assert all(len(each.sha256) == 64 and each.parts > 1 and each.version for each in TESTBEDS.values())
