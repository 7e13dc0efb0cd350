"""A quantization as a job that can be killed at any moment and resumed at its last finished block.

The output directory holds `job/job.json`, rewritten whole after each block: that rename is the moment the
block counts. Its shard is on disk before, and so is what the streams are after it.
"""

from __future__ import annotations

import fcntl
import json
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from quantize.recipe import Recipe
from runtime.errors import JobError
from runtime.files import write_whole

SCHEMA = 1


class Job:
    """The state of one output directory, locked while this process works in it."""

    def __init__(self, output: Path, state: dict[str, Any], lock: IO[str]):
        self.output = output
        self._state = state
        self._lock = lock

    @classmethod
    def open(cls, output: Path, recipe: Recipe, *, resume: bool) -> Job:
        """Start a job in an empty directory, or go on with the one that is there.

        Raises:
            JobError: the directory is not ours, is in use, holds a job and `resume` was not said, or holds
                one with another recipe.
        """
        refuse_foreign(output)
        (output / "job" / "streams").mkdir(parents=True, exist_ok=True)
        lock = _lock(output)
        state = _read_state(output)
        if state is None:
            state = {"schema": SCHEMA, "recipe": asdict(recipe), "shards": {}, "blocks": [], "finished": False}
        elif not resume:
            raise JobError(
                f"{output} already holds a {'finished' if state['finished'] else 'started'} job; add --resume to go "
                "on with it, or choose another --output."
            )
        recipe.refuse_changes(state["recipe"], f"the job in {output}")
        job = cls(output, state, lock)
        job._save()
        return job

    @property
    def streams(self) -> Path:
        """Where the streams' buffers live until the job is finished."""
        return self.output / "job" / "streams"

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """Figures of the finished blocks, in order."""
        return self._state["blocks"]

    @property
    def shards(self) -> dict[str, str]:
        """sha256 by file name of the shards written so far."""
        return self._state["shards"]

    @property
    def finished(self) -> bool:
        return self._state["finished"]

    def finish_block(self, shard: str, sha256: str, figures: dict[str, Any]) -> None:
        """Record a block whose shard and streams are on disk."""
        self._state["shards"][shard] = sha256
        self._state["blocks"].append(figures)
        self._save()
        lines = (json.dumps(block) + "\n" for block in self.blocks)
        write_whole(self.output / "job" / "blocks.jsonl", "".join(lines))

    def record_shard(self, shard: str, sha256: str) -> None:
        """Record a shard that belongs to no block."""
        self._state["shards"][shard] = sha256
        self._save()

    def finish(self) -> None:
        """Everything is written: the streams may go."""
        self._state["finished"] = True
        self._save()
        for file in self.streams.glob("*.bin"):
            file.unlink()
        self.streams.rmdir()

    def close(self) -> None:
        """Let another process work here."""
        self._lock.close()

    def _save(self) -> None:
        write_whole(self.output / "job" / "job.json", json.dumps(self._state, indent=1) + "\n")


def refuse_foreign(output: Path) -> None:
    """Raise JobError unless `output` is absent, empty, or a job's."""
    if output.exists() and not output.is_dir():
        raise JobError(f"{output} is a file; choose another --output.")
    if output.is_dir() and any(output.iterdir()) and not (output / "job").is_dir():
        raise JobError(f"{output} is not empty and holds no job of this kit; choose another --output.")


def _lock(output: Path) -> IO[str]:
    lock = open(output / "job" / "lock", "w")  # noqa: SIM115 - held as long as the job is
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise JobError(f"{output} is in use by another run; wait for it, or choose another --output.") from error
    return lock


def _read_state(output: Path) -> dict[str, Any] | None:
    path = output / "job" / "job.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise JobError(f"{path} is damaged ({error}); remove {output} and start again.") from error
    if state.get("schema") != SCHEMA:
        raise JobError(f"{path} has schema {state.get('schema')!r}, this kit writes {SCHEMA}; use another --output.")
    return state
