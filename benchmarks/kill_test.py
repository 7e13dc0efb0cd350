"""Let every system call of every command that writes files fail once, run the command again, and compare the bytes.

A small library (`system_calls.c`, compiled with cc) counts the calls below the output directory that create, write,
sync, rename or remove something. At the n-th call of a run one fault happens:

    kill        SIGKILL before the call
    torn        SIGKILL after half of a write, or after another call
    EIO, EINTR  the call fails
    full        ENOSPC, and at every later call that takes space
    short       a write takes half of the bytes
    TERM, INT   the signal, before the call
    moment      SIGKILL, SIGTERM or SIGINT at a random time instead of a call

Then the same command runs again (with --resume if it has that), a quarter of the times killed once more, and to its
end. Every file must be there, byte for byte as from an undisturbed run, and no other. Before that no file may be half
written under its final name, and unless it was killed no temporary file may be left. An error must be one line that
names the file and, for a full disk, the remedy; short and interrupted calls must not be errors.

    python benchmarks/kill_test.py                            every call of every command, every fault: hours
    python benchmarks/kill_test.py --minutes 30 --kills 60 --others 15                   a random part of them
    python benchmarks/kill_test.py --writer export --writer demo --fault kill --fault full
    python benchmarks/kill_test.py --at export:kill:17     one run, with what it printed

The models are random and tiny, so a run takes about a second. One process imports everything and is forked for each
run. A kill does not simulate a power cut: data that a process wrote survives a kill even if it was not synced.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import importlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kill_writers import Writer, prepare_process, write_inputs, write_packed_models, writers  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

HANG_SECONDS = 120
WRITES = ("write", "pwrite", "pwrite64", "writev")
SLOW_CALLS = (*WRITES, "open", "fsync", "ftruncate", "ftruncate64", "posix_fallocate", "posix_fallocate64")
SPACE_CALLS = (*SLOW_CALLS, "mkdir", "rename")
UNTIMED = ("job/job.json", "job/blocks.jsonl")  # they hold seconds and bytes of memory


@dataclass(frozen=True)
class Fault:
    """`kind` is that of `system_calls.c`, `value` its errno or signal; `calls` are those that it may happen at."""

    kind: int
    value: int = 0
    calls: tuple[str, ...] = ()


NO_FAULT = Fault(0)
FAULTS = {
    "kill": Fault(1),
    "torn": Fault(2),
    "EIO": Fault(3, errno.EIO),
    "EINTR": Fault(3, errno.EINTR, SLOW_CALLS),
    "full": Fault(4, errno.ENOSPC, SPACE_CALLS),
    "short": Fault(5, 0, WRITES),
    "TERM": Fault(6, signal.SIGTERM),
    "INT": Fault(6, signal.SIGINT),
    "moment": NO_FAULT,
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
COMPLAINTS = ("lost", "torn", "different", "left over", "traceback", "unclear error", "refused", "ignored")


@dataclass(frozen=True)
class Ending:
    """How a run ended: exit status (negative: the signal), what it printed, the calls that it made."""

    status: int
    text: str
    calls: list[str]
    seconds: float


def main() -> int:
    arguments = parse()
    if "LD_PRELOAD" in os.environ:
        return Test(Path(os.environ["KILL_TEST_WORK"]), arguments).run()
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    work = arguments.work or Path(tempfile.mkdtemp(prefix="kill-test-", dir=in_memory))
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        sys.exit(f"--work is {work}, which is not empty; choose an empty directory.")
    try:
        library = work / "system_calls.so"
        source = Path(__file__).with_name("system_calls.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = os.environ | one_thread | {"LD_PRELOAD": str(library), "KILL_TEST_WORK": str(work)}
        return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
    finally:
        if arguments.work is None:
            shutil.rmtree(work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, metavar="N", help="draw N calls for each command and kind of kill")
    parser.add_argument("--others", type=int, metavar="N", help="draw N calls for each command and other fault")
    parser.add_argument("--moments", type=int, default=12, help="random times for each command (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="time, in equal shares for the commands")
    parser.add_argument("--writer", action="append", help="only this command; may be repeated")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="only this fault; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default %(default)s)")
    parser.add_argument("--at", metavar="WRITER:FAULT:N", help="one run")
    parser.add_argument("--work", type=Path, help="directory, kept (default: a temporary one, in memory)")
    return parser.parse_args()


class Test:
    """Runs every command with every fault in `work`."""

    def __init__(self, work: Path, arguments: argparse.Namespace):
        self.work, self.root, self.arguments = work, work / "root", arguments
        self.library = ctypes.CDLL(str(work / "system_calls.so"))
        self.library.arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_int]
        self.draw = random.Random(arguments.seed)
        self.examples: list[str] = []

    def run(self) -> int:
        start = time.perf_counter()
        self._in_child(lambda: write_inputs(self.work))
        self._in_child(lambda: write_packed_models(self.work))
        self.writers = writers(self.work)
        if self.arguments.at:
            return self._run_one(*self.arguments.at.split(":"))
        chosen = self.arguments.writer or list(self.writers)
        share = 60 * self.arguments.minutes / len(chosen)
        results = {name: self._test_writer(name, time.perf_counter() + share) for name in chosen}
        total: Counter[str] = Counter()
        for result in results.values():
            for counted in result["faults"].values():
                total.update(counted)
        bad = {name: total[name] for name in COMPLAINTS if total[name]}
        drawn = {"kills": self.arguments.kills, "others": self.arguments.others, "moments": self.arguments.moments}
        print(json.dumps({
            "machine": describe_machine(), "seed": self.arguments.seed, "drawn": drawn,
            "seconds": round(time.perf_counter() - start), "runs": total["runs"], "kills": total["kills"],
            "errors": total["errors"], "signals": total["signals"], "bad": bad, "examples": self.examples[:40],
            "writers": results,
        }))  # fmt: skip
        return 1 if bad else 0

    def _run_one(self, name: str, fault: str, call: str) -> int:
        self._undisturbed(self.writers[name])
        counted = self._disturb(name, fault, int(call), show=True)
        print(json.dumps(counted))
        return 0

    def _test_writer(self, name: str, deadline: float) -> dict[str, Any]:
        calls = self._undisturbed(self.writers[name])
        say(f"{name}: {len(calls)} calls in {self.seconds:.1f} s, {len(self.expected)} files")
        faults: dict[str, Counter[str]] = {fault: Counter() for fault in self.arguments.fault or FAULTS}
        points = [(fault, point) for fault in faults for point in self._points(fault, calls)]
        self.draw.shuffle(points)  # so that what is done before the time is up is drawn at random, too
        for fault, point in points:
            if time.perf_counter() < deadline:
                faults[fault].update(self._disturb(name, fault, point))
        say(f"{name}: {faults}")
        counts = {fault: {key: count for key, count in each.items() if count} for fault, each in faults.items()}
        return {"calls": len(calls), "seconds": round(self.seconds, 2), "faults": counts}

    def _points(self, fault: str, calls: list[str]) -> list[int]:
        """The calls at which a fault happens, drawn if there are more than wanted."""
        if fault == "moment":
            return [0] * self.arguments.moments
        kinds = FAULTS[fault].calls
        points = [n for n, call in enumerate(calls, 1) if not kinds or call.split()[0] in kinds]
        limit = self.arguments.kills if fault in ("kill", "torn") else self.arguments.others
        return self.draw.sample(points, min(limit or len(points), len(points)))

    def _undisturbed(self, writer: Writer) -> list[str]:
        """Run the command twice, which must give the same; import here what it imported; return its calls."""
        found = []
        for _ in range(2):
            self._empty_root()
            ending = self._start(writer, NO_FAULT, 0, again=False)
            if ending.status:
                sys.exit(f"an undisturbed run ended with status {ending.status}:\n{ending.text}")
            found.append(digests(self.root))
            for module in (self.work / "modules").read_text().split():
                with suppress(Exception):
                    importlib.import_module(module)
        if found[0] != found[1]:
            sys.exit(f"two undisturbed runs differ: {sorted(dict(found[0].items() ^ found[1].items()))}")
        self.expected, self.seconds = found[0], ending.seconds
        return ending.calls

    def _disturb(self, name: str, fault_name: str, call: int, show: bool = False) -> Counter[str]:
        """One run with a fault, and the run after it; what was wrong, counted."""
        writer, fault = self.writers[name], FAULTS[fault_name]
        self._empty_root()
        moment = (self.draw.uniform(0.05, self.seconds), self.draw.choice(SIGNALS)) if fault_name == "moment" else None
        ending = self._start(writer, fault, call, again=False, moment=moment)
        kind = "signals" if fault.kind in (0, 6) else "kills" if fault.kind < 3 else "errors"
        counted = Counter({"runs": 1, kind: int(len(ending.calls) >= call)})
        complaints = self._judge_stop(writer, fault_name, fault, call, ending)
        texts = [ending.text]
        if self.draw.random() < 0.25:
            again = self._start(writer, FAULTS["torn"], self.draw.randint(1, len(self.expected)), again=True)
            counted["runs"] += 1
            counted["kills"] += again.status == -signal.SIGKILL
            complaints += [("torn", file) for file in self._torn(writer)]
        complete = bool(writer.complete) and (self.root / writer.complete).exists()
        last = self._start(writer, NO_FAULT, 0, again=True)
        counted["runs"] += 1
        texts.append(last.text)
        if last.status and not (complete and "exists" in last.text):
            complaints.append(("refused", f"status {last.status}: {last.text[-300:]}"))
        complaints += self._compare()
        for kind in {kind for kind, _ in complaints}:
            counted[kind] += 1
        for kind, detail in complaints:
            at = ending.calls[call - 1] if 0 < call <= len(ending.calls) else str(moment)
            self.examples.append(f"{name}:{fault_name}:{call} ({at}): {kind}: {detail}")
            say(f"  {self.examples[-1]}")
        if show:
            say("\n----\n".join(texts))
        return counted

    def _judge_stop(self, writer: Writer, name: str, fault: Fault, call: int, ending: Ending) -> list[tuple[str, str]]:
        """What is wrong right after the fault."""
        found = [("torn", file) for file in self._torn(writer)]
        if ending.status in (-signal.SIGKILL, -signal.SIGTERM):  # SIGTERM kills before the command handles it
            return found
        if "Traceback" in ending.text:
            found.append(("traceback", ending.text[-600:]))
        left = [path for path in digests(self.root) if ".partial" in path or path.startswith("tmp/")]
        found += [("left over", f"{path} before the next run") for path in left if path != writer.grows]
        if ending.status == 0:
            found += self._compare()
            if name == "EIO" and len(ending.calls) >= call:
                found.append(("ignored", f"status 0 after {ending.calls[call - 1]}"))
        elif name in ("EINTR", "short"):
            found.append(("refused", f"status {ending.status}: {ending.text[-300:]}"))
        elif name in ("TERM", "INT", "moment"):
            if ending.status != 130:
                found.append(("unclear error", f"status {ending.status}: {ending.text[-300:]}"))
        elif ending.status != 2 or not clear_error(ending.text, name, self.root):
            found.append(("unclear error", f"status {ending.status}: {ending.text[-300:]}"))
        return found

    def _torn(self, writer: Writer) -> list[str]:
        """Files under their final names that are not whole."""
        torn = []
        for name, digest in digests(self.root).items():
            path = self.root / name
            if name == writer.grows:
                whole = self._has_counted_rows(path)
            elif name.endswith(".json") and name not in self.expected and ".partial" not in name:
                whole = bool(json.loads(path.read_text()))
            else:
                temporary = ".partial" in name or (writer.scratch and name.startswith(writer.scratch))
                whole = bool(temporary) or self.expected.get(name, digest) == digest
            torn += [] if whole else [name]
        return torn

    def _has_counted_rows(self, path: Path) -> bool:
        """Whether a growing file begins with the rows that its resume record counts, or is complete without one."""
        record = path.with_name(f"{path.name.removesuffix('.partial.jsonl')}.progress.json")
        data = path.read_bytes()
        if not record.exists():
            name = str(path.relative_to(self.root))
            return not data or self.expected.get(name) == digest_of(data) or ".partial" in path.name
        state = json.loads(record.read_text())
        return not state["rows"] or digest_of(data[: state["bytes"]]) == state["sha256"]

    def _compare(self) -> list[tuple[str, str]]:
        """Differences from the undisturbed run."""
        found = digests(self.root)
        lost = [("lost", name) for name in self.expected if name not in found]
        left = [("left over", name) for name in found if name not in self.expected]
        both = [name for name in self.expected if name in found]
        return lost + left + [("different", name) for name in both if self.expected[name] != found[name]]

    def _empty_root(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        (self.root / "tmp").mkdir(parents=True)

    def _start(
        self, writer: Writer, fault: Fault, call: int, *, again: bool, moment: tuple[float, int] | None = None
    ) -> Ending:
        """Run the command in a child with the fault armed, or with a signal after some seconds."""

        def child() -> int:
            prepare_process(self.root)
            log = os.open(self.work / "calls", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            self.library.arm(os.fsencode(self.root), fault.kind, fault.value, call, log)
            status = writer.run(self.root, again)
            for number in (signal.SIGTERM, signal.SIGINT):  # the command has ended; a late signal is not for it
                signal.signal(number, signal.SIG_IGN)
            self.library.arm(b"/nowhere", 0, 0, 0, -1)
            (self.work / "modules").write_text("\n".join(sys.modules))
            return status

        (self.work / "calls").write_bytes(b"")
        start = time.perf_counter()
        status = self._in_child(child, moment)
        seconds = time.perf_counter() - start
        text = (self.work / "printed").read_text(errors="replace")
        return Ending(status, text, (self.work / "calls").read_text().splitlines(), seconds)

    def _in_child(self, function: Any, moment: tuple[float, int] | None = None) -> int:
        """Call `function` in a forked process and return its exit status; what it prints goes to a file."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                printed = os.open(self.work / "printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(printed, 1)
                os.dup2(printed, 2)
                status = int(function() or 0)
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        ended = select.poll()
        ended.register(os.pidfd_open(pid), select.POLLIN)
        if moment and not ended.poll(1000 * moment[0]):
            os.kill(pid, moment[1])
        if not ended.poll(1000 * HANG_SECONDS):
            os.kill(pid, signal.SIGKILL)
            sys.exit(f"a run hung:\n{(self.work / 'printed').read_text()}")
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)


def clear_error(text: str, fault: str, root: Path) -> bool:
    """Whether the last line is an error that names a file and the remedy."""
    line = text.splitlines()[-1] if text.strip() else ""
    remedies = ("free some space on /", "free 700 MB") if fault == "full" else ("disk on /", "free 700 MB")
    return line.startswith("error: ") and str(root) in line and any(remedy in line for remedy in remedies)


def digests(root: Path) -> dict[str, str]:
    """sha256 of every file below `root`, by relative path; directories have none."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        hashed = path.is_file() and not name.endswith(UNTIMED)
        found[name] = digest_of(path.read_bytes()) if hashed else ""
    return found


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
