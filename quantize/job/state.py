"""The state of a quantization job on disk. A job can be killed at any time and resumed after its last finished block.

`job/job.json` in the output directory is replaced atomically after each block. A block counts as finished once that
file lists it; its shard, its hidden states and its log line are on disk before. Other programs read `progress` and
`finished` there; docs/quantizing.md describes them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from quantize.job.recipe import Recipe
from runtime.common.errors import (
    USER_FIXABLE_ERRNOS,
    ConfigurationError,
    JobError,
    KitError,
    UnresumableJobError,
    describe_os_error,
)
from runtime.common.files import open_locked, remove_tree, write_file_atomically

SCHEMA = 1


class Job:
    """The job in one output directory, which is locked while the job is open.

    As a context manager it releases the lock at the end, and converts errors that the user can fix into JobErrors that
    explain how to resume.
    """

    def __init__(self, output: Path, state: dict[str, Any], lock: FileIO):
        self.output = output
        self._state = state
        self._lock = lock

    @classmethod
    def open(cls, output: Path, recipe: Recipe, *, resume: bool) -> Job:
        """Start a job in an empty directory, or resume the one in it. A job exists once its first shard is recorded.

        Raises:
            JobError: the directory contains other files, is in use, contains a job and `resume` is false, or contains a
                job with another recipe.
        """
        check_output_directory(output)
        lock = open_locked(output / "job" / "lock", "wb", output)
        state = _read_state(output)
        if state is None or not any(state[key] for key in ("shards", "gradient_passes", "finished")):
            state = {"schema": SCHEMA, "recipe": asdict(recipe), "threads": torch.get_num_threads()}
            state |= {"gradient_passes": 0, "shards": {}, "blocks": [], "finished": False}
        elif not resume:
            raise JobError(
                f"{output} already contains a {'finished' if state['finished'] else 'started'} job; add --resume to "
                "continue it, or choose another --output."
            )
        recipe.check_unchanged(state["recipe"], f"the job in {output}")
        job = cls(output, state, lock)
        if job.finished or not (job.blocks or job.gradient_passes):
            job._remove_states()
        if not job.finished:
            job.states_directory.mkdir(exist_ok=True)
        return job

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        if isinstance(error, (ConfigurationError, UnresumableJobError)):
            return  # resuming does not help; their messages have the remedy
        if isinstance(error, OSError) and error.errno in USER_FIXABLE_ERRNOS:
            error.filename = error.filename or str(self.output)  # not every library names the file
            message = describe_os_error(error)
        elif isinstance(error, KitError):
            message = str(error)
        else:
            return
        message = message.rstrip(".")
        raise JobError(f"{message}. Finished blocks are kept; run the same command with --resume.") from error

    @property
    def states_directory(self) -> Path:
        """Directory of the hidden state buffers until the job is finished."""
        return self.output / "job" / "streams"

    @property
    def threads(self) -> int:
        """CPU threads that the job was started with; their number changes how sums are rounded."""
        return self._state["threads"]

    @property
    def gradient_passes(self) -> int:
        """Finished passes of the backward sweep."""
        return self._state["gradient_passes"]

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """Metrics of the finished blocks, in order."""
        return self._state["blocks"]

    @property
    def shards(self) -> dict[str, str]:
        """sha256 of the shards written so far, by file name."""
        return self._state["shards"]

    @property
    def finished(self) -> bool:
        return self._state["finished"]

    def start_stage(self, stage: str, total: int, done: int = 0) -> None:
        """Record that a stage of `total` steps has begun, `done` of them in an earlier run."""
        self._state["progress"] = {"stage": stage, "done": done, "total": total}
        self._save()

    def advance(self) -> None:
        """Record that a step of the stage is done. Only other programs read it: no resume point."""
        self._progress["done"] += 1
        self._save()

    def finish_block(self, shard: str, sha256: str, metrics: dict[str, Any]) -> None:
        """Record a block whose shard and hidden states are on disk; it is a step of the current stage."""
        self._state["shards"][shard] = sha256
        self._state["blocks"].append(metrics)
        self._progress["done"] += 1
        lines = (json.dumps(block) + "\n" for block in self.blocks)
        write_file_atomically(self.output / "job" / "blocks.jsonl", "".join(lines))
        self._save()

    def finish_gradient_pass(self) -> None:
        """Record a pass of the backward sweep whose results are on disk."""
        self._state["gradient_passes"] += 1
        self._save()

    def record_shard(self, shard: str, sha256: str) -> None:
        """Record the shard of the embedding or of the head."""
        self._state["shards"][shard] = sha256
        self._save()

    def finish(self) -> None:
        """Mark the job as finished and delete the hidden state buffers."""
        self._state["finished"] = True
        self._progress["done"] = self._progress["total"]
        self._save()
        self._remove_states()

    @property
    def _progress(self) -> dict[str, Any]:
        return self._state.setdefault("progress", {"stage": "", "done": 0, "total": 0})

    def _remove_states(self) -> None:
        remove_tree(self.states_directory)

    def _save(self) -> None:
        write_file_atomically(self.output / "job" / "job.json", json.dumps(self._state, indent=1) + "\n")


def check_output_directory(output: Path) -> None:
    """Raise JobError unless `output` does not exist, is empty, or contains a job."""
    if output.exists() and not output.is_dir():
        raise JobError(f"{output} is a file; choose another --output.")
    job = output / "job"
    contents = {*output.iterdir(), *job.glob("*")} if output.is_dir() else set()
    if contents - {job} and job / "lock" not in contents:
        raise JobError(f"{output} is not empty and contains no job of this kit; choose another --output.")


def _read_state(output: Path) -> dict[str, Any] | None:
    path = output / "job" / "job.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
        schema = state["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{path} is damaged ({error}); remove {output} and start a new job.") from error
    if schema != SCHEMA:
        raise JobError(f"{path} has schema {schema!r}, but this version writes {SCHEMA}; choose another --output.")
    return state
