"""Scorers in the processes of a Ray cluster: windows go out to whichever is idle, records come back in order.

An actor that dies is replaced, and its window scored again. A window counts only when its records are written, so
nothing is lost or doubled, and the output and how it is resumed are those of one process.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import ray
import torch
from ray import exceptions
from rich.console import Console

from runtime.chat import Renderer
from runtime.checkpoint import Checkpoint
from runtime.devices import parse_memory
from runtime.engine import Scored, Window
from runtime.errors import JobError, KitError, PlanError
from runtime.lookahead import Lookahead
from runtime.placement import Plan
from runtime.placement_table import print_placement
from runtime.ray_cluster import actor_resources, ray_cluster
from runtime.scoring_actor import ScoringActor, Whereabouts
from runtime.version import kit_version

ATTEMPTS = 3  # at a window: one that kills every actor would otherwise go round for ever
START_SECONDS = 180  # for an actor: a process that imports torch, maybe from a disk that many share
AHEAD = 2  # windows an actor, so that the next one is rendered while it computes
DEATHS = (
    exceptions.RayActorError,
    exceptions.OutOfMemoryError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
)
OPTIONS = ("devices", "memory", "stream", "dtype", "token_budget")

Outcome = TypeVar("Outcome")


@dataclass
class Actor:
    """One actor and what it was told; a replacement is told the same."""

    handle: Any
    options: Namespace
    whereabouts: Whereabouts


class RayEngine:
    """An `Engine` of several Scorers."""

    def __init__(self, checkpoint: Checkpoint, arguments: Namespace, token_budget: int | None, console: Console):
        """Connect, make the actors, and let them plan.

        Raises:
            PlanError: there is no cluster, or no room for the actors, or for the model with one; or one does not start.
            CheckpointError: an actor does not find the checkpoint.
        """
        self.renderer = Renderer.from_directory(checkpoint.directory, checkpoint.architecture.max_position_embeddings)
        self._console = console
        self._source = _source(arguments.model or "demo")
        self._closed = False
        self._threads_before = torch.get_num_threads()
        self._stack = ExitStack()
        try:
            cpus = max(self._threads_before, arguments.actors or 1, torch.cuda.device_count())
            machines = self._stack.enter_context(ray_cluster(cpus))
            gpus = _gpus(arguments.devices, any(machine.get("GPU", 0) >= 1 for machine in machines))
            count, self._resources = actor_resources(machines, arguments.actors, gpus)
            if not gpus:
                torch.set_num_threads(int(self._resources["CPU"]))
            self._token_budget = arguments.token_budget or token_budget
            self._actors = self._make(count, arguments)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self._let_go()
        self._stack.close()
        torch.set_num_threads(self._threads_before)

    def show(self, console: Console) -> None:
        machines = len({actor.whereabouts.host for actor in self._actors})
        console.print(
            f"{len(self._actors)} actors ({self._needs()} each) on {machines} machine{'s' * (machines > 1)}; each one:"
        )
        print_placement(self.plan, console)

    def load(self) -> None:
        self._stack.enter_context(redirect_stdout(sys.stderr))  # Ray tells of dead actors on standard output
        self._threads = torch.get_num_threads()
        _all([actor.handle.load.remote(self._threads) for actor in self._actors], "it loaded the model")

    def scored(self, windows: Iterable[Window]) -> Generator[Scored, None, None]:
        count = len(self._actors)
        self._idle: SimpleQueue[Actor] = SimpleQueue()
        for actor in self._actors:
            self._idle.put(actor)
        try:
            with Lookahead(self._score, _with_their_end(windows), depth=AHEAD * count, threads=count) as results:
                try:
                    yield from results
                except BaseException:
                    self._let_go()  # first, as those who wait for an actor end with it
                    raise
        finally:
            self._let_go()

    def _make(self, count: int, arguments: Namespace) -> list[Actor]:
        """Actors that have planned, each with its share of its machine's memory."""
        handles = [self._spawn() for _ in range(count)]
        try:
            places = _all([handle.whereabouts.remote() for handle in handles], "it started", START_SECONDS)
        except exceptions.GetTimeoutError as fault:
            raise PlanError(
                f"{count} actors ({self._needs()} each) were asked of the Ray cluster, but not all have started "
                f"after {START_SECONDS} seconds; if others use it (`ray status` tells), wait for them or "
                "choose fewer --actors."
            ) from fault
        for place in places:
            if place.kit != kit_version():
                raise PlanError(f"on {place.host}: worldpm-kit is {place.kit}, here {kit_version()}; install the same.")
        crowd = Counter(place.host for place in places)
        inside = _inside(arguments.devices)
        own = {name: getattr(arguments, name) for name in OPTIONS}
        own["devices"] = ",".join(inside.values()) or arguments.devices
        allowed = {inside.get(name, name): nbytes for name, nbytes in parse_memory(arguments.memory).items()}
        actors = []
        for handle, place in zip(handles, places, strict=True):
            memory = {"cpu": place.budget // crowd[place.host]} | allowed
            options = Namespace(**own | {"memory": memory})
            actors.append(Actor(handle, options, place))
        self.plan: Plan = _all([self._prepare(actors[0])], "it planned")[0]
        self._token_budget = self.plan.token_budget
        _all([self._prepare(actor) for actor in actors[1:]], "it planned")
        return actors

    def _needs(self) -> str:
        """What each actor has, in words."""
        return ", ".join(f"{count:g} {name}" for name, count in self._resources.items())

    def _spawn(self) -> Any:
        needs = {"num_cpus": self._resources["CPU"], "num_gpus": self._resources.get("GPU", 0)}
        return ray.remote(ScoringActor).options(**needs).remote()

    def _prepare(self, actor: Actor) -> Any:
        return actor.handle.prepare.remote(self._source, actor.options, self._token_budget)

    def _score(self, window: Window | KitError) -> Scored:
        """In a thread, of which there are as many as actors."""
        if isinstance(window, KitError):
            raise window
        rows, digest = window
        actor = self._idle.get()
        try:
            for _ in range(ATTEMPTS):
                try:
                    return _unless_fault(ray.get(actor.handle.score.remote(rows))), digest
                except DEATHS as death:
                    if self._closed:
                        raise
                    last = _reason(death)
                    self._replace(actor)
        finally:
            self._idle.put(actor)
        raise JobError(
            f"{rows[0].where} to {rows[-1].where}: {ATTEMPTS} actors died while they scored these rows, the last one "
            f"of: {last} If memory ran out, take fewer --actors or a smaller --token-budget."
        )

    def _replace(self, actor: Actor) -> None:
        was = actor.whereabouts
        self._console.print(f"the actor with pid {was.pid} on {was.host} died; a new one scores its rows again")
        ray.kill(actor.handle)  # in case it was only out of reach
        actor.handle = self._spawn()
        try:
            actor.whereabouts = ray.get(actor.handle.whereabouts.remote(), timeout=START_SECONDS)
            _unless_fault(ray.get(self._prepare(actor)))
            _unless_fault(ray.get(actor.handle.load.remote(self._threads)))
        except exceptions.GetTimeoutError as fault:
            raise JobError(
                f"no new actor ({self._needs()}) started within {START_SECONDS} seconds after the one with pid "
                f"{was.pid} on {was.host} died; see with `ray status` what has taken its place, or "
                "go on with fewer --actors."
            ) from fault
        except DEATHS:
            pass  # it counts as an attempt when it is asked to score

    def _let_go(self) -> None:
        self._closed = True
        for actor in getattr(self, "_actors", []):
            if ray.is_initialized():
                ray.kill(actor.handle)


def _source(model: str) -> str:
    """What an actor opens: a path as it is from anywhere."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _gpus(devices: str, there_are_any: bool) -> int:
    """GPUs that one actor needs."""
    if devices == "auto":
        return int(there_are_any)
    return len(devices.split(",")) if devices.startswith("cuda") else 0


def _inside(devices: str) -> dict[str, str]:
    """The names by which an actor knows its GPUs: Ray hides the others from it and counts from 0."""
    names = devices.split(",") if devices.startswith("cuda") else []
    return {"cuda:0" if name == "cuda" else name: f"cuda:{index}" for index, name in enumerate(names)}


def _with_their_end(windows: Iterable[Window]) -> Iterator[Window | KitError]:
    """What ends them as one more, so that it is raised after the records of those before it."""
    try:
        yield from windows
    except KitError as fault:
        yield fault


def _all(calls: Sequence[Any], doing: str, timeout: float | None = None) -> list[Any]:
    """What all actors answer, before there is any work to repeat.

    Raises:
        PlanError: one died while `doing`.
        KitError: one answers with it.
        GetTimeoutError: not all have answered after `timeout` seconds.
    """
    try:
        return [_unless_fault(outcome) for outcome in ray.get(list(calls), timeout=timeout)]
    except DEATHS as death:
        raise PlanError(
            f"an actor died while {doing}: {_reason(death)} Every machine must have the kit; if memory ran out, take "
            "fewer --actors."
        ) from death


def _reason(death: Exception) -> str:
    """The last line of what Ray says, without its advice."""
    text = str(death).strip().splitlines()[-1].partition(" Some common causes")[0]
    return text if text.endswith(".") else f"{text}."


def _unless_fault(outcome: Outcome | KitError) -> Outcome:
    if isinstance(outcome, KitError):
        raise outcome
    return outcome
