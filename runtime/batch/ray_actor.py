"""The Ray actor, a `Scorer` in a process of its own, and how its results and its death are received.

Actors return errors that the user can fix, because Ray would wrap a raised one in a remote traceback.
`raise_if_error` raises them on this side.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import torch
from ray import exceptions

from runtime.batch.engine import score_window
from runtime.batch.row import InputRow, OutputRecord
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.common.errors import ConfigurationError, KitError
from runtime.common.version import kit_version
from runtime.execution.devices import find_devices
from runtime.execution.placement_plan import PlacementPlan
from runtime.options import ModelOptions
from runtime.scorer import Scorer

ACTOR_DEATH_ERRORS = (
    exceptions.RayActorError,
    exceptions.OutOfMemoryError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class WorkerInfo:
    """The process of an actor.

    Attributes:
        host: name of its machine.
        pid: its process id.
        budget: bytes of host memory that all actors on the machine may use together.
        kit: version of worldpm-kit installed there.
    """

    host: str
    pid: int
    budget: int
    kit: str


class ScoringActor:
    """Call `prepare`, then `load`, then `score` for each window. A replacement actor starts over with `prepare`."""

    def worker_info(self) -> WorkerInfo:
        """Call before `load`: `budget` depends on the free memory."""
        return WorkerInfo(socket.gethostname(), os.getpid(), find_devices("cpu").host.budget, kit_version())

    def prepare(self, source: str, options: ModelOptions) -> PlacementPlan | KitError:
        """Open the checkpoint and plan its placement on this machine."""
        try:
            self._checkpoint = open_checkpoint(source)
            self._plan = options.plan(self._checkpoint)
            return self._plan
        except KitError as error:
            return _add_host(error)

    def load(self, threads: int) -> KitError | None:
        """Load the model, to compute with `threads` CPU threads."""
        torch.set_num_threads(threads)
        try:
            self._scorer = Scorer(self._checkpoint, self._plan)
            return None
        except KitError as error:
            return _add_host(error)

    def score(self, window: list[InputRow]) -> list[OutputRecord] | KitError:
        """Score rendered rows; see `score_window`."""
        try:
            return score_window(self._scorer.score_each, window, self._scorer.checkpoint)
        except KitError as error:
            return error


def get_all_results(calls: Sequence[Any], doing: str, timeout: float | None = None) -> list[Any]:
    """Results of one call per actor, before there is any work that could be repeated.

    Raises:
        ConfigurationError: an actor died while `doing`.
        KitError: returned by an actor.
        GetTimeoutError: a result is missing after `timeout` seconds.
    """
    try:
        return [raise_if_error(result) for result in ray.get(list(calls), timeout=timeout)]
    except ACTOR_DEATH_ERRORS as error:
        raise ConfigurationError(
            f"an actor died while {doing}: {last_line(error)} Check that worldpm-kit is installed on every machine; if "
            "memory ran out, use fewer --actors."
        ) from error


def last_line(error: Exception) -> str:
    """The last line of Ray's message, without its list of common causes."""
    text = str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
    return text if text.endswith(".") else f"{text}."


def raise_if_error(result: Result | KitError) -> Result:
    """The result of an actor's call; raises it if it is an error."""
    if isinstance(result, KitError):
        raise result
    return result


def _add_host(error: KitError) -> KitError:
    """The error with the name of this machine."""
    return type(error)(f"on {socket.gethostname()}: {error}")
