"""A packed model uploaded to a stand-in of the hub: what goes and what stays, interrupted, retried, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import close_session

from quantize.export import main, parse
from quantize.report.model_card import base_model_id, read_licence
from runtime.checkpoints.checkpoint import open_checkpoint
from tests.helpers.hub import TOKEN, WEAK_TOKEN, StandInHub, stand_in_hub
from tests.helpers.processes import start_process
from tests.helpers.tiny_job import quantize, write_job_model, write_pairs

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = "me/WorldPM-tiny-GPTQ"
STAYS = ("job/", "parity_pairs.jsonl")
GOES = (
    *("README.md", "chat_template.jinja", "config.json"),
    *(f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)),
    *("model.safetensors.index.json", "parity.html", "parity.json", "parity.junit.xml", "quantize_config.json"),
    *("reference_scores.json", "tokenizer.json", "tokenizer_config.json"),
)
DOWNLOAD = """
import sys
from runtime.checkpoints.checkpoint import open_checkpoint
for source in sys.argv[1:]:
    checkpoint = open_checkpoint(source)
    print(checkpoint.name, checkpoint.commit, checkpoint.fingerprint())
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("push")
    model = write_job_model(place / "WorldPM-72B", layers=2)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The original\n")
    pairs = write_pairs(place / "pairs.jsonl")
    assert quantize(model, pairs, place / "packed") == 0
    return place / "packed"


@pytest.fixture
def model(packed: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(packed, tmp_path / "packed"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    with stand_in_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path)
        yield hub
    close_session()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path) -> None:
    """Send the client in this process to `url`, without Xet storage, whose protocol the stand-in does not speak."""
    close_session()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def push(model: Path, *more: str, to: str = REPOSITORY) -> int:
    return main([str(model), "--push-to", to, *more])


def listed(text: str) -> tuple[list[str], list[str]]:
    """The names in the lists of what is uploaded and what is not."""
    goes, _, stays = text.partition("Not uploaded")
    return tuple(re.findall(r"^  (\S+)", each, re.MULTILINE) for each in (goes, stays))


# What goes and what stays


@pytest.mark.parametrize("transfer", ["large files on their own", "all in the commit"])
def test_what_was_made_is_uploaded_without_a_text_of_the_data(hub, packed, monkeypatch, capfd, transfer):
    """The second case runs the client's streamed pipeline, its default, which needs Xet storage for large files."""
    if transfer == "all in the commit":
        hub.large = "^$"
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert push(packed) == 0
    printed = capfd.readouterr().err
    assert listed(printed) == ([*GOES], [*STAYS])
    assert f"Uploaded: {len(GOES)} files, " in printed and f"uploaded    {hub.url}/{REPOSITORY}" in printed
    assert f"commit      {hub.commits[REPOSITORY][-1][0]}" in printed and "note:" not in printed
    files = hub.files(REPOSITORY)
    assert sorted(files) == [".gitattributes", *GOES] and hub.visibility[REPOSITORY] == "private"
    rewritten = ("README.md", "parity.html", "parity.json")
    assert all(files[name] == (packed / name).read_bytes() for name in GOES if name not in rewritten)
    everything = b"\n".join(files.values())
    for row in map(json.loads, (packed / "parity_pairs.jsonl").read_text().splitlines()):
        for text in (row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]):
            assert text.encode() not in everything
    assert json.loads(files["parity.json"])["figures"] == json.loads((packed / "parity.json").read_text())["figures"]


def test_rows_go_if_asked_for_and_a_repository_can_be_public(hub, packed):
    assert push(packed, "--include-rows", "--public") == 0
    files = hub.files(REPOSITORY)
    assert hub.visibility[REPOSITORY] == "public" and sorted(files) == sorted(
        [".gitattributes", *GOES, "parity_pairs.jsonl"]
    )
    for name in ("parity_pairs.jsonl", "parity.json", "parity.html"):
        assert files[name] == (packed / name).read_bytes()


def test_a_dry_run_asks_and_sends_nothing(hub, model, monkeypatch, capfd):
    monkeypatch.delenv("HF_TOKEN")
    for name in ("rows.csv", "notes.json", "LICENSE", "images/plot.png"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("mine")
    (model / "parity.json").unlink()
    assert push(model, "--dry-run") == 0
    printed = capfd.readouterr().err
    goes, stays = listed(printed)
    assert goes == sorted({*GOES, "LICENSE"} - {"parity.json", "parity.html"})
    assert stays == ["images/", "job/", "notes.json", "parity.html", "parity_pairs.jsonl", "rows.csv"]
    reasons = ("a directory, 1 file", "resume state of the quantization, 3 files", "not a file of the checkpoint")
    reasons += ("no parity.json to write it again", "--include-rows uploads them", "rows of data")
    assert all(
        re.search(rf"  {re.escape(name)} .*{reason}", printed) for name, reason in zip(stays, reasons, strict=True)
    )
    assert not hub.requests and f"Without --dry-run this goes to {REPOSITORY}." in printed


# Interrupted, retried, continued


def test_answers_of_500_are_asked_for_again(hub, packed):
    hub.failures = [("PUT", "/objects/", 500)] * 2 + [("POST", "/preupload/", 503), ("POST", "/objects/batch", 502)]
    assert push(packed) == 0
    assert sorted(hub.files(REPOSITORY)) == [".gitattributes", *GOES] and not hub.failures
    assert (hub.count("PUT", "/objects/", 500), hub.count("PUT", "/objects/", 200)) == (2, 4)
    assert (hub.count("POST", "/preupload/"), hub.count("POST", "/objects/batch")) == (2, 2)


def test_the_streamed_upload_asks_for_its_commit_again(hub, packed, monkeypatch):
    hub.large = "^$"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.failures = [("POST", "/commit/", 500)] * 2
    assert push(packed) == 0
    assert hub.count("POST", "/commit/") == 3 and len(hub.commits[REPOSITORY]) == 2


def test_an_upload_that_fails_is_continued_by_the_same_command(hub, packed, capfd):
    last = open_checkpoint(packed).shards[-1].file
    digest = json.loads((packed / "job" / "job.json").read_text())["shards"][last.name]
    hub.failures = [("PUT", digest, 500)] * 6
    assert push(packed) == 2
    assert re.search(
        rf"error: {REPOSITORY}: the hub answered 500 \(.*\), also when asked again. What was uploaded is kept; the "
        "same command continues.",
        capfd.readouterr().err,
    )
    assert list(hub.files(REPOSITORY)) == [".gitattributes"] and len(hub.objects) == 3
    hub.requests.clear()
    assert push(packed) == 0
    assert sorted(hub.files(REPOSITORY)) == [".gitattributes", *GOES]
    assert [path for method, path, _ in hub.requests if method == "PUT"] == [f"/objects/{digest}"]
    hub.requests.clear()
    assert push(packed) == 0  # once more: there is nothing left to send
    assert hub.count("PUT", "") == hub.count("POST", "/commit/") == 0


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_and_a_download_of_the_pinned_commit(packed, tmp_path):
    with stand_in_hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "quantize.export", str(packed), "--push-to", REPOSITORY]
        hub.stopped_at = "/commit/"
        process = start_process(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        try:
            assert hub.reached.wait(300)
            process.send_signal(signal.SIGINT)
            printed = process.communicate(timeout=60)[1]
        finally:
            process.kill()
        assert process.returncode == 130
        assert "stopped; what was uploaded is kept; the same command continues." in printed
        assert list(hub.files(REPOSITORY)) == [".gitattributes"] and len(hub.objects) == 4

        hub.stopped_at, sent = None, hub.count("PUT", "")
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        assert hub.count("PUT", "") == sent == 4
        commit = hub.commits[REPOSITORY][-1][0]
        hub.add_commit(REPOSITORY, {"config.json": b"{}"})  # the branch moves on

        command = [sys.executable, "-c", DOWNLOAD, f"{REPOSITORY}@{commit}", f"{REPOSITORY}@v9"]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.stdout.split() == [f"{REPOSITORY}@{commit}", commit, open_checkpoint(packed).fingerprint()]
        assert f"CheckpointError: {REPOSITORY} has no revision v9; name a branch, a tag" in run.stderr


# Refused


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (
            ["--push-to", REPOSITORY],
            None,
            "there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN",
        ),
        (["--push-to", REPOSITORY], "hf_old", f"{REPOSITORY}: the hub does not accept the token (Invalid username or "),
        (["--push-to", REPOSITORY], WEAK_TOKEN, f"{REPOSITORY}: the token may not write there (You don't have the"),
        (["--push-to", "you/x"], TOKEN, "you/x: the token may not write there (You don't have the rights to create a"),
        (["--push-to", "WorldPM"], TOKEN, "--push-to is 'WorldPM'; OWNER/NAME was expected: letters, digits, `-`, `_`"),
        (["--push-to", "me/x@v1"], TOKEN, "--push-to is 'me/x@v1'; OWNER/NAME was expected"),
        (["--push-to", "me/x.git"], TOKEN, "--push-to is 'me/x.git'; OWNER/NAME was expected"),
        (["--push-to", REPOSITORY, "--base-model", "x"], TOKEN, "--base-model is 'x'; OWNER/NAME was expected"),
        (["--dry-run", "--public"], TOKEN, "--dry-run, --public: only for an upload; add --push-to OWNER/NAME."),
        ([], TOKEN, "give either --tensor-parallel N with --output DIR, or --push-to OWNER/NAME."),
        (["--push-to", REPOSITORY, "--output", "x"], TOKEN, "--tensor-parallel N and --output DIR go together."),
    ],
)
def test_refusals_are_one_sentence(hub, packed, monkeypatch, capfd, arguments, token, message):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert main([str(packed), *arguments]) == 2
    assert f"error: {message}" in capfd.readouterr().err
    assert not hub.commits


def test_no_network_is_one_sentence(packed, tmp_path, monkeypatch, capfd):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert push(packed) == 2
    message = (
        rf"error: {REPOSITORY}: the hub at http://127.0.0.1:9 cannot be reached \(ConnectError: .*\); try again when"
    )
    assert re.search(message, capfd.readouterr().err)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert push(packed) == 2
    assert "cannot be reached (OfflineModeIsEnabled: " in capfd.readouterr().err
    monkeypatch.undo()
    close_session()


def test_a_repository_with_other_content_is_left_alone(hub, packed, capfd):
    hub.add_commit(REPOSITORY, {"config.json": b"{}", "other.safetensors": b"1", ".gitattributes": b""})
    assert push(packed) == 2
    assert (
        f"error: {REPOSITORY} already has other files: 1 with other content (config.json) and 1 not of this checkpoint "
        "(other.safetensors); choose another name, or add --overwrite to replace what differs and leave the rest."
    ) in capfd.readouterr().err
    assert hub.files(REPOSITORY)["config.json"] == b"{}" and hub.count("PUT", "") == 0
    assert push(packed, "--overwrite") == 0
    assert hub.files(REPOSITORY)["config.json"] == (packed / "config.json").read_bytes()
    assert hub.files(REPOSITORY)["other.safetensors"] == b"1"


def test_weights_of_equal_size_and_other_bytes_are_other_content(hub, packed, capfd):
    name = GOES[3]
    content = bytearray((packed / name).read_bytes())
    content[-1] ^= 1
    hub.add_commit(REPOSITORY, {name: bytes(content)})
    assert push(packed) == 2
    assert f"1 with other content ({name}); choose another name" in capfd.readouterr().err


def test_a_model_that_was_not_quantized_and_a_card_that_cannot_be_read(hub, model, packed, capfd):
    assert push(packed.parent / "WorldPM-72B") == 2
    assert "error: WorldPM-72B is not quantized; give a checkpoint that this kit has written." in capfd.readouterr().err
    for metadata in ("a: [", "- a", "model-index: 3"):
        (model / "README.md").write_text(f"---\n{metadata}\n---\n# Mine\n")
        assert push(model) == 2
        assert re.search(r"error: .*README.md: the metadata cannot be read \(.*\); correct it.", capfd.readouterr().err)
    (model / "README.md").write_text("---\nbase_model: no id\n---\n# Mine\n")
    assert push(model) == 2
    assert 'the hub refuses the card (Invalid metadata in README.md. - "base_model"' in capfd.readouterr().err


# The card


def test_the_metadata_of_the_card_passes_the_client_and_the_hub(hub, packed):
    """The client parses and writes it again without a change, and its validator gets the hub's consent."""
    assert push(packed) == 0
    text = hub.files(REPOSITORY)["README.md"].decode()
    card = ModelCard(text)
    hub.requests.clear()
    card.validate()
    assert hub.requests == [("POST", "/api/validate-yaml", 200)] and str(card) == text
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/WorldPM-72B", "quantized")
    assert (data["quantized_by"], data["license"], data["pipeline_tag"]) == ("me", "apache-2.0", "text-classification")
    assert data["tags"] == ["reward-model", "worldpm", "gptq"]
    name, results = model_index_to_eval_results(data["model-index"])
    figures = json.loads((packed / "parity.json").read_text())["figures"]
    assert name == "WorldPM-tiny-GPTQ" and card.data.eval_results == results
    metrics = {each.metric_type: each for each in results}
    assert metrics.keys() == {"pair_agreement", "accuracy", "spearmanr", "mean_absolute_shift"}
    assert metrics["pair_agreement"].metric_value == pytest.approx(figures["agreement"]["value"], rel=1e-5)
    assert metrics["spearmanr"].metric_args["low_95"] == pytest.approx(figures["spearman"]["low"], rel=1e-5)
    assert f'Scorer.from_pretrained("{REPOSITORY}")' in text and "Pair agreement" in card.text


def test_benchmark_results_and_what_a_user_wrote_are_in_the_card(hub, model, tmp_path, capfd):
    result = {
        "benchmark": "rewardbench",
        "fingerprint": open_checkpoint(model).fingerprint(),
        "sections": {
            "chat": {"accuracy": 0.9, "low": 0.8, "high": 0.95, "rows": 10},
            "RewardBench": {"accuracy": 0.75, "low": None, "high": None, "rows": 40},
            "empty": {"accuracy": None, "low": None, "high": None, "rows": 0},
        },
    }
    file = tmp_path / "rewardbench.json"
    file.write_text(json.dumps(result))
    text = (model / "README.md").read_text().replace("- worldpm\n", "- worldpm\n- mine\n", 1)
    (model / "README.md").write_text(text + "\nMy own words.\n")
    assert push(model, "--results", str(file), "--base-model", "a/b", "--license", "mit") == 0
    data = ModelCard(hub.files(REPOSITORY)["README.md"].decode()).data
    assert (data.base_model, data.license, "mine" in data.tags) == ("a/b", "mit", True)
    found = {each.dataset_config: each for each in data.eval_results if each.dataset_type == "rewardbench"}
    assert {name: each.metric_value for name, each in found.items()} == {"chat": 0.9, "RewardBench": 0.75}
    assert found["chat"].metric_args == {"low_95": 0.8, "high_95": 0.95} and found["RewardBench"].metric_args is None
    assert len(data.eval_results) == 6 and hub.files(REPOSITORY)["README.md"].endswith(b"My own words.\n")
    for change, message in (
        ({"fingerprint": "x"}, "has the results of another model; evaluate packed."),
        ({"sections": {"chat": {"accuracy": "0.9"}}}, "has no `benchmark` with `sections`; give a result of worldpm-"),
    ):
        file.write_text(json.dumps(result | change))
        assert push(model, "--results", str(file)) == 2
        assert message in capfd.readouterr().err


def test_a_card_without_base_model_or_licence_says_so(hub, model, capfd):
    (model / "README.md").unlink()
    (model / "reference_scores.json").unlink()
    assert push(model, "--dry-run") == 0
    printed = capfd.readouterr().err
    assert "note: the card names no base model: its hub id was not recorded; add --base-model OWNER/NAME" in printed
    assert "note: the card names no licence: the original's card was not at hand; add --license ID" in printed


@pytest.mark.parametrize(
    ("name", "base_model"),
    [
        ("Qwen/WorldPM-72B-RLHFLow@0123abc", "Qwen/WorldPM-72B-RLHFLow"),
        ("worldpm-72b", "Qwen/WorldPM-72B"),
        ("my-model", None),
        ("demo", None),
    ],
)
def test_the_base_model_is_a_hub_id(name, base_model):
    assert base_model_id(name) == base_model


@pytest.mark.parametrize(
    "text", [b"", b"# no metadata", b"---\nlicense: [a]\n---\n", b"---\na: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe"]
)
def test_a_card_that_states_no_licence(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    assert read_licence(tmp_path) == {} == read_licence(tmp_path / "nowhere")


def test_docs_and_help_show_commands_that_are_understood(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    for text in (capsys.readouterr().out, (ROOT / "docs" / "quantizing.md").read_text()):
        commands = re.findall(r"-m quantize\.export (\S+ --push-to .*)", text)
        assert commands
        for command in commands:
            assert parse(command.split()).push is not None
