"""The loader table: the ways in which libraries save a model, each with the same scores or with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from runtime import Scorer
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.checkpoints.heads import LINEAR_HEAD, MLP_HEAD
from runtime.common.errors import CheckpointError
from tests.helpers.damage import change_json, change_tensors
from tests.helpers.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer, write_shards, write_tiny_checkpoint
from tests.helpers.tiny_score import assistant, user

CONVERSATIONS = [[user("What is it?"), assistant("the answer " * size)] for size in (1, 4, 30)]
Change = Callable[[Path], object]
LAYERS = ["full_attention", "full_attention"]
THETA = {"rope_type": "default", "rope_theta": 10000.0}


def config(*removed: str, **changes: object) -> Change:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in removed}
        file.write_text(json.dumps(kept | changes))

    return change


def tensors(change: Callable[[dict], object]) -> Change:
    return lambda directory: change_tensors(directory, change)


def both(*changes: Change) -> Change:
    return lambda directory: [change(directory) for change in changes]


def template(file: str | None = None, value: object = CHAT_TEMPLATE, key: str = "chat_template") -> Change:
    """Put the template in one file only; tokenizer_config.json loses it unless it is that file."""

    def change(directory: Path) -> None:
        (directory / "chat_template.jinja").unlink()
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        del settings["chat_template"]
        if file == "tokenizer_config.json":
            settings[key] = value
        elif file:
            (directory / file).write_text(value if file.endswith(".jinja") else json.dumps({key: value}))
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))

    return change


def vocabulary_and_merges(added: str) -> Change:
    """Replace tokenizer.json by the files of older versions, with the added tokens in the file `added`."""

    def change(directory: Path) -> None:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        model = json.loads(tokenizer.to_str())["model"]
        (directory / "tokenizer.json").unlink()
        (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
        (directory / "merges.txt").write_text("#version: 0.2\n" + merges)
        ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        if added == "added_tokens.json":
            (directory / added).write_text(json.dumps(ids))
        else:
            flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
            described = {str(index): {"content": token, **flags} for token, index in ids.items()}
            change_json(directory / "tokenizer_config.json", added_tokens_decoder=described)

    return change


def reshard(shards: int, index: Callable[[dict], dict] = lambda index: index) -> Change:
    def change(directory: Path) -> None:
        stored = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        write_shards(directory, {name: tensor.clone() for name, tensor in stored.items()}, shards)
        file = directory / "model.safetensors.index.json"
        file.write_text(json.dumps(index(json.loads(file.read_text()))))

    return change


def in_float32(*names: str) -> Change:
    return tensors(lambda held: held.update({name: held[name].float() for name in names or list(held)}))


def with_lm_head(held: dict) -> None:
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()


LOADS: dict[str, Change] = {
    "rope_theta and torch_dtype, as older transformers write": lambda directory: None,
    "rope_parameters and dtype, as newer ones write": config(
        "rope_theta", "torch_dtype", rope_parameters=THETA, dtype="bfloat16", layer_types=LAYERS
    ),
    "both spellings": config(rope_parameters=THETA, dtype="bfloat16"),
    "an empty rope_scaling": config(rope_scaling=None),
    "no dtype": config("torch_dtype"),
    "a dtype that all tensors contradict": config(torch_dtype="float32"),
    "all tensors in float32, the config says bfloat16": in_float32(),
    "no architectures": config("architectures"),
    "vocab.json and merges.txt, tokens in tokenizer_config.json": vocabulary_and_merges("tokenizer_config.json"),
    "vocab.json and merges.txt, tokens in added_tokens.json": vocabulary_and_merges("added_tokens.json"),
    "chat_template.jinja alone": template("chat_template.jinja"),
    "chat_template.json": template("chat_template.json"),
    "the template in tokenizer_config.json": template("tokenizer_config.json"),
    "named templates": template(
        "tokenizer_config.json", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    ),
    "shards": reshard(3),
    "an index without metadata": reshard(3, lambda index: {"weight_map": index["weight_map"]}),
    "one shard with an index": reshard(2, lambda index: index),
    "tied embeddings": config(tie_word_embeddings=True),
    "a stray lm_head": tensors(with_lm_head),
    "a score head in float32": in_float32(*MLP_HEAD),
    "norms in float32": tensors(lambda held: held.update({n: t.float() for n, t in held.items() if "norm" in n})),
}


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> torch.Tensor:
    return scores(tiny_checkpoint)


def scores(directory: Path) -> torch.Tensor:
    return Scorer.from_pretrained(directory, devices="cpu", dtype="float32").score(CONVERSATIONS)


@pytest.mark.parametrize("case", LOADS)
def test_a_way_to_save_a_model_gives_equal_scores(damaged, expected, case):
    LOADS[case](damaged)
    assert torch.equal(scores(damaged), expected)


def outer_rows(count: int) -> Change:
    return tensors(lambda held: held.update({"score.2.weight": torch.zeros(count, 64).bfloat16()}))


def without_head(held: dict) -> None:
    for name in MLP_HEAD:
        del held[name]


def replace_head(name: str, rows: int = 1) -> Change:
    def change(held: dict) -> None:
        without_head(held)
        held[name] = torch.zeros(rows, 64).bfloat16()

    return tensors(change)


LORA = "model.layers.0.self_attn.q_proj.lora_A.weight"
CLASSIFIER = {"architectures": ["Qwen2ForSequenceClassification"]}
REFUSED: dict[str, tuple[Change, str]] = {
    "a process reward model, by its class": (
        config(architectures=["Qwen2ForProcessRewardModel"]),
        "Qwen2ForProcessRewardModel is a process reward model, which classifies every step",
    ),
    "a process reward model, by its tensors": (outer_rows(2), "score.2.weight has 2 rows: this is a process reward"),
    "a classifier of tokens": (config(architectures=["Qwen2ForTokenClassification"]), "use an outcome reward model"),
    "a classifier with several labels": (
        config(**CLASSIFIER, id2label={"0": "bad", "1": "good"}),
        r"classifies into 2 labels; a reward model has one \(num_labels 1\)",
    ),
    "several labels, by its tensors": (both(config(**CLASSIFIER), replace_head("score.weight", 3)), "into 3 labels"),
    "a value head": (replace_head("v_head.summary.weight"), "v_head.summary.weight is the value head of another libr"),
    "a language model, by its class": (
        config(architectures=["Qwen2ForCausalLM"]),
        "Qwen2ForCausalLM is a language model without a score head; use a reward model",
    ),
    "a language model, by its tensors": (tensors(without_head), "score.* is missing: this is a language model"),
    "a head of another name": (replace_head("reward_head.weight"), r"its head holds 'reward_head.weight'"),
    "an adapter beside weights": (
        lambda directory: (directory / "adapter_config.json").write_text("{}"),
        r"is a LoRA adapter and no whole model; merge it .* \(it holds adapter_config.json\)",
    ),
    "an adapter's tensors": (
        tensors(lambda held: held.update({LORA: torch.zeros(4, 64).bfloat16()})),
        f"is a LoRA adapter .*{LORA}",
    ),
    "another backbone": (config(model_type="llama"), "model_type is 'llama'; only reward models with a Qwen2 backbone"),
    "sliding windows": (config(use_sliding_window=True), "use_sliding_window is True; sliding windows are not supp"),
    "sliding windows by layer": (
        config(layer_types=["full_attention", "sliding_attention"]),
        "layer_types is .*; sliding windows are not supported",
    ),
    "scaled rotary embeddings": (config(rope_scaling={"type": "yarn", "factor": 4}), "rope type is 'yarn'"),
    "two rope_theta": (
        config(rope_parameters=THETA | {"rope_theta": 1e6}),
        r"rope_theta is 10000, but 1e\+06 in rope_parameters",
    ),
    "no rope_theta": (config("rope_theta"), "rope_theta is None; a positive number was expected"),
    "tensors of two dtypes": (in_float32("model.layers.0.mlp.up_proj.weight"), "expected bfloat16"),
    "pickles": (
        lambda directory: (directory / "model.safetensors").rename(directory / "pytorch_model.bin"),
        "its .*bin pickles are never read, convert them",
    ),
    "an index without weight_map": (reshard(2, lambda index: {"metadata": {}}), "has no weight_map"),
    "named templates without a default": (
        template("tokenizer_config.json", [{"name": "tool_use", "template": CHAT_TEMPLATE}]),
        "has chat templates named 'tool_use', and none named default",
    ),
    "no template": (template(), "has no chat_template, and chat_template.jinja is missing"),
    "vocab.json alone": (
        both(vocabulary_and_merges("added_tokens.json"), lambda directory: (directory / "merges.txt").unlink()),
        "tokenizer.json is missing, and so are vocab.json and merges.txt",
    ),
    "added tokens with other ids": (
        both(
            vocabulary_and_merges("added_tokens.json"),
            lambda directory: (directory / "added_tokens.json").write_text('{"<|im_end|>": 300}'),
        ),
        r"'<\|im_end\|>' has the id 300",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_read_is_refused_with_the_reason(damaged, case):
    change, reason = REFUSED[case]
    change(damaged)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(damaged).renderer()
    assert len(str(caught.value).removeprefix(str(damaged))) < 400


# ---- what the table does not show -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (config(torch_dtype="float16"), "config.json says dtype float16, but all tensors are bfloat16"),
        (in_float32(), "config.json says dtype bfloat16, but all tensors are float32"),
    ],
)
def test_a_contradicted_dtype_is_said(damaged, change, said):
    assert open_checkpoint(damaged).notes == ()
    change(damaged)
    (note,) = open_checkpoint(damaged).notes
    assert note.startswith(said)


def test_a_linear_head_is_found_by_its_tensor(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, head=LINEAR_HEAD)
    config("architectures", "id2label")(directory)
    assert open_checkpoint(directory).model_config.architecture == "Qwen2ForSequenceClassification"


@pytest.mark.parametrize("added", ["tokenizer_config.json", "added_tokens.json"])
def test_vocabulary_and_merges_give_the_ids_of_transformers(damaged, added):
    vocabulary_and_merges(added)(damaged)
    theirs = AutoTokenizer.from_pretrained(damaged)
    renderer = open_checkpoint(damaged).renderer()
    for text in (
        "a.\n\nB",
        "It's we'll THEY'RE 2nd 123",
        "naïve e\u0301 北 ﬁ",
        "```py\tx = 1```\r\n\r\n  ",
        "the and thing",
    ):
        conversation = [{"role": "system", "content": ""}, user(text), assistant(text)]
        assert renderer.render(conversation).token_ids == theirs.apply_chat_template(conversation, return_dict=False)
    assert tiny_tokenizer().get_vocab() == renderer._tokenizer.get_vocab()
