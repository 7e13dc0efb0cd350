"""Fuzz all targets: `python -m benchmarks.fuzz --minutes 10`. Exit status 1 if there are finds.

Each target has an equal share of the time, in a process of its own. A find is stored as a file, beside a text with its
traceback; `--replay FILE` runs it again. Atheris, where it is installed, keeps its corpus in the work directory, from
which the next run continues.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks.fuzz.engines import LastInput, Progress, Recorder, replay, run_atheris, run_hypothesis
from benchmarks.fuzz.target import Target

FAMILIES = {
    "checkpoint_targets": ("safetensors", "index", "config", "block"),
    "conversation_targets": ("tokenizer", "template-worker", "template", "tokenizer-config", "transcript"),
    "row_targets": ("jsonl", "json", "csv", "parquet", "gzip"),
    "request_targets": ("request",),
    "report_targets": ("report", "reference-scores"),
}
NAMES = [name for names in FAMILIES.values() for name in names]
ROOT = Path(__file__).resolve().parents[2]
STARTING = 600  # seconds that a process may take beyond its share: it imports and instruments on a busy machine


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--inputs", type=int, default=10**9, help="of each target, at most; Hypothesis only")
    parser.add_argument("--engine", choices=("auto", "atheris", "hypothesis", "replay"), default="auto")
    parser.add_argument("--targets", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "fuzz", help="corpora and finds")
    parser.add_argument("--coverage", action="store_true", help="report lines and branches of the corpus, by module")
    parser.add_argument("--replay", type=Path, help="give this file to the one target of --targets")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.engine == "auto":
        options.engine = "atheris" if find_spec("atheris") else "hypothesis"
    if options.coverage or options.replay:
        options.engine = "replay"
    if options.child:
        _run_here(options)
        return 0
    shutil.rmtree(options.work / "finds", ignore_errors=True)
    print(f"engine {options.engine}, seed {options.seed}")
    finds = 0
    for name in options.targets:
        progress = _run_apart(name, options)
        print(f"{name:17} {progress.inputs:9,} inputs, {_coverage(progress)}, {len(progress.finds)} finds", flush=True)
        for what, path in progress.finds.items():
            print(f"    {what}: {path}", flush=True)
        finds += len(progress.finds)
    if options.coverage:
        _report_coverage(options.work)
    return 1 if finds else 0


def _coverage(progress: Progress) -> str:
    return f"edges {progress.edges_before} + {progress.edges - progress.edges_before} new"


def _load(name: str) -> Target:
    family = next(module for module, names in FAMILIES.items() if name in names)
    return next(each for each in import_module(f"benchmarks.fuzz.{family}").TARGETS if each.name == name)


def _run_apart(name: str, options: argparse.Namespace) -> Progress:
    """Run a target in a process. Where an input ends it, the last input is a find."""
    work = options.work / name
    work.mkdir(parents=True, exist_ok=True)
    for file in (LastInput.NAME, "progress.json"):
        (work / file).unlink(missing_ok=True)
    seconds = 60 * options.minutes / len(options.targets)
    more = ["--coverage"] if options.coverage else ["--replay", options.replay] if options.replay else []
    command = [sys.executable, "-m", "benchmarks.fuzz", "--child", "--targets", name, "--engine", options.engine]
    command += ["--minutes", seconds / 60, "--inputs", options.inputs, "--seed", options.seed, "--work", options.work]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(work / "temporary")}
    shutil.rmtree(work / "temporary", ignore_errors=True)
    (work / "temporary").mkdir()
    with open(work / "log", "w") as log:
        process = subprocess.Popen([*map(str, command + more)], cwd=ROOT, stdout=log, stderr=log, env=environment)
        try:
            status = process.wait(None if options.engine == "replay" else seconds + STARTING)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    shutil.rmtree(work / "temporary", ignore_errors=True)
    stored = work / "progress.json"
    progress = Progress(**json.loads(stored.read_text())) if stored.exists() else Progress()
    log_text = (work / "log").read_text(errors="replace")
    if counts := re.findall(r"^#\d+.*?cov: (\d+)", log_text, re.MULTILINE):  # libFuzzer's lines
        progress.edges_before, progress.edges = int(counts[0]), int(counts[-1])
    if status != 0 or not progress.inputs:
        progress.finds[f"the process ended with status {status}, see {work / 'log'}"] = _keep(name, work, options.work)
    return progress


def _keep(name: str, work: Path, where: Path) -> str:
    """Store the last input of a process as a find."""
    find = where / "finds" / f"{name}-process"
    find.parent.mkdir(parents=True, exist_ok=True)
    if (work / LastInput.NAME).exists():
        find.write_bytes(LastInput.read(work / LastInput.NAME))
    return str(find)


def _run_here(options: argparse.Namespace) -> None:
    """The process of one target."""
    (name,) = options.targets
    work, finds = options.work / name, options.work / "finds"
    if options.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["runtime"]):
            target = _load(name)
        run_atheris(target, Recorder(target, work, finds), work, 60 * options.minutes, options.seed)
        return
    import coverage  # measures lines and branches where Atheris does not

    measured = coverage.Coverage(data_file=str(work / ".coverage"), branch=True, source_pkgs=["runtime"])
    measured.start()
    target = _load(name)
    record = Recorder(target, work, finds)
    if options.engine == "replay":
        files = [options.replay] if options.replay else sorted((work / "corpus").glob("*"))
        replay(target, record, files)
    else:

        def edges() -> int:
            data = measured.get_data()  # which also collects what was measured since
            files = [file for file in data.measured_files() if _module(file).startswith(tuple(target.modules))]
            return sum(len(data.arcs(file) or ()) for file in files)

        run_hypothesis(target, record, 60 * options.minutes, options.inputs, options.seed, edges)
    record.save()
    measured.stop()
    measured.save()


def _module(file: str) -> str:
    return ".".join(Path(file).relative_to(ROOT).with_suffix("").parts) if file.startswith(str(ROOT)) else file


def _report_coverage(work: Path) -> None:
    """Print lines and branches of all targets' modules that seeds and corpora reach."""
    import coverage

    measured = coverage.Coverage(data_file=str(work / ".coverage"), branch=True)
    measured.combine([str(file) for file in work.glob("*/.coverage")], keep=True)
    modules = sorted({module for name in NAMES for module in _load(name).modules})
    patterns = [f"{ROOT / module.replace('.', '/')}{end}" for module in modules for end in (".py", "/*")]
    measured.report(include=patterns, show_missing=True)


if __name__ == "__main__":
    sys.exit(main())
