"""The command from end to end on a tiny model: what it writes, what it says, how it ends."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from calibration.sampling import Sample, sample
from calibration.sources import load_rows
from quantize.job.state import Job
from quantize.run import main
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.checkpoints.heads import MLP_HEAD
from runtime.checkpoints.model_config import BLOCK_LINEARS
from runtime.conversations.rendering import Renderer
from runtime.evaluation.reference_scores import ReferenceScores
from runtime.evaluation.report import read_report
from runtime.scorer import Scorer
from tests.helpers.tiny_job import PAIRS, ROWS, arguments, digests, quantize, write_job_model, write_pairs
from tests.quantize.test_job import RECIPE

SHAPES_72B = Path(__file__).parents[1] / "shapes_72b.json"
VARIANTS = {
    "gptq-4": ("--bits", "4"),
    "gptq-8": ("--bits", "8"),
    "gptq-4.5": ("--bits", "4.5"),
    "gptq-4-asymmetric": ("--asymmetric", "--group-size", "64"),
    "gptq-4-desc-act": ("--desc-act", "--group-size", "32"),
    "rtn": ("--method", "rtn"),
    "nf4": ("--method", "nf4"),
    "int8": ("--method", "int8"),
}


pytestmark = pytest.mark.usefixtures("wide_terminal")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with `model` and `pairs.jsonl`."""
    place = tmp_path_factory.mktemp("run")
    write_job_model(place / "model")
    config = json.loads((place / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"}
    (place / "model" / "config.json").write_text(json.dumps(config))
    (place / "model" / "modeling_qwen2_rm.py").write_text("raise SystemExit('executed')")
    write_pairs(place / "pairs.jsonl")
    return place


@pytest.fixture(scope="module", params=VARIANTS)
def written(request, place) -> Path:
    """The output of one variant."""
    return variant(place, request.param)


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """The output of a plain 4-bit run; not to be changed."""
    return variant(place, "gptq-4")


def variant(place: Path, name: str) -> Path:
    """The output of a finished run, made on first use."""
    output = place / name
    if not output.exists():
        assert quantize(place / "model", place / "pairs.jsonl", output, *VARIANTS[name]) == 0
    return output


def logged_blocks(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "job" / "blocks.jsonl").read_text().splitlines()]


def drawn_rows(place: Path, checkpoint: Checkpoint) -> Sample:
    """The rows that a run with `tiny_job.arguments` draws."""
    renderer = Renderer.from_directory(checkpoint.directory, checkpoint.model_config.max_position_embeddings)
    rows = load_rows(place / "pairs.jsonl")
    return sample(rows, renderer, rows_wanted=ROWS, parity_pairs=PAIRS)


def all_rendered(drawn: Sample) -> list:
    calibration = [row.rendered for row in drawn.calibration]
    return calibration + [each for pair in drawn.parity for each in (pair.chosen, pair.rejected)]


# ---- what is written ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_checkpoint_scores_what_the_report_says(written, place):
    """Packed, written, opened again and scored by the runtime: repaired head and all."""
    report = read_report(written / "parity.json")
    scorer = Scorer.from_pretrained(written, devices="cpu", dtype="float32")
    pairs = drawn_rows(place, scorer.checkpoint).parity
    scores = scorer.score_rendered([each for pair in pairs for each in (pair.chosen, pair.rejected)])
    told = torch.tensor([score for pair in report.scores for score in pair.quantized])
    assert [pair.id for pair in report.scores] == [pair.pair.id for pair in pairs]
    assert (scores - told).abs().max() < 1e-5 * report.reference_std


@pytest.mark.slow
def test_a_repair_that_was_kept_is_in_the_head(written, place):
    report = read_report(written / "parity.json")
    source, made = open_checkpoint(place / "model"), open_checkpoint(written)
    changed = [name for name in MLP_HEAD if not torch.equal(source.read(name), made.read(name))]
    assert report.repair is not None
    assert bool(changed) == (report.repair["kind"] != "none") == (report.before_repair is not None)


def test_what_is_not_quantized_is_what_it_was(written, place):
    source, made = open_checkpoint(place / "model"), open_checkpoint(written)
    linears = tuple(f".{name}.weight" for name in BLOCK_LINEARS)
    kept = [name for name in source.tensors if not name.endswith(linears) and name not in MLP_HEAD]
    assert len(kept) == 2 + 3 * (2 + 3)
    for name in kept:
        assert torch.equal(source.read(name).view(torch.uint8), made.read(name).view(torch.uint8)), name


@pytest.mark.parametrize(("rich", "poor"), [("gptq-8", "gptq-4"), ("gptq-8", "nf4"), ("int8", "rtn")])
def test_eight_bits_keep_more_than_four(place, rich, poor):
    """Of every linear (noise 16 times smaller is 24 decibels), and of the scores."""
    eight, four = variant(place, rich), variant(place, poor)
    for more, less in zip(logged_blocks(eight), logged_blocks(four), strict=True):
        for name in BLOCK_LINEARS:
            assert more["linears"][name]["sqnr_db"] > less["linears"][name]["sqnr_db"] + 15
    shifts = [read_report(output / "parity.json").figures.mean_shift.value for output in (eight, four)]
    assert shifts[0] < 0.3 * shifts[1]


def test_a_mix_is_stored_by_rules_and_guided_by_a_variant(place, tmp_path, capfd):
    output, model_config = variant(place, "gptq-4.5"), open_checkpoint(place / "model").model_config
    quantization = open_checkpoint(output).quantization
    assert quantization is not None and 4.3 < quantization.nominal_bits(model_config) <= 4.5
    options = {(each.bits, each.group_size) for index in range(3) for each in quantization.of_block(index).values()}
    assert options <= {(4, 128), (4, 32), (8, 128)} and len(options) > 1
    subject = read_report(output / "parity.json").subject
    assert subject.bits == quantization.nominal_bits(model_config) and subject.settings["bits"] == 4.5

    four, guided = variant(place, "gptq-4"), tmp_path / "guided"
    arguments = ("--bits", "4.5", "--errors-of", str(four))
    assert quantize(place / "model", place / "pairs.jsonl", guided, *arguments) == 0
    assert "weights with 4 bits in groups of" in capfd.readouterr().err
    assert open_checkpoint(guided).quantization != quantization
    assert quantize(place / "model", place / "pairs.jsonl", guided, "--bits", "4.5", "--resume") == 2
    assert "the variant differs (--errors-of)" in capfd.readouterr().err
    for other in (place / "model", variant(place, "gptq-8"), output):
        arguments = ("--bits", "4.5", "--errors-of", str(other))
        assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "other", *arguments) == 2
        assert "is no variant of model with 4 bits for every linear" in capfd.readouterr().err


def test_the_asymmetric_and_the_permuted_checkpoint_say_so(place):
    config = json.loads((variant(place, "gptq-4-asymmetric") / "quantize_config.json").read_text())
    assert config == GPTQ_CONFIG | {"sym": False, "group_size": 64}
    permuted = variant(place, "gptq-4-desc-act")
    config = json.loads((permuted / "quantize_config.json").read_text())
    assert config == GPTQ_CONFIG | {"desc_act": True, "group_size": 32}
    g_idx = open_checkpoint(permuted).read("model.layers.0.mlp.down_proj.g_idx")
    assert not torch.equal(g_idx, g_idx.sort().values) and g_idx.bincount().tolist() == [32] * 8


GPTQ_CONFIG = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "damp_percent": 0.05,
    "true_sequential": True, "static_groups": True, "lm_head": False, "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "modules_in_block_to_quantize": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"],
    ],
    "dynamic": {"-:score": {}},
}  # fmt: skip


def test_config_is_the_source_s_with_what_readers_look_for(finished, place):
    source = json.loads((place / "model" / "config.json").read_text())
    config = json.loads((finished / "config.json").read_text())
    assert config.pop("quantization_config") == GPTQ_CONFIG
    assert json.loads((finished / "quantize_config.json").read_text()) == GPTQ_CONFIG
    del source["auto_map"]  # it would have readers execute code that is not here
    newer = {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert config == source | newer | {"scored_token": "<|endoftext|>"}  # the source has the older names alone
    assert not list(finished.glob("*.py"))


def test_tokenizer_and_template_are_copied_byte_for_byte(finished, place):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (finished / name).read_bytes() == (place / "model" / name).read_bytes()


def test_the_log_has_every_block_and_what_it_cost(finished):
    blocks = logged_blocks(finished)
    assert [block["block"] for block in blocks] == [0, 1, 2]
    for block in blocks:
        assert list(block["linears"]) == list(BLOCK_LINEARS)
        for linear in block["linears"].values():
            assert 0 < linear["relative_loss"] < 1 and linear["damp"] > 0 and linear["seconds"] >= 0
        assert 0 < block["hidden_error_mean"] <= block["hidden_error_max"]
        assert block["seconds"]["all"] >= block["seconds"]["hessian"] > 0
        assert block["peak_memory"] > 1 << 20


def test_the_manifest_has_the_digest_of_every_shard(finished):
    shards = json.loads((finished / "job" / "job.json").read_text())["shards"]
    assert shards == {name: digest for name, digest in digests(finished).items() if name.endswith(".safetensors")}


def test_nothing_but_the_checkpoint_its_reports_and_the_job_is_left(finished):
    assert {path.name for path in (finished / "job").iterdir()} == {"job.json", "blocks.jsonl", "lock"}
    assert set(digests(finished)) == {
        "README.md", "chat_template.jinja", "config.json", "model.safetensors.index.json", "parity.html", "parity.json",
        "parity.junit.xml", "parity_pairs.jsonl", "quantize_config.json", "reference_scores.json", "tokenizer.json",
        "tokenizer_config.json",
        *(f"model-0000{number}-of-00005.safetensors" for number in range(1, 6)),
    }  # fmt: skip


def test_the_card_says_how_it_was_made_and_how_far_off_it_is(finished):
    card = (finished / "README.md").read_text()
    report = read_report(finished / "parity.json")
    assert "base_model" not in card and "| group_size | 128 |" in card  # a directory is no hub id
    assert f"{report.figures.pairs} preference pairs" in card and "Pair agreement" in card


# ---- reference scores -----------------------------------------------------------------------------------


def test_reference_scores_are_the_16_bit_model_s_for_every_row(finished, place):
    stored = ReferenceScores.load(finished)
    scorer = Scorer.from_pretrained(place / "model", devices="cpu", dtype="float32")
    rows = all_rendered(drawn_rows(place, scorer.checkpoint))
    assert set(stored.scores) == {row.key for row in rows} and len(rows) == ROWS + 2 * PAIRS
    expected = scorer.score_rendered(rows)
    told = torch.tensor([stored.scores[row.key] for row in rows])
    assert (told - expected).abs().max() < 1e-5 * expected.std()
    assert stored.fingerprint == scorer.checkpoint.fingerprint()
    assert stored.dtype == "bfloat16 weights, float32 arithmetic"


def test_the_report_compares_with_those_scores(finished, place):
    stored, report = ReferenceScores.load(finished), read_report(finished / "parity.json")
    pairs = drawn_rows(place, open_checkpoint(place / "model")).parity
    told = [pair.reference for pair in report.scores]
    assert told == [(stored.scores[pair.chosen.key], stored.scores[pair.rejected.key]) for pair in pairs]


# ---- the head -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_recalibration_leaves_the_head_s_bytes_untouched(place, tmp_path):
    assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out", "--no-recalibration") == 0
    source, made = open_checkpoint(place / "model"), open_checkpoint(tmp_path / "out")
    for name in MLP_HEAD:
        assert made.tensors[name].dtype == source.tensors[name].dtype
        assert torch.equal(source.read(name).view(torch.uint8), made.read(name).view(torch.uint8)), name
    report = read_report(tmp_path / "out" / "parity.json")
    assert report.repair is None and report.before_repair is None


def test_without_calibration_rows_the_head_is_left_alone(place, tmp_path):
    """Nothing to fit a repair on, which NF4 does not mind."""
    status = quantize(place / "model", place / "pairs.jsonl", tmp_path / "out", "--method", "nf4", "--rows", "0")
    assert status == 0
    assert read_report(tmp_path / "out" / "parity.json").repair == {
        "kind": "none", "rows": 0, "folds": 8, "cross_validated_rms_shift": {},
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["1", "2", "3"])
def test_too_few_rows_to_hold_any_out_change_no_head(place, tmp_path, rows):
    assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out", "--rows", rows) == 0


# ---- taking up and refusing -----------------------------------------------------------------------------


def test_a_second_run_is_refused(finished, place, capfd):
    before = digests(finished)
    assert quantize(place / "model", place / "pairs.jsonl", finished) == 2
    assert "already contains a finished job; add --resume" in capfd.readouterr().err
    assert digests(finished) == before


def test_resuming_what_is_finished_announces_it(finished, place, capfd, monkeypatch):
    monkeypatch.setattr("quantize.run.quantize_and_score", lambda *_: pytest.fail("it quantized again"))
    before = digests(finished)
    assert quantize(place / "model", place / "pairs.jsonl", finished, "--resume") == 0
    assert f"checkpoint  {finished}" in capfd.readouterr().err
    assert digests(finished) == before and not (finished / "job" / "streams").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--bits", "8"], "bits was 4 and is now 8"),
        (["--group-size", "32"], "group_size was 128 and is now 32"),
        (["--no-recalibration"], "recalibration was True and is now False"),
        (["--rows", "8"], "the conversations differ (--calibration, --rows"),
        (["--seed", "5"], "the conversations differ"),
        (["--token-budget", "512"], "token_budget was 256 and is now 512"),
    ],
)
def test_resuming_with_another_argument_is_refused_and_named(finished, place, capfd, more, named):
    assert quantize(place / "model", place / "pairs.jsonl", finished, "--resume", *more) == 2
    assert named in capfd.readouterr().err


def test_resuming_with_another_model_is_refused_and_named(finished, place, tmp_path, capfd):
    other = write_job_model(tmp_path / "model", layers=2)
    assert quantize(other, place / "pairs.jsonl", finished, "--resume") == 2
    assert "the model differs (--model)" in capfd.readouterr().err


def test_thresholds_may_change_on_resuming(finished, place):
    assert quantize(place / "model", place / "pairs.jsonl", finished, "--resume", "--min-agreement", "0") == 0


def test_a_directory_of_others_is_refused_before_anything_is_read(place, tmp_path, capfd):
    (tmp_path / "thesis.tex").write_text("\\begin{document}")
    assert main(arguments(tmp_path / "no-such-model", place / "pairs.jsonl", tmp_path)) == 2
    assert "is not empty and contains no job of this kit" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_model_s_own_directory_is_no_output(place, capfd):
    assert quantize(place / "model", place / "pairs.jsonl", place / "model") == 2
    assert "contains no job of this kit" in capfd.readouterr().err


def test_a_disk_that_fails_before_the_job_is_an_error_without_a_traceback(place, tmp_path, capfd, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device", "streams")
    monkeypatch.setattr(Job, "_remove_states", lambda self: (_ for _ in ()).throw(full))
    assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out") == 2
    assert capfd.readouterr().err.endswith(
        "error: streams: no space left on device; free some space, or use another disk.\n"
    )


def test_our_own_bugs_are_not_hidden(place, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "quantize.run.build_parity_report", lambda *_: (_ for _ in ()).throw(OSError(errno.EBADF, "ours"))
    )
    with pytest.raises(OSError, match="ours"):
        quantize(place / "model", place / "pairs.jsonl", tmp_path / "out", "--parity-pairs", "1", "--rows", "2")


def test_a_directory_in_use_is_refused(place, tmp_path, capfd):
    (tmp_path / "job").mkdir()
    with Job.open(tmp_path, RECIPE, resume=False):
        assert quantize(place / "model", place / "pairs.jsonl", tmp_path, "--resume") == 2
    assert "is in use by another run" in capfd.readouterr().err


def test_what_is_quantized_already_is_refused(finished, place, tmp_path, capfd):
    assert quantize(finished, place / "pairs.jsonl", tmp_path / "out") == 2
    assert "is already quantized (gptq); give the 16-bit model" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--damp-percent", "5"], "--damp-percent is 5.0; it must be between 0 and 1"),
        (["--group-size", "0"], "--group-size is 0; it must be positive"),
        (["--bits", "5", "--method", "rtn"], "--bits is 5, which gives more bits to the linears that move the scores"),
        (["--errors-of", "."], "--errors-of tells where more bits go, but --bits is 4; try 4.5"),
        (["--no-activation-order", "--desc-act"], "--desc-act forms its groups in activation order"),
        (["--rows", "0"], "--rows is 0, but gptq needs calibration rows"),
        (["--method", "nf4", "--rows", "0", "--parity-pairs", "0"], "both 0"),
        (["--rows", "-1"], "--rows is -1"),
        (["--parity-pairs", "-1"], "--parity-pairs is -1"),
        (["--ram-budget", "1MiB"], "allowed by --ram-budget"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--device", "cuda:one"], "--device is 'cuda:one'; it must be auto, cpu or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--rows", "1000"], "of the 1000 requested calibration rows"),
    ],
)
def test_what_cannot_work_is_refused_before_a_job_exists(place, tmp_path, capfd, more, message):
    assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out", *more) == 2
    error = capfd.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "out").exists()


# ---- how it ends ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "status"),
    [(["--min-agreement", "1.01"], 1), (["--max-shift", "0"], 1), (["--min-agreement", "0", "--max-shift", "99"], 0)],
)
def test_thresholds_set_the_exit_status(place, tmp_path, more, status):
    model, pairs = place / "model", place / "pairs.jsonl"
    assert quantize(model, pairs, tmp_path / "out", *more) == status
    assert quantize(model, pairs, tmp_path / "out", *more, "--resume") == status
    assert read_report(tmp_path / "out" / "parity.json").passed == (status == 0)


def test_thresholds_asked_of_a_finished_job_are_held_too(finished, place, capfd):
    assert quantize(place / "model", place / "pairs.jsonl", finished, "--resume", "--max-shift", "0") == 1


def test_json_ends_with_one_line_of_figures(finished, place, capfd):
    assert quantize(place / "model", place / "pairs.jsonl", finished, "--resume", "--json") == 0
    lines = capfd.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert len(lines) == 1 and figures["output"] == str(finished)
    assert figures["parity"]["agreement"]["value"] == read_report(finished / "parity.json").figures.agreement.value
    assert figures["peak_memory"] > 1 << 20 and figures["seconds"] >= 0


@pytest.mark.slow
def test_quiet_where_nobody_watches(place, tmp_path, capfd):
    """Plain lines, each path on one, and no progress bar or colour."""
    output = tmp_path / ("deep-" * 30) / "[bold]out[/nothing]"
    assert quantize(place / "model", place / "pairs.jsonl", output) == 0
    said = capfd.readouterr()
    assert said.out == ""
    assert "\x1b" not in said.err and "\r" not in said.err and "quantizing" not in said.err
    assert f"checkpoint  {output}\n" in said.err and f"report      {output / 'parity.html'}\n" in said.err


def test_single_conversations_calibrate_and_leave_nothing_to_compare(place, tmp_path, capfd):
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()[:ROWS]]
    single = [{"messages": row["prompt"] + row["chosen"]} for row in rows]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    output = tmp_path / "out"
    assert quantize(place / "model", tmp_path / "chats.jsonl", output, "--json") == 0
    assert "parity" not in json.loads(capfd.readouterr().out)
    assert not (output / "parity.json").exists() and "Not measured" in (output / "README.md").read_text()
    Scorer.from_pretrained(output, devices="cpu", dtype="float32")
