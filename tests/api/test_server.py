"""The server over a real socket: slow clients, clients that disconnect, chunked bodies, shutdown, and `app.py`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from runtime.api import server as server_module
from runtime.api.options import Limits
from runtime.api.server import listen
from runtime.common.errors import ConfigurationError
from tests.helpers.processes import start_process
from tests.helpers.served import QUESTION, RESPONSES, api_of, conversation, gate, listening, send, serve

pytestmark = pytest.mark.slow  # most tests start server processes

GOOD = {"conversations": [conversation(RESPONSES[0])]}
ROOT = Path(__file__).resolve().parents[2]


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition stayed false"
        time.sleep(0.01)


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(20)
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


HEAD = b"POST /v1/scores HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_bodies_beyond_the_limit_are_413_with_and_without_a_length(service):
    def pieces() -> Iterator[bytes]:
        for _ in range(400):
            yield b" " * 50_000

    with listening(api_of(service, Limits(body_bytes=100_000))) as (url, _), httpx.Client(base_url=url) as client:
        json_type = {"content-type": "application/json"}
        chunked = client.post("/v1/scores", content=pieces(), headers=json_type)
        whole = client.post("/v1/scores", content=b" " * 20_000_000, headers=json_type)
        assert (chunked.status_code, whole.status_code) == (413, 413)
        assert "100,000 bytes" in chunked.json()["error"]["message"]
        with socket.create_connection(address(url)) as polite:
            polite.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 20000000\r\n\r\n")
            assert read_all(polite).startswith(b"HTTP/1.1 413")
        assert client.post("/v1/scores", json=GOOD).status_code == 200


def test_a_slow_client_is_disconnected(service, monkeypatch):
    monkeypatch.setattr(server_module, "HEADER_TIMEOUT_SECONDS", 0.3)
    with listening(api_of(service, Limits(body_seconds=0.3))) as (url, _):
        with socket.create_connection(address(url)) as body, socket.create_connection(address(url)) as head:
            body.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            head.sendall(HEAD[:20])
            answer = read_all(body)
            assert answer.startswith(b"HTTP/1.1 408") and b"it took longer than 0.3 s" in answer
            assert read_all(head) == b""
        assert httpx.post(f"{url}/v1/scores", json=GOOD).status_code == 200


def test_a_client_that_disconnects_leaves_the_queue(tiny_checkpoint):
    service = serve(tiny_checkpoint, queue_tokens=100)
    gated = gate(service)
    body = json.dumps({"conversations": [conversation("a" * 70)]}).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    with listening(api_of(service)) as (url, _), httpx.Client(base_url=url) as client:
        occupying = threading.Thread(target=client.post, args=("/v1/scores",), kwargs={"json": GOOD})
        occupying.start()
        assert gated.entered.wait(20)
        leaving = socket.create_connection(address(url))
        leaving.sendall(request)
        until(lambda: service.batcher.waiting_requests == 1)
        assert client.post("/v1/scores", json={"conversations": [conversation("b" * 70)]}).status_code == 429
        leaving.close()
        until(lambda: service.batcher.waiting_requests == 0)
        gated.open.set()
        occupying.join(20)
        assert client.post("/v1/scores", json=GOOD).status_code == 200
    assert len(gated.calls) == 2  # the disconnected client's request was never scored


def test_shutdown_rejects_new_requests_and_answers_accepted_ones(tiny_checkpoint):
    service = serve(tiny_checkpoint)
    gated = gate(service)
    answers: list[httpx.Response] = []
    with listening(api_of(service)) as (url, server), httpx.Client(base_url=url) as client:
        client.get("/health")  # a connection that stays open
        accepted = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/scores", json=GOOD, timeout=30))
        )
        accepted.start()
        assert gated.entered.wait(20)
        server.should_exit = True
        until(lambda: api_of(service).state.request_tracker.stopping)
        late = client.post("/v1/scores", json=GOOD)
        assert late.status_code == 503 and late.headers["connection"] == "close"
        with pytest.raises(httpx.ConnectError):
            until(lambda: httpx.get(f"{url}/health").status_code == 0)
        gated.open.set()
        accepted.join(20)
    assert [answer.status_code for answer in answers] == [200]


def test_answers_are_sent_at_once():
    """asyncio sets TCP_NODELAY only if the socket's protocol is given; without it a response takes up to 40 ms more."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_busy_port_is_refused_by_name():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"--port {port}: cannot listen .*in use.*--port {port + 1}"):
            listen("127.0.0.1", port)


# ---- the command ----------------------------------------------------------------------------------------


class Command:
    """`python app.py` over a checkpoint, on a free port."""

    def __init__(self, checkpoint: Path, log: Path, *options: str):
        self.log = log
        with log.open("w") as stream:
            self.process = start_process(
                [sys.executable, ROOT / "app.py", "--model", checkpoint, "--port", "0", "--no-page", *options],
                stderr=stream,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        until(lambda: '"event": "ready"' in log.read_text() or self.process.poll() is not None, 60)
        found = re.search(r'"event": "serving".*"port": (\d+)', log.read_text())
        assert found, log.read_text()
        self.url = f"http://127.0.0.1:{found[1]}"

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


class Client(threading.Thread):
    """Sends requests until the connection is refused."""

    def __init__(self, url: str):
        super().__init__()
        self.url, self.statuses, self.lost = url, [], []  # type: ignore[var-annotated]

    def run(self) -> None:
        body = {"conversations": [conversation(each, QUESTION * 20) for each in RESPONSES]}
        with httpx.Client(timeout=60) as client:
            while True:
                try:
                    self.statuses.append(client.post(f"{self.url}/v1/scores", json=body).status_code)
                except httpx.ConnectError:
                    return
                except httpx.TransportError as error:
                    self.lost.append(repr(error))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_accepted_request_is_answered_before_exit(tiny_checkpoint, tmp_path, number):
    command = Command(tiny_checkpoint, tmp_path / "log")
    clients = [Client(command.url) for _ in range(16)]
    for client in clients:
        client.start()
    until(lambda: all(len(client.statuses) > 3 for client in clients))
    status = command.stop(number)
    for client in clients:
        client.join(60)
    assert status == 0, command.log.read_text()[-2000:]
    assert not [client.lost for client in clients if client.lost]
    assert {status for client in clients for status in client.statuses} <= {200, 503}
    lines = [json.loads(line) for line in command.log.read_text().splitlines() if line.startswith("{")]
    assert lines[-1]["event"] == "stopped" and not [line for line in lines if line["event"] == "error"]


def test_memory_is_flat_whatever_the_shapes(tiny_checkpoint, tmp_path):
    command = Command(tiny_checkpoint, tmp_path / "log")
    resident = []
    with httpx.Client(base_url=command.url) as client:
        for length in range(1, 500, 2):
            client.post("/v1/scores", json={"conversations": [conversation("a" * length)]})
            if length in (251, 499):
                found = re.search(r"^process_resident_memory_bytes (\S+)$", client.get("/metrics").text, re.MULTILINE)
                resident.append(float(found[1]) if found else 0)
    assert command.stop(signal.SIGTERM) == 0
    assert resident[0] > 0 and resident[1] - resident[0] < 32 << 20, [round(each / 2**20) for each in resident]


def test_a_key_file_and_a_second_signal(tiny_checkpoint, tmp_path):
    key = tmp_path / "key"
    key.write_text("correct-horse-battery\n")
    key.chmod(0o644)
    command = Command(tiny_checkpoint, tmp_path / "log", "--api-key-file", str(key), "--host", "0.0.0.0")
    assert "has mode 644, so other users can read the key" in command.log.read_text()
    assert httpx.get(f"{command.url}/v1/models").status_code == 401
    bearer = {"authorization": "Bearer correct-horse-battery"}
    assert httpx.get(f"{command.url}/v1/models", headers=bearer).status_code == 200
    assert httpx.get(f"{command.url}/health", headers={"host": "evil.example"}).status_code == 400
    assert command.stop(signal.SIGTERM) == 0


def test_a_model_that_cannot_be_loaded_is_said_on_health(damaged, tmp_path):
    (damaged / "tokenizer.json").unlink()
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = start_process(
            [sys.executable, ROOT / "app.py", "--model", damaged, "--port", "0", "--no-page"], stderr=stream
        )
    until(lambda: all(f'"event": "{event}"' in log.read_text() for event in ("failed", "serving")), 60)
    found = re.search(r'"port": (\d+)', log.read_text())
    assert found
    answer = httpx.get(f"http://127.0.0.1:{found[1]}/health")
    assert answer.status_code == 503 and "tokenizer.json is missing" in answer.json()["status"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 2


def test_the_command_refuses_what_is_unsafe_or_impossible(tiny_checkpoint):
    def refused(*options: str) -> str:
        command = [sys.executable, ROOT / "app.py", "--model", tiny_checkpoint, "--no-page", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done
        return done.stderr

    assert "the server has no key" in refused("--host", "0.0.0.0")
    with listen("127.0.0.1", 0) as taken:
        assert "Address already in use" in refused("--port", str(taken.getsockname()[1]))


def test_nothing_is_left_in_flight(service):
    """After a success, a 413 and a 422."""
    api = api_of(service, Limits(body_bytes=1000))
    for body in (GOOD, {"conversations": [conversation("a" * 2000)]}, {}):
        send(api, "/v1/scores", body)
    assert api.state.request_tracker.in_flight == 0
