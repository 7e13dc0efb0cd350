"""Score windows with several actors of a Ray cluster. Idle actors take the next window; records keep the input order.

An actor that dies is replaced and its window is scored again. The output and its resume record are the same as with
the local engine.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray
import torch
from ray import exceptions
from rich.console import Console

from runtime.batch.engine import InputWindow, ScoredWindow
from runtime.batch.options import ScoreOptions
from runtime.batch.ray_actor import (
    ACTOR_DEATH_ERRORS,
    ScoringActor,
    WorkerInfo,
    get_all_results,
    last_line,
    raise_if_error,
)
from runtime.batch.ray_cluster import actor_device_names, actor_resources, gpus_per_actor, ray_cluster
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.common.errors import ConfigurationError, JobError, KitError
from runtime.common.version import kit_version
from runtime.execution.devices import parse_memory
from runtime.execution.placement_plan import PlacementPlan
from runtime.execution.placement_table import print_placement
from runtime.execution.prefetcher import Prefetcher
from runtime.options import ModelOptions

MAX_ATTEMPTS = 3  # per window, because its rows may be what kills the actors
START_SECONDS = 180  # time limit for an actor to start; it imports torch, possibly from a shared disk
WINDOWS_PER_ACTOR = 2  # windows rendered ahead, so that an actor does not wait for the next one


@dataclass
class Actor:
    """An actor; when it dies, its replacement gets the same options.

    Attributes:
        handle: of the Ray actor that runs `ScoringActor`.
        options: placement on its machine.
        worker_info: its process.
    """

    handle: Any
    options: ModelOptions
    worker_info: WorkerInfo


class RayEngine:
    """An `Engine` with one Scorer per actor."""

    def __init__(self, checkpoint: Checkpoint, options: ScoreOptions, console: Console):
        """Connect to the cluster, start the actors, and plan the placement of the model in each.

        Raises:
            ConfigurationError: the cluster does not answer or lacks resources, an actor does not start, or the model
                does not fit.
            CheckpointError: an actor cannot open the checkpoint.
        """
        self.renderer = checkpoint.renderer()
        self._console = console
        self._source = _resolve_source(options.model or "demo")
        self._closed = False
        self._threads_before = torch.get_num_threads()
        self._stack = ExitStack()
        try:
            cpus = max(self._threads_before, options.actors or 1, torch.cuda.device_count())
            machines = self._stack.enter_context(ray_cluster(cpus))
            cluster_has_gpus = any(machine.get("GPU", 0) >= 1 for machine in machines)
            gpus = gpus_per_actor(options.model_options.devices, cluster_has_gpus)
            count, self._resources = actor_resources(machines, options.actors, gpus)
            if not gpus:
                torch.set_num_threads(int(self._resources["CPU"]))
            self._actors = self._start_actors(count, options.model_options)
            self.plan = self._prepare_actors()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self._kill_actors()
        self._stack.close()
        torch.set_num_threads(self._threads_before)

    def print_plan(self, console: Console) -> None:
        machines = len({actor.worker_info.host for actor in self._actors})
        console.print(
            f"{len(self._actors)} actors ({self._resource_text()} each) on {machines} machine{'s' * (machines > 1)}; "
            "each one:"
        )
        print_placement(self.plan, self.renderer.rule, console)

    def load(self) -> None:
        self._stack.enter_context(redirect_stdout(sys.stderr))  # Ray reports dead actors on standard output
        self._threads = torch.get_num_threads()
        get_all_results([actor.handle.load.remote(self._threads) for actor in self._actors], "loading the model")

    def score_windows(self, windows: Iterable[InputWindow]) -> Generator[ScoredWindow, None, None]:
        count = len(self._actors)
        self._idle: SimpleQueue[Actor] = SimpleQueue()
        for actor in self._actors:
            self._idle.put(actor)
        try:
            with Prefetcher(
                self._score, _with_final_error(windows), depth=WINDOWS_PER_ACTOR * count, threads=count
            ) as results:
                try:
                    yield from results
                except BaseException:
                    self._kill_actors()  # ends the calls that the prefetcher's threads wait for
                    raise
        finally:
            self._kill_actors()

    def _start_actors(self, count: int, options: ModelOptions) -> list[Actor]:
        """Start actors, and divide the memory of each machine equally among its actors."""
        handles = [self._spawn() for _ in range(count)]
        try:
            workers = get_all_results([handle.worker_info.remote() for handle in handles], "starting", START_SECONDS)
        except exceptions.GetTimeoutError as error:
            raise ConfigurationError(
                f"{count} actors ({self._resource_text()} each) were requested from the Ray cluster, but not all "
                f"started within {START_SECONDS} seconds; if other jobs use the cluster (see `ray status`), wait for "
                "them or use fewer --actors."
            ) from error
        for worker in workers:
            if worker.kit != kit_version():
                raise ConfigurationError(
                    f"worldpm-kit is version {worker.kit} on {worker.host} but {kit_version()} here; install the same "
                    "version."
                )
        actors_per_host = Counter(worker.host for worker in workers)
        names = actor_device_names(options.devices)
        devices = ",".join(names.values()) or options.devices
        limits = {names.get(name, name): nbytes for name, nbytes in parse_memory(options.memory).items()}
        actors = []
        for handle, worker in zip(handles, workers, strict=True):
            memory = {"cpu": worker.budget // actors_per_host[worker.host]} | limits
            actors.append(Actor(handle, replace(options, devices=devices, memory=memory), worker))
        return actors

    def _prepare_actors(self) -> PlacementPlan:
        """Plan in every actor, with the token budget that the first one chose, and return the first plan."""
        plan: PlacementPlan = get_all_results([self._prepare(self._actors[0])], "planning")[0]
        for actor in self._actors:
            actor.options = replace(actor.options, token_budget=plan.token_budget)
        get_all_results([self._prepare(actor) for actor in self._actors[1:]], "planning")
        return plan

    def _resource_text(self) -> str:
        """Resources of each actor: ``1 CPU``."""
        return ", ".join(f"{count:g} {name}" for name, count in self._resources.items())

    def _spawn(self) -> Any:
        resources = {"num_cpus": self._resources["CPU"], "num_gpus": self._resources.get("GPU", 0)}
        return ray.remote(ScoringActor).options(**resources).remote()

    def _prepare(self, actor: Actor) -> Any:
        return actor.handle.prepare.remote(self._source, actor.options)

    def _score(self, window: InputWindow | KitError) -> ScoredWindow:
        """Score a window with an idle actor. Called in as many threads as there are actors."""
        if isinstance(window, KitError):
            raise window
        rows, digest = window
        actor = self._idle.get()
        try:
            for _ in range(MAX_ATTEMPTS):
                try:
                    return raise_if_error(ray.get(actor.handle.score.remote(rows))), digest
                except ACTOR_DEATH_ERRORS as error:
                    if self._closed:
                        raise
                    last = last_line(error)
                    self._replace(actor)
        finally:
            self._idle.put(actor)
        raise JobError(
            f"{rows[0].where} to {rows[-1].where}: {MAX_ATTEMPTS} actors died while scoring these rows; the last error "
            f"is: {last} If memory ran out, use fewer --actors or a smaller --token-budget."
        )

    def _replace(self, actor: Actor) -> None:
        """Start, prepare and load a new actor in place of a dead one."""
        dead_worker = actor.worker_info
        self._console.print(
            f"the actor with pid {dead_worker.pid} on {dead_worker.host} died; a new one scores its rows again"
        )
        ray.kill(actor.handle)  # it may only have been unreachable
        actor.handle = self._spawn()
        try:
            actor.worker_info = ray.get(actor.handle.worker_info.remote(), timeout=START_SECONDS)
            raise_if_error(ray.get(self._prepare(actor)))
            raise_if_error(ray.get(actor.handle.load.remote(self._threads)))
        except exceptions.GetTimeoutError as error:
            raise JobError(
                f"no new actor ({self._resource_text()}) started within {START_SECONDS} seconds after the one with pid "
                f"{dead_worker.pid} on {dead_worker.host} died; see `ray status` for what uses its resources, or "
                "resume with fewer --actors."
            ) from error
        except ACTOR_DEATH_ERRORS:
            pass  # its next call to score fails and counts as an attempt

    def _kill_actors(self) -> None:
        self._closed = True
        for actor in getattr(self, "_actors", []):
            if ray.is_initialized():
                ray.kill(actor.handle)


def _resolve_source(model: str) -> str:
    """The model for an actor, whose working directory differs: paths are made absolute."""
    return str(Path(model).resolve()) if model != "demo" and Path(model).is_dir() else model


def _with_final_error(windows: Iterable[InputWindow]) -> Iterator[InputWindow | KitError]:
    """Yield the error that ends `windows` as a last item, so that it is raised after the records before it."""
    try:
        yield from windows
    except KitError as error:
        yield error
