"""The README and the docs are true: files, links, commands and the plan that they show."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
LONGEST_README = 180


def blocks(language: str, text: str = README) -> list[str]:
    """Fenced blocks of one language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block.strip("\n") for block in found]


def commands(pattern: str) -> list[list[str]]:
    """Arguments of every command in the README and the docs that matches `pattern`, as the shell splits them."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    lines = "\n".join(block for text in texts for kind in ("bash", "console") for block in blocks(kind, text))
    lines = lines.replace("\\\n", " ")
    return [shlex.split(found, comments=True) for found in re.findall(rf"{pattern}(?![\w/])([^|>\n]*)", lines)]


def test_readme_is_short():
    assert len(README.splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path):
    """Every script and document in prose and commands exists, or is one that a job makes."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    words = " ".join([*re.findall(r"`([^`\n]+)`", prose), *blocks("bash", text), *blocks("console", text)]).split()
    named = {word for word in words if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|md|txt|toml)|\.ci/run", word)}
    assert not [path for path in named if not (ROOT / path).is_file() and not path.startswith("output/")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize(
    ("pattern", "module", "least"),
    [
        (r"quantize/run\.py", "quantize.arguments", 4),
        (r"runtime\.score", "runtime.score", 3),
        (r"runtime\.parity", "runtime.parity", 3),
        (r"runtime\.bench", "runtime.bench.__main__", 1),
        (r"app\.py", "runtime.serve", 2),
        (r"quantize\.export", "quantize.export", 1),
    ],
)
def test_commands_are_understood(pattern: str, module: str, least: int):
    """The parser accepts every command that the documents show."""
    parse = __import__(module, fromlist=["parse"]).parse
    found = commands(pattern)
    assert len(found) >= least
    for arguments in found:
        parse([word for word in arguments if word != "&"])


def test_readme_plan_is_current(monkeypatch: pytest.MonkeyPatch):
    """The plan of the 72B is what `--dry-run` prints, except for the measured time and the estimated tokens."""
    from quantize.arguments import parse
    from quantize.job.inputs import plan_from_config
    from quantize.job.plan_table import plan_rows

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)  # the plan counts memory per thread
    command, table = next(text for text in blocks("console") if "--dry-run" in text).split("\n", 1)
    options = parse([*shlex.split(command.partition("quantize/run.py")[2]), "--device", "cpu"])
    plan = plan_from_config(options)
    current = dict(plan_rows(plan, options.model, options.output))
    shown = {name.strip(): text.strip() for name, text in re.findall("│(.*?)│(.*?)│", table)}
    measured = {"time": "", "tokens": ""}
    assert shown | measured == current | measured, "run the command again, with COLUMNS=118"


def test_ci_runs_the_readme_s_test_command():
    """The script's own extraction, run here, gives the README's second command."""
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    extraction = re.search(r"test_command=\$\((.*?README\.md)\)", script, re.DOTALL)
    assert extraction
    found = subprocess.run(["bash", "-c", extraction[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == blocks("bash")[1]
    assert "'.[test]'" in found.stdout and "pytest" in found.stdout
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
