"""The command line: what it takes, what it refuses, and whether its help can be followed."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from quantize.arguments import EXAMPLES, parse
from quantize.job.inputs import plan_from_config
from quantize.job.options import METHODS
from quantize.solver.settings import GPTQSettings
from runtime.common.errors import ConfigurationError, ConversationError

SHAPES = Path(__file__).parents[1] / "shapes_72b.json"


def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_nothing_at_all_is_the_demo_at_four_bits():
    options = parse([])
    assert (options.model, options.source, options.method, options.bits) == (None, "demo", "gptq", 4)
    assert not options.resume and not options.dry_run


@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), ("rtn", 4), ("nf4", 4), ("int8", 8)])
def test_the_method_settles_the_bits(method: str, bits: int):
    assert parse(["--method", method]).bits == bits
    assert parse(["--method", method, "--bits", str(bits)]).bits == bits


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_bits_are_free_where_the_layout_is_gptq(method: str):
    assert parse(["--method", method, "--bits", "8"]).bits == 8


@pytest.mark.parametrize(("method", "bits", "own"), [("nf4", 8, 4), ("int8", 4, 8)])
def test_a_contradiction_is_named_with_its_remedy(method: str, bits: int, own: int):
    with pytest.raises(
        ConfigurationError, match=rf"--method {method} has {own} bits, but --bits is {bits}; drop --bits"
    ):
        parse(["--method", method, "--bits", str(bits)])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--bits", "3"], "--bits"),
        (["--method", "awq"], "--method"),
        (["--dtype", "float16"], "--dtype"),
        (["--rows", "many"], "--rows"),
        (["--ram-budget", "48"], "'48' is not a size such as 48GiB or 500MB"),
        (["--ram-budget", "1.5"], "'1.5' is not a size such as 48GiB or 500MB"),
        (["--ram-budget", "lotsGiB"], "--ram-budget"),
        (["--ram-budget", "1.2.3GiB"], "'1.2.3GiB' is not a size such as 48GiB or 500MB"),
        (["--ram-budget", "-5GiB"], "--ram-budget"),
        (["--calibratoin", "pairs.jsonl"], "--calibratoin"),
    ],
)
def test_what_is_not_understood_is_named(wrong: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parse(wrong)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("48GiB", 48 << 30),
        ("500MB", 500_000_000),
        ("1.5GiB", 3 << 29),
        ("2GB", 2 * 10**9),
        ("64MiB", 64 << 20),
    ],
)
def test_sizes_have_units(text: str, size: int):
    assert parse(["--ram-budget", text]).ram_budget == size


@pytest.mark.parametrize(
    ("model", "method", "bits", "output"),
    [
        ("demo", "gptq", 4, "output/demo-gptq-4bit"),
        ("Qwen/WorldPM-72B", "gptq", 8, "output/worldpm-72b-gptq-8bit"),
        ("/models/WorldPM-72B/", "nf4", 4, "output/worldpm-72b-nf4"),
        ("Qwen/WorldPM-72B@refs/pr/4", "nf4", 4, "output/worldpm-72b@refs-pr-4-nf4"),
        ("demo", "int8", 8, "output/demo-int8"),
        ("demo", "rtn", 4, "output/demo-rtn-4bit"),
    ],
)
def test_outputs_are_named_after_model_and_method(model: str, method: str, bits: int, output: str):
    assert parse(["--model", model, "--method", method, "--bits", str(bits)]).output_directory == Path(output)


@pytest.mark.parametrize(
    ("flag", "field"),
    [
        ("--asymmetric", "sym"),
        ("--no-activation-order", "activation_order"),
        ("--no-importance-scales", "importance_scales"),
        ("--no-recalibration", "recalibration"),
    ],
)
def test_switches_turn_off_one_setting(flag: str, field: str):
    assert parse([flag]) == replace(parse([]), **{field: False})


def test_help_shows_every_option_in_a_group_with_a_meaning(capsys: pytest.CaptureFixture[str]):
    text = help_text(capsys)
    for group in ("model:", "conversations:", "GPTQ solver", "machine:", "report:"):
        assert f"\n{group}" in text
    options = re.findall(r"^  (--[\w-]+)[^\n]*\n?", text, re.MULTILINE)
    assert len(options) > 20
    for option in options:
        assert re.search(rf"^  {option}\b[^\n]*(?:  +\w|\n {{10,}}\w)", text, re.MULTILINE), f"{option} has no text"


def test_help_teaches_by_examples_that_parse(capsys: pytest.CaptureFixture[str]):
    assert EXAMPLES in help_text(capsys)
    commands = [line.split("   ")[0] for line in EXAMPLES.splitlines() if line.startswith("  python ")]
    assert len(commands) >= 5
    seen = set()
    for command in commands:
        python, script, *words = shlex.split(command)
        assert (python, script) == ("python", "quantize/run.py")
        options = parse(words)
        seen |= {name for name, value in vars(options).items() if value != vars(parse([])).get(name)}
    assert {"model", "dry_run", "output", "calibration", "rows", "method"} <= seen


def test_help_tells_what_the_exit_status_means(capsys: pytest.CaptureFixture[str]):
    text = help_text(capsys)
    assert re.search(r"exit status: 0 .*; 1 .*; 2 .*; 130 ", text)


def test_the_defaults_are_the_solver_s_own():
    options, settings = vars(parse([])), vars(GPTQSettings())
    shared = options.keys() & settings.keys()
    assert shared == settings.keys() - {"block_size", "nf4"}
    assert {name: options[name] for name in shared} == {name: settings[name] for name in shared}
    assert set(METHODS) == {"gptq", "nf4", "int8", "rtn"}


def test_rows_of_other_names_are_calibrated_on(tmp_path: Path):
    rows = [
        {"q": f"Question {n}?", "good": f"The answer is {n}.", "bad": "No idea.", "chosen": n, "category": "a"}
        for n in range(40)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", str(SHAPES), "--calibration", str(file), "--rows", "4", "--dry-run"]
    columns = ["--columns", "prompt=q,chosen=good,rejected=bad"]
    plan = plan_from_config(parse([*given, *columns, "--format", "pair"]))
    assert plan.token_counts.calibration_tokens > 20 and plan.token_counts.parity_tokens > 20
    with pytest.raises(ConversationError, match="--columns"):
        plan_from_config(parse(given))
    with pytest.raises(ConfigurationError, match="--columns is 'q'"):
        parse([*given, "--columns", "q"])
