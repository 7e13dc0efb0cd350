"""Kill a quantization at random times, resume it each time, and compare the output with an uninterrupted run.

One uninterrupted run is timed. Then the same command is run with --resume and killed with SIGKILL at a random time
after it opened its job, until --kills kills are done. When a run finishes before its kill, its output is compared and a
new run is started. Every file outside job/ must be byte-identical to the uninterrupted run's.

    python benchmarks/kill_test.py                                       20 kills of the embedded demo
    python benchmarks/kill_test.py --kills 5 --model DIR -- --bits 8     more arguments of quantize/run.py after --
    python benchmarks/kill_test.py --seed 7 --work /tmp/kills            other kill times; keep the directories

Prints one line per kill and a final JSON line; the exit status is 1 if any byte differs. A kill does not simulate a
power cut: data that a process wrote survives a kill even if it was not synced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    arguments = parse()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="kill-test-"))
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        sys.exit(f"--work is {work}, which is not empty; choose an empty directory.")
    command = [sys.executable, str(ROOT / "quantize" / "run.py"), "--model", arguments.model, *arguments.extra]
    try:
        result = measure(command, work, arguments.kills, random.Random(arguments.seed))
    finally:
        if arguments.work is None:
            shutil.rmtree(work)
    print(json.dumps({"model": arguments.model, "arguments": arguments.extra, "seed": arguments.seed, **result}))
    return 0 if result["identical"] else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a directory, a hub id or `demo` (default)")
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times (default %(default)s)")
    parser.add_argument("--work", type=Path, help="directory for the outputs, kept (default: a temporary one)")
    parser.add_argument("extra", nargs="*", help="further arguments of quantize/run.py, after --")
    return parser.parse_args()


def measure(command: list[str], work: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Do the uninterrupted run, then the killed ones; return the fields of the JSON line."""
    start = time.perf_counter()
    process = start_process(command, work / "undisturbed")
    wait_for_job(process, work / "undisturbed")
    taken_up = time.perf_counter()
    process.wait()
    refuse_failure(process)
    seconds = time.perf_counter() - taken_up
    expected = digests(work / "undisturbed")
    say(f"undisturbed: {taken_up - start:.1f} s to the job, {seconds:.1f} s at it; {len(expected)} files")
    moments: Counter[str] = Counter()
    differing: set[str] = set()
    runs = delivered = 0
    while delivered < kills or not runs:
        output = work / f"disturbed-{runs}"
        while True:
            left = kills - delivered
            # On average, the remaining kills are spread over one run.
            pause = draw.uniform(0, 2 * seconds / left) if left else None
            moment = run_and_kill(command, output, pause)
            if moment is None:
                break
            delivered += 1
            moments[moment.partition(",")[0]] += 1
            say(f"kill {delivered:3} of {kills}: after {pause:5.1f} s, {moment}")
        runs += 1
        found = digests(output)
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        say(f"run {runs} finished: {f'{len(wrong)} files differ: {wrong}' if wrong else 'identical'}")
        differing.update(wrong)
    return {
        "kills": delivered, "runs": runs, "identical": not differing, "differing": sorted(differing),
        "files": len(expected), "kills_by_moment": dict(sorted(moments.items())),
        "seconds_undisturbed": round(seconds, 1), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def run_and_kill(command: list[str], output: Path, pause: float | None) -> str | None:
    """Kill a run `pause` seconds after it opened its job; return what it was doing, or None if it finished."""
    process = start_process(command, output)
    wait_for_job(process, output)
    try:
        process.wait(pause)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return describe(output)
    refuse_failure(process)
    return None


def start_process(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen([*command, "--output", str(output), "--resume"], stdout=log, stderr=log)


def wait_for_job(process: subprocess.Popen[bytes], output: Path) -> None:
    """Wait until the process has opened its job, which rewrites job.json, or has ended."""
    state, begun = output / "job" / "job.json", time.time()
    while process.poll() is None and not (state.exists() and state.stat().st_mtime >= begun):
        time.sleep(0.005)


def refuse_failure(process: subprocess.Popen[bytes]) -> None:
    if process.returncode:
        log = Path(process.args[-2]).with_suffix(".log")  # type: ignore[index, arg-type]
        sys.exit(f"the run failed with status {process.returncode}:\n{log.read_text()}")


def describe(output: Path) -> str:
    """What the kill interrupted, judged from the files that it left."""
    state_file = output / "job" / "job.json"
    if not state_file.exists():
        return "before the job"
    state = json.loads(state_file.read_text())
    partial = [path.name for path in output.rglob(".*.partial")]
    detail = f", while writing {partial[0].removeprefix('.').removesuffix('.partial')}" if partial else ""
    if state["finished"]:
        return f"after the end{detail}"
    if (output / "model.safetensors.index.json").exists():
        return f"after the index{detail}"
    return f"in the sweep, {len(state['blocks'])} blocks finished{detail}"


def digests(output: Path) -> dict[str, str]:
    """sha256 of every file outside job/, and of files in job/ that a finished job must not leave behind."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_file() and (not name.startswith("job/") or name.endswith((".partial", ".bin"))):
            with open(path, "rb") as file:
                found[name] = hashlib.sha256(file.read()).hexdigest()
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
