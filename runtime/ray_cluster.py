"""The Ray cluster: joined where RAY_ADDRESS names one, else started on this machine for the length of a run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray

from runtime.errors import PlanError

Resources = dict[str, float]

OBJECT_STORE_BYTES = 128 << 20  # holds windows of rows on their way, a few megabytes each


@contextmanager
def ray_cluster(cpus: int) -> Iterator[list[Resources]]:
    """Yield what each machine has, of a cluster that is joined or, with `cpus` CPUs, started.

    Raises:
        PlanError: nothing answers at RAY_ADDRESS.
    """
    joined = ray.is_initialized()
    if not joined:
        _connect(cpus)
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if not joined:
            ray.shutdown()


def slots(machines: Sequence[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """How many actors that need so much fit on the machines together."""
    return sum(min(int(machine.get(name, 0) // count) for name, count in need.items()) for machine in machines)


def actor_resources(machines: Sequence[Mapping[str, float]], actors: int | None, gpus: int) -> tuple[int, Resources]:
    """How many actors there will be, and what each one has: `gpus` GPUs, or else as many CPUs as all can have alike.

    Args:
        actors: how many are wanted; without it as many as there are GPUs for, or one a machine.
        gpus: that each one needs; 0 to compute on CPUs.

    Raises:
        PlanError: there is no room for them.
    """
    if gpus:
        need: Resources = {"GPU": gpus, "CPU": 1}
        room = slots(machines, need)
        wanted = actors or max(room, 1)
    else:
        wanted = actors or sum(machine.get("CPU", 0) >= 1 for machine in machines) or 1
        most = int(max((machine.get("CPU", 0) for machine in machines), default=0))
        need = {"CPU": next((each for each in range(most, 1, -1) if slots(machines, {"CPU": each}) >= wanted), 1)}
        room = slots(machines, need)
    if wanted > room:
        what = f"{gpus} GPU{'s' * (gpus > 1)} and a CPU" if gpus else "a CPU"
        raise PlanError(
            f"{wanted} actors need {what} each, but the Ray cluster has room for {room}; choose fewer --actors."
        )
    return wanted, need


def _connect(cpus: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    own = {"num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        # "local" where none is named: otherwise Ray would join whatever it finds running on this machine.
        ray.init(address or "local", log_to_driver=False, logging_level="error", **({} if address else own))
    except (OSError, ValueError, RuntimeError) as error:
        fault = str(error).strip().rstrip(".")
        remedy = "see that it is up and that its token is here too, or unset RAY_ADDRESS to start one on this machine"
        raise PlanError(f"RAY_ADDRESS is {address}: {fault}; {remedy}." if address else f"Ray: {fault}.") from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray puts a handler of its own there
