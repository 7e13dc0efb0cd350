"""What a plan says against what a run does: bytes on disk, peak memory, and refusals that say what would fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantize.arguments import parse
from quantize.job.gradient_plan import GradientPlan
from quantize.job.inputs import plan_from_config, read_inputs
from quantize.job.plan import QuantizationPlan, TokenCounts
from quantize.job.plan_table import plan_rows, token_warning
from quantize.job.resources import check_disk, fit_memory
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.checkpoints.model_config import ModelConfig
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.common.errors import ConfigurationError
from runtime.common.terminal import GIB
from tests.helpers.tiny import tiny_config
from tests.helpers.tiny_job import arguments, quantize, write_job_model, write_pairs

ROOT = Path(__file__).resolve().parents[2]
LARGE = ModelConfig.from_config(json.loads((Path(__file__).parents[1] / "shapes_72b.json").read_text()))
GPTQ = QuantizationConfig(method="gptq", bits=4, group_size=128)
LOAD = TokenCounts(calibration_tokens=16_384, parity_tokens=32_768, longest_batch=2048)


def plan_of(model_config: ModelConfig = LARGE, quantization: QuantizationConfig = GPTQ, **more) -> QuantizationPlan:
    gradients = GradientPlan(model_config, LOAD.calibration_tokens, LOAD.longest_batch, 4)
    fields = {
        "bits": quantization.bits,
        "token_counts": LOAD,
        "gradients": gradients if quantization.method == "gptq" else None,
        "matmul_bytes": 4,
        "prefetch": True,
        "device": "cpu",
    }
    return QuantizationPlan(model_config, quantization, **fields | more)


# ---- the 72B --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "bits", "written"),
    [
        (GPTQ, 4 + 20 / 128, 39.1e9),
        (replace(GPTQ, bits=8), 8 + 24 / 128, 74.5e9),
        (QuantizationConfig(method="nf4", bits=4), 4.127, 38.9e9),
        (QuantizationConfig(method="int8", bits=8), 8.004, 72.9e9),
    ],
)
def test_the_72b_at_every_method(quantization, bits, written):
    """Bits per weight with scales (16) and zeros (`bits`) a group, double quantization, one scale a row."""
    plan = plan_of(quantization=quantization)
    assert plan.bits_per_weight == pytest.approx(bits, abs=0.005)
    assert plan.disk_written == pytest.approx(written, rel=0.005)


def test_the_72b_as_it_is_published():
    plan = plan_of()
    assert plan.block_bytes == pytest.approx(1.755e9, rel=0.001)
    assert plan.block_weights * 80 == pytest.approx(70.21e9, rel=0.001)
    assert plan.disk_read == pytest.approx(143e9, rel=0.005)
    assert plan.outer_bytes == pytest.approx(2 * (1.246e9 + 67.1e6), rel=0.001)
    packed = (plan.disk_written - plan.outer_bytes) / 80
    assert packed == pytest.approx(0.456e9, rel=0.002)


def test_the_72b_fits_where_it_is_to_be_quantized():
    """One 24 GB card with bf16 products, 32 GB of memory; the widest Hessian alone is 3.5 GB."""
    plan = plan_of(device="cuda:0", matmul_bytes=2)
    assert 4 * 29568**2 < plan.peak_gpu_bytes < 20e9
    assert plan.peak_host_bytes < 24e9 and plan_of().peak_host_bytes < 32e9
    assert plan_of().peak_gpu_bytes == 0


def test_its_work_is_two_forward_passes_and_hessians_and_solves():
    flops = plan_of().flops()
    forward = 2 * plan_of().block_weights * LOAD.tokens
    assert flops["reference stream"] == flops["quantized stream"] == forward
    widths = 3 * 8192**2 + 29568**2
    assert flops["Hessians"] == 2 * widths * LOAD.calibration_tokens
    assert flops["backward sweep"] > forward / 2 and flops["solve"] > 2 * plan_of().block_weights * 8192
    assert set(plan_of(quantization=QuantizationConfig(method="nf4", bits=4)).flops()) == {
        "reference stream", "quantized stream",
    }  # fmt: skip


# ---- against a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`model`, larger than other tests' so that what is planned shows, and `pairs.jsonl`."""
    place = tmp_path_factory.mktemp("plan")
    write_job_model(place / "model", layers=2, hidden=256, intermediate=512, heads=4, kv_heads=2)
    write_pairs(place / "pairs.jsonl", words=12)
    return place


def planned(place: Path, *more: str) -> QuantizationPlan:
    given = arguments(place / "model", place / "pairs.jsonl", Path("unused"), "--no-recalibration", *more)
    return read_inputs(parse(given)).plan


METHODS = (("--bits", "4"), ("--bits", "8", "--asymmetric"), ("--method", "nf4"), ("--method", "int8"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_what_is_read_and_written_is_what_was_planned(place, tmp_path, method):
    plan = planned(place, *method)
    assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out", "--no-recalibration", *method) == 0
    source, made = open_checkpoint(place / "model"), open_checkpoint(tmp_path / "out")
    assert plan.disk_read == source.nbytes()
    texts = sum(stored.nbytes for name, stored in made.tensors.items() if name.endswith("__nf4"))  # JSON, some 100 B
    assert plan.disk_written == pytest.approx(made.nbytes() - texts, abs=7 * 2)  # int8's weight_format is a byte each
    files = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert plan.disk_written == pytest.approx(files, rel=0.03)  # with headers, which do not grow with the model


def test_the_activations_planned_are_the_files_made(place, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "quantize.run.quantize_blocks",
        lambda job, *_, **__: sizes.extend(
            sum(file.stat().st_size for file in job.states_directory.glob(f"*{suffix}"))
            for suffix in (".bin", ".safetensors")
        ),
    )
    monkeypatch.setattr("quantize.run.compute_final_scores", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out") == 130
    plan = planned(place)
    assert plan.gradients and sizes[0] == plan.hidden_state_bytes
    assert sizes[1] <= 1.05 * plan.gradients.statistics_bytes  # with headers; the rank may turn out lower


@pytest.mark.slow
@pytest.mark.parametrize("method", [("--bits", "4"), ("--method", "nf4")], ids=" ".join)
def test_a_run_stays_below_the_planned_peak(tmp_path, method):
    """In a process of its own, on a model whose blocks, Hessians and activations show beside the interpreter."""
    model = write_job_model(tmp_path / "model", layers=2, hidden=768, intermediate=3072, heads=8, kv_heads=2)
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    few = ("--rows", "6", "--parity-pairs", "4", "--token-budget", "1024", *method)
    plan = planned(tmp_path, *few)
    given = arguments(model, pairs, tmp_path / "out", *few, "--json")
    done = subprocess.run([sys.executable, "quantize/run.py", *given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout.splitlines()[-1])["peak_memory"]
    assert 0.7 * plan.peak_host_bytes < peak < plan.peak_host_bytes


# ---- refusals -------------------------------------------------------------------------------------------


def test_a_budget_that_suffices_keeps_reading_ahead():
    plan = plan_of()
    assert fit_memory(plan, plan.peak_host_bytes).prefetch


def test_reading_ahead_is_given_up_first():
    plan = plan_of()
    fitted = fit_memory(plan, plan.peak_host_bytes - 1)
    assert not fitted.prefetch and fitted.peak_host_bytes <= plan.peak_host_bytes - plan.block_bytes
    assert fitted.token_counts == plan.token_counts


def test_too_small_a_budget_says_how_many_tokens_would_fit():
    plan = plan_of()
    budget = replace(plan, prefetch=False).peak_host_bytes - plan.mapped_bytes // 2
    with pytest.raises(
        ConfigurationError, match=r"allowed by --ram-budget; lower --rows and --parity-pairs"
    ) as refusal:
        fit_memory(plan, budget)
    tokens = int(str(refusal.value).split("about ")[1].split(" tokens")[0].replace(",", ""))
    share = tokens / plan.token_counts.tokens
    token_counts = TokenCounts(
        int(share * LOAD.calibration_tokens), int(share * LOAD.parity_tokens), LOAD.longest_batch
    )
    gradients = replace(plan.gradients, tokens=token_counts.calibration_tokens)
    assert 0.4 < share < 0.6 and fit_memory(replace(plan, token_counts=token_counts, gradients=gradients), budget)


def test_where_one_block_does_not_fit_no_fewer_rows_would_help(monkeypatch):
    with pytest.raises(ConfigurationError, match=r"one block alone needs \d+\.\d GiB: use a machine with more memory"):
        fit_memory(plan_of(), 2 * GIB)


def test_without_a_budget_it_is_what_the_machine_has_free(monkeypatch):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("quantize.job.resources.psutil.virtual_memory", lambda: memory(2 * GIB))
    with pytest.raises(ConfigurationError, match=r"but 2\.0 GiB is available"):
        fit_memory(plan_of(), None)
    monkeypatch.setattr("quantize.job.resources.psutil.virtual_memory", lambda: memory(64 * GIB))
    assert fit_memory(plan_of(), None).prefetch


def test_mapped_pages_count_only_against_a_given_budget(monkeypatch):
    plan = plan_of()
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(
        "quantize.job.resources.psutil.virtual_memory", lambda: memory(plan.peak_host_bytes - plan.mapped_bytes)
    )
    assert fit_memory(plan, None).prefetch
    assert not fit_memory(plan, plan.peak_host_bytes - 1).prefetch


def test_a_gpu_that_is_too_small_is_named(monkeypatch):
    monkeypatch.setattr("quantize.job.resources.is_device_available", lambda device: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (4 * GIB, 24 * GIB))
    with pytest.raises(
        ConfigurationError, match=r"cuda:0 has 4\.0 GiB free, but one block needs \d+\.\d GiB; use --device cpu"
    ):
        fit_memory(plan_of(device="cuda:0", matmul_bytes=2), 64 * GIB)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (22 * GIB, 24 * GIB))
    assert fit_memory(plan_of(device="cuda:0", matmul_bytes=2), 64 * GIB)


def test_a_full_disk_is_refused_with_what_would_be_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("quantize.job.resources.shutil.disk_usage", lambda place: usage(0, 0, 20 * GIB))
    with pytest.raises(ConfigurationError, match=r"has 20\.0 GiB free, but \d+\.\d GiB will be written"):
        check_disk(plan_of(), tmp_path / "not" / "there" / "yet")
    monkeypatch.setattr("quantize.job.resources.shutil.disk_usage", lambda place: usage(0, 0, 60 * GIB))
    check_disk(plan_of(), tmp_path / "not" / "there" / "yet")


def test_what_is_written_already_needs_no_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    plan = plan_of(ModelConfig.from_config(tiny_config(
        layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2, vocab=320, dtype=torch.bfloat16
    )))  # fmt: skip
    monkeypatch.setattr("quantize.job.resources.shutil.disk_usage", lambda place: usage(0, 0, plan.temporary_bytes))
    with pytest.raises(ConfigurationError):
        check_disk(plan, tmp_path)
    (tmp_path / "model-00001-of-00004.safetensors").write_bytes(b"\0" * plan.disk_written)
    check_disk(plan, tmp_path)


# ---- what people read -----------------------------------------------------------------------------------


def test_a_plan_from_a_config_alone_estimates_its_tokens(tmp_path):
    path = tmp_path / "config.json"
    path.write_text((Path(__file__).parents[1] / "shapes_72b.json").read_text())
    pairs = write_pairs(tmp_path / "pairs.jsonl", words=40)
    given = parse(
        ["--model", str(path), "--calibration", str(pairs), "--rows", "10", "--parity-pairs", "20", "--device", "cpu"]
    )
    plan = plan_from_config(given)
    counts = plan.token_counts
    assert counts.estimated and counts.parity_tokens == pytest.approx(4 * counts.calibration_tokens, rel=0.2)
    rows = dict(plan_rows(plan, "WorldPM-72B", Path("out")))
    assert rows["tokens"].startswith("about ") and rows["disk"].startswith("reads 133.2 GiB 3 times, writes 36.4 GiB")
    assert "80 blocks, hidden 8192" in rows["model"] and "4.16 bits a weight" in rows["method"]
    assert rows["activations"].startswith("memory-mapped in out/job/streams; rewritten for every block, ")
    assert "TFLOP/s" in rows["time"] and "so its Hessian is rank-deficient" in str(token_warning(plan))
    enough = replace(plan, token_counts=replace(counts, calibration_tokens=8 * 29568))
    assert token_warning(enough) is None and token_warning(replace(plan, gradients=None)) is None


@pytest.mark.parametrize(("seconds", "said"), [(42, "about 42 s"), (1200, "about 20 min"), (36_000, "about 10.0 h")])
def test_time_is_said_in_a_unit_that_suits(monkeypatch, seconds, said):
    flops = 80 * sum(plan_of().flops().values())
    monkeypatch.setattr("quantize.job.plan_table.matmul_rate", lambda *_: 1.3 * flops / seconds)
    assert dict(plan_rows(plan_of(), "m", Path("out")))["time"].startswith(said)


def test_a_device_that_is_not_here_is_planned_for_without_a_time(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rows = dict(plan_rows(plan_of(device="cuda:0", matmul_bytes=2), "m", Path("out")))
    assert rows["time"].startswith("not estimated") and rows["peak on the GPU"].endswith("on cuda:0")
