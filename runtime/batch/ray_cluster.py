"""Connect to the Ray cluster at RAY_ADDRESS, or start one on this machine for one run; divide it among actors."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray

from runtime.common.errors import ConfigurationError
from runtime.execution.devices import DeviceNames

Resources = dict[str, float]

OBJECT_STORE_BYTES = 128 << 20  # holds windows in transit, a few MB each


@contextmanager
def ray_cluster(cpus: int) -> Iterator[list[Resources]]:
    """Yield the resources of each machine in the cluster.

    Args:
        cpus: CPUs of a cluster that is started here. A connection that already exists is used and kept open.

    Raises:
        ConfigurationError: no cluster answers at RAY_ADDRESS.
    """
    already_connected = ray.is_initialized()
    if not already_connected:
        _connect(cpus)
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if not already_connected:
            ray.shutdown()


def count_actor_slots(machines: Sequence[Mapping[str, float]], need: Mapping[str, float]) -> int:
    """Number of actors with the resources `need` that fit on the machines."""
    return sum(min(int(machine.get(name, 0) // count) for name, count in need.items()) for machine in machines)


def actor_resources(machines: Sequence[Mapping[str, float]], actors: int | None, gpus: int) -> tuple[int, Resources]:
    """Number of actors, and the resources of each.

    Args:
        actors: requested number; None for as many as the GPUs allow, or one per machine that has a CPU.
        gpus: GPUs per actor. If 0, each actor gets as many CPUs as possible, the same number for all.

    Raises:
        ConfigurationError: the cluster has too few resources.
    """
    if gpus:
        need: Resources = {"GPU": gpus, "CPU": 1}
        room = count_actor_slots(machines, need)
        wanted = actors or max(room, 1)
    else:
        wanted = actors or sum(machine.get("CPU", 0) >= 1 for machine in machines) or 1
        most = int(max((machine.get("CPU", 0) for machine in machines), default=0))
        need = {
            "CPU": next(
                (each for each in range(most, 1, -1) if count_actor_slots(machines, {"CPU": each}) >= wanted), 1
            )
        }
        room = count_actor_slots(machines, need)
    if wanted > room:
        what = f"{gpus} GPU{'s' * (gpus > 1)} and a CPU" if gpus else "a CPU"
        raise ConfigurationError(
            f"{wanted} actors need {what} each, but the Ray cluster has room for {room}; choose fewer --actors."
        )
    return wanted, need


def gpus_per_actor(devices: DeviceNames, cluster_has_gpus: bool) -> int:
    """GPUs that each actor needs: those named in `--devices`, or with `auto` one if the cluster has any."""
    return int(cluster_has_gpus) if devices == "auto" else len(_gpu_names(devices))


def actor_device_names(devices: DeviceNames) -> dict[str, str]:
    """Map the GPUs of `--devices` to their names in an actor, where Ray shows only its own GPUs, numbered from 0."""
    names = _gpu_names(devices)
    return {"cuda:0" if name == "cuda" else name: f"cuda:{index}" for index, name in enumerate(names)}


def _gpu_names(devices: DeviceNames) -> list[str]:
    names = devices.split(",") if isinstance(devices, str) else list(devices)
    return names if names[0].startswith("cuda") else []


def _connect(cpus: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS")
    local_options = {"num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        # Without "local", Ray would connect to any cluster that it finds running on this machine.
        ray.init(address or "local", log_to_driver=False, logging_level="error", **({} if address else local_options))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().rstrip(".")
        remedy = (
            "check that the cluster is up and that its token is available here, or unset RAY_ADDRESS to start a "
            "cluster on this machine"
        )
        raise ConfigurationError(
            f"RAY_ADDRESS is {address}: {reason}; {remedy}." if address else f"Ray: {reason}."
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray installs its own handler
