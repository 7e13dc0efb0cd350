"""Scoring on a Ray cluster: the bytes of one process, whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime.batch.output_file import OutputFile, StandardOutput
from runtime.batch.output_state import OutputState
from runtime.common.errors import ConfigurationError
from runtime.score import main
from tests.helpers.damage import change_tensors
from tests.helpers.processes import start_process
from tests.helpers.row_examples import RECOGNISED
from tests.helpers.tiny_score import mixed_rows, read_jsonl, score, write_jsonl

if find_spec("ray") is None:
    pytest.skip("needs the ray extra", allow_module_level=True)

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

import ray

from runtime.batch import ray_engine
from runtime.batch.ray_cluster import actor_device_names, actor_resources, count_actor_slots, ray_cluster

ROOT = Path(__file__).resolve().parents[2]
TWO = ("--engine", "ray", "--actors", "2")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """One for all tests, as starting it takes seconds; with a CPU for each actor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init("local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("ray") / "rows.jsonl", [*mixed_rows(60), "{broken"])


@pytest.fixture(scope="module")
def local(tiny_checkpoint, rows) -> dict[str, bytes]:
    """What one process writes."""
    for suffix in ("jsonl", "csv", "parquet"):
        assert score(tiny_checkpoint, rows, "--output", rows.with_name(f"local.{suffix}")) == 0
    return {suffix: rows.with_name(f"local.{suffix}").read_bytes() for suffix in ("jsonl", "csv", "parquet")}


def kill_an_actor() -> int:
    """Kill the process of one actor and return its pid. Ray sets the title of these processes to the actor's class."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ScoringActor"):
                process.kill()
                return process.pid
    raise AssertionError("no actor is running")


def kill_on_write(monkeypatch, call: int, output: type = OutputFile) -> list[int]:
    """Kill an actor as the `call`-th window is written; the pids that were killed."""
    killed: list[int] = []
    before_write(monkeypatch, call, lambda: killed.append(kill_an_actor()), output)
    return killed


def before_write(monkeypatch, call: int, act: Callable[[], None], output: type = OutputFile) -> None:
    """Do something as the `call`-th window is about to be written."""
    real, calls = output.write, itertools.count(1)

    def write(self, *window):
        if next(calls) == call:
            act()
        return real(self, *window)

    monkeypatch.setattr(output, "write", write)


def interrupt() -> None:
    raise KeyboardInterrupt


@slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_two_actors_write_the_bytes_of_one_process(cluster, tiny_checkpoint, rows, local, tmp_path, capfd, suffix):
    output = tmp_path / f"out.{suffix}"
    assert score(tiny_checkpoint, rows, "--output", output, *TWO) == 0
    assert output.read_bytes() == local[suffix]
    assert [each.name for each in tmp_path.iterdir()] == [output.name]
    said = capfd.readouterr().err
    assert "2 actors (1 CPU each) on 1 machine; each one:" in said and "resident: all blocks on cpu" in said
    assert f"out.{suffix}: 61 rows, 51 scored, 10 with errors" in said and "rows.jsonl:4: the last turn is" in said


@slow
def test_rows_of_every_format_in_several_files_are_read_as_by_one_process(cluster, tiny_checkpoint, tmp_path, capfd):
    source = tmp_path / "rows"
    source.mkdir()
    rows = [row for _, row, *_ in RECOGNISED]
    write_jsonl(source / "a.jsonl", rows[::2])
    write_jsonl(source / "b.jsonl", rows[1::2])
    said = []
    for name, more in (("one.jsonl", ()), ("two.jsonl", TWO)):
        assert score(tiny_checkpoint, source, "--output", tmp_path / name, *more) == 0
        lines = capfd.readouterr().err.splitlines()
        said.append([line for line in lines if "the format is" in line])
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert said[0] == said[1] and {line[:2] for line in said[0]} == {"a.", "b."}


@slow
@pytest.mark.parametrize("call", [1, 6])
def test_an_actor_that_is_killed_loses_and_doubles_nothing(
    cluster, tiny_checkpoint, rows, local, tmp_path, monkeypatch, capfd, call
):
    output = tmp_path / "out.jsonl"
    killed = kill_on_write(monkeypatch, call)
    assert score(tiny_checkpoint, rows, "--output", output, *TWO) == 0
    assert output.read_bytes() == local["jsonl"]
    out, err = capfd.readouterr()
    assert f"the actor with pid {killed[0]} on " in err and "died; a new one scores its rows again" in err
    assert out == ""


@slow
def test_standard_output_has_rows_alone_whatever_dies(cluster, tiny_checkpoint, rows, local, monkeypatch, capfdbinary):
    kill_on_write(monkeypatch, 3, StandardOutput)
    assert score(tiny_checkpoint, rows, *TWO) == 0
    assert capfdbinary.readouterr().out == local["jsonl"]


@slow
@pytest.mark.parametrize("engine", [(), TWO])
def test_a_stopped_run_is_resumed_here_or_there(
    cluster, tiny_checkpoint, rows, local, tmp_path, monkeypatch, capfd, engine
):
    """The recipe says nothing of the engine: either goes on with what the other began."""
    output = tmp_path / "out.csv"
    with monkeypatch.context() as patch:
        before_write(patch, 5, interrupt)
        assert score(tiny_checkpoint, rows, "--output", output, *TWO) == 130
    done = OutputState.load(output).rows
    assert 0 < done < 61
    assert f"stopped; {done} rows are in {output}" in capfd.readouterr().err
    assert score(tiny_checkpoint, rows, "--output", output, "--resume", *engine) == 0
    assert output.read_bytes() == local["csv"]


@slow
def test_a_window_that_kills_every_actor_ends_the_run(cluster, tiny_checkpoint, rows, tmp_path, monkeypatch, capfd):
    class Dying(ray_engine.ScoringActor):
        def score(self, window):
            if any(row.where.endswith(":30") for row in window):
                os._exit(1)
            return super().score(window)

    monkeypatch.setattr(ray_engine, "ScoringActor", Dying)
    output = tmp_path / "out.jsonl"
    assert score(tiny_checkpoint, rows, "--output", output, *TWO) == 2
    said = capfd.readouterr().err
    assert ": 3 actors died while scoring these rows; the last error is: " in said
    assert "--resume continues after them" in said
    assert 0 < len(read_jsonl(output)) < 30


@slow
def test_an_actor_that_dies_before_there_is_work_ends_the_run(
    cluster, tiny_checkpoint, rows, tmp_path, monkeypatch, capfd
):
    class Dying(ray_engine.ScoringActor):
        def load(self, threads):
            os._exit(1)

    monkeypatch.setattr(ray_engine, "ScoringActor", Dying)
    assert score(tiny_checkpoint, rows, "--output", tmp_path / "out.jsonl", *TWO) == 2
    said = capfd.readouterr().err
    assert "error: an actor died while loading the model: " in said and "fewer --actors." in said
    assert list(tmp_path.iterdir()) == []


@slow
def test_actors_that_a_busy_cluster_does_not_start_end_the_run(
    cluster, tiny_checkpoint, rows, tmp_path, monkeypatch, capfd
):
    class Job:
        def runs(self) -> bool:
            return True

    job = ray.remote(Job).options(num_cpus=2).remote()
    assert ray.get(job.runs.remote())
    monkeypatch.setattr(ray_engine, "START_SECONDS", 1)
    try:
        assert score(tiny_checkpoint, rows, "--output", tmp_path / "out.jsonl", *TWO) == 2
    finally:
        ray.kill(job)
    said = capfd.readouterr().err
    assert "2 actors (1 CPU each) were requested from the Ray cluster, but not all started within 1 seconds" in said
    assert list(tmp_path.iterdir()) == []


@slow
def test_a_replacement_that_does_not_start_ends_the_run(
    cluster, tiny_checkpoint, rows, local, tmp_path, monkeypatch, capfd
):
    output = tmp_path / "out.jsonl"

    class Slow(ray_engine.ScoringActor):
        def __init__(self):
            time.sleep(60)

    def kill():
        monkeypatch.setattr(ray_engine, "START_SECONDS", 1)
        monkeypatch.setattr(ray_engine, "ScoringActor", Slow)
        kill_an_actor()

    before_write(monkeypatch, 3, kill)
    assert score(tiny_checkpoint, rows, "--output", output, *TWO) == 2
    said = capfd.readouterr().err
    assert "error: no new actor (1 CPU) started within 1 seconds after the one with pid" in said
    assert "--resume continues after them" in said
    assert score(tiny_checkpoint, rows, "--output", output, "--resume") == 0
    assert output.read_bytes() == local["jsonl"]


@slow
def test_a_strict_run_writes_what_comes_before_the_fault(cluster, tiny_checkpoint, rows, local, tmp_path, capfd):
    broken = write_jsonl(tmp_path / "rows.jsonl", [*mixed_rows(3), "{broken", *mixed_rows(9)])
    outputs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for output, engine in zip(outputs, ((), TWO), strict=True):
        assert score(tiny_checkpoint, broken, "--strict", "--output", output, *engine) == 2
        assert "error: rows.jsonl:4:" in capfd.readouterr().err
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@slow
def test_faults_of_actors_are_told_as_here(cluster, tiny_checkpoint, damaged, rows, tmp_path, capfd):
    assert main([str(rows), "--model", str(tiny_checkpoint), "--memory", "cpu=1KiB", *TWO]) == 2
    assert "cpu: 1,024 bytes may be used, but one block with" in capfd.readouterr().err
    assert main([str(rows), "--model", str(tiny_checkpoint), "--devices", "cuda:0", *TWO]) == 2
    assert "2 actors need 1 GPU and a CPU each, but the Ray cluster has room for 0" in capfd.readouterr().err
    assert main([str(rows), "--model", str(tiny_checkpoint), "--engine", "ray", "--actors", "3"]) == 2
    assert "3 actors need a CPU each, but the Ray cluster has room for 2; choose fewer" in capfd.readouterr().err

    def break_block(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")

    change_tensors(damaged, break_block)
    assert score(damaged, rows, "--output", tmp_path / "out.jsonl", *TWO) == 2
    assert "model.layers.1.mlp.down_proj.weight holds a NaN or an infinity" in capfd.readouterr().err
    assert list(tmp_path.glob("out*")) == []


@slow
def test_the_command_starts_a_cluster_of_its_own_and_ends_it(tiny_checkpoint, rows, local, tmp_path):
    """In a process: on 127.0.0.1 alone, silent to Ray's makers, and stopped by a signal as any run is."""
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "runtime.score", rows, "--model", tiny_checkpoint, "--devices", "cpu", *TWO]
    command += ["--dtype", "float32", "--token-budget", "16", "--output", output]
    with tempfile.TemporaryDirectory(prefix="ray") as place:  # names of sockets must be short
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": place}
        process = start_process(command, cwd=ROOT, stderr=subprocess.PIPE, env=environment)
        while process.poll() is None and (OutputState.load(output) is None or not OutputState.load(output).rows):
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        places = {place.laddr.ip.removeprefix("::ffff:") for place in listening(psutil.Process(process.pid))}
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
        assert places == {"127.0.0.1"}
        assert list(Path(place).glob("ray/session_2*/logs/gcs_server.out"))
        assert not list(Path(place).glob("**/usage_stats.json"))
        assert process.returncode == 130, said
        assert "rows are in" in said.splitlines()[-1] and "Traceback" not in said
        assert subprocess.run([*command, "--resume"], cwd=ROOT, env=environment).returncode == 0
    assert output.read_bytes() == local["jsonl"]


def listening(process: psutil.Process) -> list[Any]:
    """Sockets that a process or a child of it waits at."""
    found = []
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found += [socket for socket in each.net_connections("inet") if socket.status == psutil.CONN_LISTEN]
    return found


# ---- how many, and with what ----------------------------------------------------------------------------

SMALL, LARGE = {"CPU": 4.0, "memory": 1.0}, {"CPU": 16.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("machines", "actors", "gpus", "expected"),
    [
        ([SMALL], None, 0, (1, {"CPU": 4})),
        ([SMALL], 2, 0, (2, {"CPU": 2})),
        ([SMALL], 3, 0, (3, {"CPU": 1})),
        ([SMALL, LARGE], None, 0, (2, {"CPU": 8})),
        ([SMALL, LARGE], 4, 0, (4, {"CPU": 4})),
        ([SMALL, LARGE, LARGE], None, 1, (4, {"GPU": 1, "CPU": 1})),
        ([SMALL, LARGE, LARGE], None, 2, (2, {"GPU": 2, "CPU": 1})),
        ([LARGE], 1, 1, (1, {"GPU": 1, "CPU": 1})),
    ],
)
def test_actors_get_what_all_can_have_alike(machines, actors, gpus, expected):
    count, need = actor_resources(machines, actors, gpus)
    assert (count, need) == expected
    assert count_actor_slots(machines, need) >= count


@pytest.mark.parametrize(
    ("devices", "inside"),
    [
        ("cuda:2,cuda:3", {"cuda:2": "cuda:0", "cuda:3": "cuda:1"}),
        ("cuda", {"cuda:0": "cuda:0"}),
        ("auto", {}),
        ("cpu", {}),
    ],
)
def test_actors_count_their_gpus_from_0(devices, inside):
    assert actor_device_names(devices) == inside


@pytest.mark.parametrize(
    ("machines", "actors", "gpus", "message"),
    [
        ([SMALL], 5, 0, "5 actors need a CPU each, but the Ray cluster has room for 4; choose fewer --actors."),
        ([LARGE], 3, 1, "3 actors need 1 GPU and a CPU each, but the Ray cluster has room for 2"),
        ([LARGE], None, 4, "1 actors need 4 GPUs and a CPU each, but the Ray cluster has room for 0"),
        ([], None, 0, "1 actors need a CPU each, but the Ray cluster has room for 0"),
    ],
)
def test_no_room(machines, actors, gpus, message):
    with pytest.raises(ConfigurationError, match=message):
        actor_resources(machines, actors, gpus)


def test_a_cluster_that_does_not_answer(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    message = "RAY_ADDRESS is 10.0.0.1:6379: Failed to connect .*; check that the cluster is up"
    with pytest.raises(ConfigurationError, match=message), ray_cluster(2):
        pass


def test_the_output_says_nothing_of_the_engine(tiny_checkpoint, rows, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(OutputFile, "finish", lambda self: None)
    assert score(tiny_checkpoint, rows, "--output", output) == 0
    assert "ray" not in json.dumps(OutputState.load(output).recipe)
