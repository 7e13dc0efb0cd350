"""A quantization as a job that can be killed at any moment and resumed at its last finished block.

The output directory holds `job/job.json`, rewritten whole after each block: that rename is the moment the
block counts. Its shard is on disk before, and so is what the streams are after it, and its line in the log.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from quantize.recipe import Recipe
from runtime.errors import MENDABLE, JobError, KitError, LostJobError, PlanError
from runtime.files import open_locked, write_whole

SCHEMA = 1


class Job:
    """The state of one output directory, locked while this process works in it.

    As a context it lets go of the lock at its end, and what a user can mend leaves it as a JobError that
    says how to go on.
    """

    def __init__(self, output: Path, state: dict[str, Any], lock: FileIO):
        self.output = output
        self._state = state
        self._lock = lock

    @classmethod
    def open(cls, output: Path, recipe: Recipe, *, resume: bool) -> Job:
        """Start a job in an empty directory, or go on with the one that is there. It is one once a shard is recorded.

        Raises:
            JobError: the directory is not ours, is in use, holds a job and `resume` was not said, or holds
                one with another recipe.
        """
        refuse_foreign(output)
        lock = open_locked(output / "job" / "lock", "wb", output)
        state = _read_state(output)
        if state is None:
            state = {"schema": SCHEMA, "recipe": asdict(recipe), "threads": torch.get_num_threads()}
            state |= {"shards": {}, "blocks": [], "finished": False}
        elif not resume:
            raise JobError(
                f"{output} already holds a {'finished' if state['finished'] else 'started'} job; add --resume to go "
                "on with it, or choose another --output."
            )
        recipe.refuse_changes(state["recipe"], f"the job in {output}")
        job = cls(output, state, lock)
        if not job.blocks or job.finished:
            job._drop_streams()
        if not job.finished:
            job.streams.mkdir(exist_ok=True)
        return job

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        if isinstance(error, OSError) and error.errno in MENDABLE and error.filename is None:
            error.filename = str(self.output)  # a full disk is not named by who finds it full
        if isinstance(error, (PlanError, LostJobError)):
            return  # which say themselves what would do
        if isinstance(error, KitError) or (isinstance(error, OSError) and error.errno in MENDABLE):
            fault = str(error).rstrip(".")
            raise JobError(f"{fault}. Finished blocks are kept; the same command with --resume goes on.") from error

    @property
    def streams(self) -> Path:
        """Where the streams' buffers live until the job is finished."""
        return self.output / "job" / "streams"

    @property
    def threads(self) -> int:
        """CPU threads that the job was started with: sums that are split otherwise round otherwise."""
        return self._state["threads"]

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
        lines = (json.dumps(block) + "\n" for block in self.blocks)
        write_whole(self.output / "job" / "blocks.jsonl", "".join(lines))
        self._save()

    def record_shard(self, shard: str, sha256: str) -> None:
        """Record a shard that belongs to no block."""
        self._state["shards"][shard] = sha256
        self._save()

    def finish(self) -> None:
        """Everything is written: the streams may go."""
        self._state["finished"] = True
        self._save()
        self._drop_streams()

    def _drop_streams(self) -> None:
        shutil.rmtree(self.streams, ignore_errors=True)

    def _save(self) -> None:
        write_whole(self.output / "job" / "job.json", json.dumps(self._state, indent=1) + "\n")


def refuse_foreign(output: Path) -> None:
    """Raise JobError unless `output` is absent, empty, or a job's."""
    if output.exists() and not output.is_dir():
        raise JobError(f"{output} is a file; choose another --output.")
    job = output / "job"
    contents = {*output.iterdir(), *job.glob("*")} if output.is_dir() else set()
    if contents - {job} and job / "lock" not in contents:
        raise JobError(f"{output} is not empty and holds no job of this kit; choose another --output.")


def _read_state(output: Path) -> dict[str, Any] | None:
    path = output / "job" / "job.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
        schema = state["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{path} is damaged ({error}); remove {output} and start again.") from error
    if schema != SCHEMA:
        raise JobError(f"{path} has schema {schema!r}, this kit writes {SCHEMA}; use another --output.")
    return state
