"""Run one target in this process, with inputs from Atheris or from Hypothesis."""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from benchmarks.fuzz.target import Guard, Target

Finder = Callable[[bytes], None]


@dataclass
class Progress:
    """What a run has done so far; kept in a file, because an input may end the process.

    Attributes:
        edges_before, edges: covered by the seeds, and by all inputs.
        finds: file of the input of each find, by what went wrong.
    """

    inputs: int = 0
    edges_before: int = 0
    edges: int = 0
    finds: dict[str, str] = field(default_factory=dict)


class LastInput:
    """The input that is being checked, in a file mapped to memory: it is there when the process has ended."""

    NAME, SIZE = "last-input", 4 << 20

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(self.SIZE))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.SIZE)

    def keep(self, data: bytes) -> None:
        """Keep an input, cut to what there is room for."""
        data = data[: self.SIZE - 8]
        self._memory[: 8 + len(data)] = len(data).to_bytes(8, "little") + data

    @staticmethod
    def read(path: Path) -> bytes:
        """The input that was kept."""
        content = path.read_bytes()
        return content[8 : 8 + int.from_bytes(content[:8], "little")]


class Recorder:
    """Gives inputs to a target and stores the smallest one of each find."""

    def __init__(self, target: Target, work: Path, finds: Path) -> None:
        self.progress = Progress()
        self._target, self._finds = target, finds
        self._scratch = (work / "scratch").resolve()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        self._file = work / "progress.json"
        self._last_input = LastInput(work / LastInput.NAME)
        self._guard = Guard(target, self._scratch)
        self._saved = 0.0

    def __call__(self, data: bytes) -> None:
        """Check one input."""
        self.progress.inputs += 1
        self._last_input.keep(data)
        try:
            self._guard.run(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # panics of libraries are no Exceptions
            self._store(data, error)
        if time.monotonic() - self._saved > 1:
            self.save()

    def save(self) -> None:
        """Write the progress."""
        self._saved = time.monotonic()
        self._file.write_text(json.dumps(asdict(self.progress)))

    def _store(self, data: bytes, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/runtime/" in frame.filename] or frames[-1:]
        what = f"{type(error).__name__} in {Path(own[-1].filename).name}:{own[-1].lineno}"
        if "Violation" in what:
            what = f"Violation: {' '.join(str(error).split()[:6])}, {what.partition(' in ')[2]}"
        name = f"{self._target.name}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"
        path = self._finds / name
        if not path.exists() or len(data) < path.stat().st_size:
            self._finds.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            text = "".join(traceback.format_exception(error))
            path.with_name(f"{name}.txt").write_text(f"{what}\n\n{text[-8000:]}", errors="backslashreplace")
        self.progress.finds[what] = str(path)
        self.save()


def run_atheris(target: Target, record: Recorder, work: Path, seconds: float, seed: int) -> None:
    """Mutate by the target's own mutation, guided by the coverage of its modules. Ends the process."""
    import atheris

    corpus = work / "corpus"
    corpus.mkdir(exist_ok=True)
    for data in target.seeds():
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        return target.mutate(data, Random(number))[:max_size]

    options = [
        f"-max_total_time={seconds:.0f}",
        f"-seed={seed + 1}",
        f"-artifact_prefix={work}/",
        "-timeout=1000000",
        "-max_len=1000000",
        "-rss_limit_mb=0",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], record, custom_mutator=mutate)
    atheris.Fuzz()


def run_hypothesis(
    target: Target, record: Recorder, seconds: float, inputs: int, seed: int, edges: Callable[[], int] = lambda: 0
) -> None:
    """Mutate the seeds one to six times, each choice drawn by Hypothesis, until the time or the inputs are used up."""
    import hypothesis
    from hypothesis import strategies as st

    seeds = target.seeds()
    for data in seeds:
        record(data)
    record.progress.edges_before = edges()
    deadline, round_size = time.monotonic() + seconds, min(50, inputs)

    @hypothesis.settings(
        max_examples=round_size,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.sampled_from(seeds), st.randoms(use_true_random=False), st.integers(1, 6))
    def draw(data: bytes, random: Random, changes: int) -> None:
        for _ in range(changes):
            data = target.mutate(data, random)
        record(data)

    for number in range(-(-inputs // round_size)):
        if time.monotonic() >= deadline:
            break
        hypothesis.seed(seed * 1_000_003 + number)(draw)()
    record.progress.edges = edges()


def replay(target: Target, record: Recorder, files: Sequence[Path]) -> None:
    """Give the seeds and stored inputs to a target."""
    for data in [*target.seeds(), *(path.read_bytes() for path in files)]:
        record(data)
