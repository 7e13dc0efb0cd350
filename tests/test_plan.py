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
from quantize.inputs import plan_without_weights, read_inputs
from quantize.plan import Load, Plan, check_disk, fit_memory
from quantize.plan_table import plan_rows
from runtime.architecture import Architecture
from runtime.checkpoint import open_checkpoint
from runtime.errors import PlanError
from runtime.quantization import Quantization
from runtime.sizes import GIB
from tests.tiny import tiny_config
from tests.tiny_job import arguments, quantize, write_job_model, write_pairs

ROOT = Path(__file__).parent.parent
LARGE = Architecture.from_config(json.loads(Path(__file__).with_name("shapes_72b.json").read_text()))
GPTQ = Quantization(method="gptq", bits=4, group_size=128)
LOAD = Load(calibration_tokens=16_384, parity_tokens=32_768, longest_batch=2048)


def plan_of(architecture: Architecture = LARGE, quantization: Quantization = GPTQ, **more) -> Plan:
    calibrated = quantization.method == "gptq"
    fields = {"load": LOAD, "calibrated": calibrated, "correction": calibrated, "refine_passes": 3,
              "matmul_bytes": 4, "prefetch": True,
              "device": "cpu"}  # fmt: skip
    return Plan(architecture, quantization, **fields | more)


# ---- the 72B --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "bits", "written"),
    [
        (GPTQ, 4 + 20 / 128, 39.1e9),
        (replace(GPTQ, bits=8), 8 + 24 / 128, 74.5e9),
        (Quantization(method="nf4", bits=4), 4.127, 38.9e9),
        (Quantization(method="int8", bits=8), 8.004, 72.9e9),
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
    assert 4 * 29568**2 < plan.gpu_peak < 20e9
    assert plan.host_peak < 24e9 and plan_of().host_peak < 32e9
    assert plan_of().gpu_peak == 0


def test_its_work_is_two_forward_passes_and_hessians_and_solves():
    work = plan_of().work()
    forward = 2 * plan_of().block_weights * LOAD.tokens
    assert work["reference stream"] == work["quantized stream"] == forward
    widths = 3 * 8192**2 + 29568**2
    assert work["Hessians"] == 2 * widths * LOAD.calibration_tokens
    assert work["refinement"] == 8 * work["solve"] and "refinement" not in plan_of(refine_passes=0).work()
    assert set(plan_of(quantization=Quantization(method="nf4", bits=4)).work()) == {
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


def planned(place: Path, *more: str) -> Plan:
    given = arguments(place / "model", place / "pairs.jsonl", Path("unused"), "--no-repair", *more)
    return read_inputs(parse(given), str(place / "model")).plan


METHODS = (("--bits", "4"), ("--bits", "8", "--asymmetric"), ("--method", "nf4"), ("--method", "int8"))


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_what_is_read_and_written_is_what_was_planned(place, tmp_path, method):
    plan = planned(place, *method)
    assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out", "--no-repair", *method) == 0
    source, made = open_checkpoint(place / "model"), open_checkpoint(tmp_path / "out")
    assert plan.disk_read == source.nbytes()
    texts = sum(stored.nbytes for name, stored in made.tensors.items() if name.endswith("__nf4"))  # JSON, some 100 B
    assert plan.disk_written == pytest.approx(made.nbytes() - texts, abs=7 * 2)  # int8's weight_format is a byte each
    files = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert plan.disk_written == pytest.approx(files, rel=0.03)  # with headers, which do not grow with the model


def test_the_activations_planned_are_the_files_made(place, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "quantize.run.sweep", lambda job, *_, **__: sizes.append(sum(f.stat().st_size for f in job.streams.iterdir()))
    )
    monkeypatch.setattr("quantize.run.conclude", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out") == 130
    assert sizes == [planned(place).stream_bytes]


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
    assert 0.7 * plan.host_peak < peak < plan.host_peak


# ---- refusals -------------------------------------------------------------------------------------------


def test_a_budget_that_suffices_keeps_reading_ahead():
    plan = plan_of()
    assert fit_memory(plan, plan.host_peak).prefetch


def test_reading_ahead_is_given_up_first():
    plan = plan_of()
    fitted = fit_memory(plan, plan.host_peak - 1)
    assert not fitted.prefetch and fitted.host_peak <= plan.host_peak - plan.block_bytes
    assert fitted.load == plan.load


def test_too_small_a_budget_says_how_many_tokens_would_fit():
    plan = plan_of()
    budget = replace(plan, prefetch=False).host_peak - plan.stream_bytes // 2
    with pytest.raises(PlanError, match=r"allowed by --ram-budget; take fewer --rows and --parity-pairs") as refusal:
        fit_memory(plan, budget)
    tokens = int(str(refusal.value).split("about ")[1].split(" tokens")[0].replace(",", ""))
    share = tokens / plan.load.tokens
    load = Load(int(share * LOAD.calibration_tokens), int(share * LOAD.parity_tokens), LOAD.longest_batch)
    assert 0.4 < share < 0.6 and fit_memory(replace(plan, load=load), budget)


def test_where_one_block_does_not_fit_no_fewer_rows_would_help(monkeypatch):
    with pytest.raises(PlanError, match=r"one block alone needs \d+\.\d GiB: use a machine with more memory"):
        fit_memory(plan_of(), 2 * GIB)


def test_without_a_budget_it_is_what_the_machine_has_free(monkeypatch):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("quantize.plan.psutil.virtual_memory", lambda: memory(2 * GIB))
    with pytest.raises(PlanError, match=r"with 2\.0 GiB available"):
        fit_memory(plan_of(), None)
    monkeypatch.setattr("quantize.plan.psutil.virtual_memory", lambda: memory(64 * GIB))
    assert fit_memory(plan_of(), None).prefetch


def test_mapped_pages_count_only_against_a_given_budget(monkeypatch):
    plan = plan_of()
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("quantize.plan.psutil.virtual_memory", lambda: memory(plan.host_peak - plan.stream_bytes))
    assert fit_memory(plan, None).prefetch
    assert not fit_memory(plan, plan.host_peak - 1).prefetch


def test_a_gpu_that_is_too_small_is_named(monkeypatch):
    monkeypatch.setattr("quantize.plan.is_here", lambda device: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (4 * GIB, 24 * GIB))
    with pytest.raises(PlanError, match=r"cuda:0 has 4\.0 GiB free and one block needs \d+\.\d GiB; use --device cpu"):
        fit_memory(plan_of(device="cuda:0", matmul_bytes=2), 64 * GIB)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (22 * GIB, 24 * GIB))
    assert fit_memory(plan_of(device="cuda:0", matmul_bytes=2), 64 * GIB)


def test_a_full_disk_is_refused_with_what_would_be_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("quantize.plan.shutil.disk_usage", lambda place: usage(0, 0, 20 * GIB))
    with pytest.raises(PlanError, match=r"has 20\.0 GiB free, but \d+\.\d GiB will be written"):
        check_disk(plan_of(), tmp_path / "not" / "there" / "yet")
    monkeypatch.setattr("quantize.plan.shutil.disk_usage", lambda place: usage(0, 0, 60 * GIB))
    check_disk(plan_of(), tmp_path / "not" / "there" / "yet")


def test_what_is_written_already_needs_no_room(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    plan = plan_of(Architecture.from_config(tiny_config(
        layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2, vocab=320, dtype=torch.bfloat16
    )))  # fmt: skip
    monkeypatch.setattr("quantize.plan.shutil.disk_usage", lambda place: usage(0, 0, plan.stream_bytes))
    with pytest.raises(PlanError):
        check_disk(plan, tmp_path)
    (tmp_path / "model-00001-of-00004.safetensors").write_bytes(b"\0" * plan.disk_written)
    check_disk(plan, tmp_path)


# ---- what people read -----------------------------------------------------------------------------------


def test_a_plan_from_a_config_alone_estimates_its_tokens(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(Path(__file__).with_name("shapes_72b.json").read_text())
    pairs = write_pairs(tmp_path / "pairs.jsonl", words=40)
    given = parse(["--calibration", str(pairs), "--rows", "10", "--parity-pairs", "20", "--device", "cpu"])
    plan = plan_without_weights(given, str(path))
    assert plan.load.estimated and plan.load.parity_tokens == pytest.approx(4 * plan.load.calibration_tokens, rel=0.01)
    rows = dict(plan_rows(plan, "WorldPM-72B", Path("out")))
    assert rows["tokens"].startswith("about ") and rows["disk"].startswith("reads 133.2 GiB once, writes 36.4 GiB")
    assert "80 blocks, hidden 8192" in rows["model"] and "4.16 bits a weight" in rows["method"]
    assert rows["activations"] == "memory-mapped files in out/job/streams" and "at the " in rows["time"]


@pytest.mark.parametrize(("seconds", "said"), [(42, "about 42 s"), (1200, "about 20 min"), (36_000, "about 10.0 h")])
def test_time_is_said_in_a_unit_that_suits(monkeypatch, seconds, said):
    work = 80 * sum(plan_of().work().values())
    monkeypatch.setattr("quantize.plan_table.matmul_rate", lambda *_: 1.3 * work / seconds)
    assert dict(plan_rows(plan_of(), "m", Path("out")))["time"].startswith(said)


def test_a_device_that_is_not_here_is_planned_for_without_a_time(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rows = dict(plan_rows(plan_of(device="cuda:0", matmul_bytes=2), "m", Path("out")))
    assert rows["time"].startswith("not estimated") and rows["peak on the GPU"].endswith("on cuda:0")
