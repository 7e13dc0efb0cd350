"""Load a server for half an hour with valid requests, mistakes and attacks, and look at what it gives and takes.

    python benchmarks/soak.py --json result.json                         30 minutes, 64 clients, the demo
    python benchmarks/soak.py --model tiny --minutes 3                   a random model of two layers

It starts `app.py --no-page` on a free port. Each client draws requests for every endpoint (`soak_requests.py`) and a
way to send each: whole, byte by byte, with a slow reader, or with a connection that breaks off. Every score is compared
with one that was computed here before. The run has two halves; before, between and after them no client is connected,
and the server's memory, threads and file descriptors are read. Exit status 1 if a status is not the expected one, a
score differs, a request has no answer, the server logs an error, or it holds more after the second half than before it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import struct
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.serving import get, percentile, started  # noqa: E402
from benchmarks.soak_requests import NO_HTTP, Request, ValidRequests, draw_conversations, other_requests  # noqa: E402
from runtime.demo.variant import DEMO_VARIANT_DIRECTORY  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402
from tests.helpers.tiny import write_tiny_checkpoint  # noqa: E402

VALID_SHARE = 0.75
WAYS = {"whole": 88, "pieces": 3, "slow reader": 3, "broken request": 3, "broken answer": 3}  # weights
BODY_SECONDS = 10  # the server's limit to receive a body; the slowest client takes half of it
ANSWER_SECONDS = 300  # without an answer for so long a request is lost
CLOSED = "closed"  # in place of a status
BROKEN = "broken off"
EXAMPLES = 20
GROWTH_MIB, GROWTH_SHARE = 16, 0.03  # of memory over the second half
MORE_FILES, MORE_THREADS = 4, 40  # starlette keeps up to 40 threads for a while


def main() -> int:
    arguments = parse()
    with tempfile.TemporaryDirectory() as work, open(Path(work) / "log", "w+") as log:
        model = arguments.model
        if model == "tiny":
            model = str(write_tiny_checkpoint(Path(work) / "tiny"))
        result = soak(arguments, model, log)
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 1 if result["complaints"] else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_VARIANT_DIRECTORY), help="or `tiny` (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=30, help="default %(default)g")
    parser.add_argument("--clients", type=int, default=64, help="default %(default)s")
    parser.add_argument("--conversations", type=int, default=200, help="with known scores (default %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a score (default %(default)g)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def soak(arguments: argparse.Namespace, model: str, log: IO[str]) -> dict[str, Any]:
    conversations = draw_conversations(arguments.conversations, arguments.seed)
    scores = Scorer.from_pretrained(model).score(conversations).tolist()
    tally, holdings = Tally(arguments.tolerance), {}
    with started(model, log, "--body-seconds", str(BODY_SECONDS)) as (url, process):
        (card,) = json.loads(get(f"{url}/v1/models"))["data"]
        others = list(other_requests(conversations[0], card["max_model_len"]))
        clients = [
            Client(url, ValidRequests(conversations, scores, card["id"], seed), others, tally, seed)
            for seed in range(arguments.clients)
        ]
        half = 30 * arguments.minutes
        for name, seconds in (("start", 0.0), ("middle", half), ("end", half)):
            # Before the start each client sends a few requests, so that pools and caches are filled.
            asyncio.run(run_clients(clients, seconds, process.pid, tally))
            holdings[name] = quiet_holdings(process.pid)
            print(f"{name}: {tally.line()}, {holdings[name]}", file=sys.stderr, flush=True)
    complaints = tally.complaints() + log_complaints(log) + growth(holdings)
    if process.returncode:
        complaints.append(f"the server ended with status {process.returncode}")
    command = {"model": arguments.model, "minutes": arguments.minutes, "clients": arguments.clients}
    return {
        "machine": describe_machine(), **command, **tally.figures(), "server": holdings, "complaints": complaints,
    }  # fmt: skip


# ---- what is found --------------------------------------------------------------------------------------


class Tally:
    """Answers, and what was wrong with them."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.latencies: list[float] = []  # seconds, of valid requests that were sent whole
        self.seconds = 0.0
        self.memory: list[float] = []  # MiB, each minute
        self.scores = 0
        self.largest_difference = 0.0
        self.wrong: Counter[str] = Counter()
        self.examples: list[str] = []

    def add(self, request: Request, way: str, status: str, body: bytes) -> None:
        """Count an answer, and look at it."""
        self.statuses[request.kind][status] += 1
        if status in (BROKEN, "429") or (status == CLOSED and request.kind in NO_HTTP):
            return
        if not status.isdecimal() or int(status) not in request.statuses:
            self.complain(f"{request.kind}, {way}: status {status}", body)
        elif request.read:
            self._compare(request, json.loads(body))
        elif int(status) >= 400 and not is_error(body) and request.kind not in NO_HTTP:
            self.complain(f"{request.kind}: not the API's error", body)

    def _compare(self, request: Request, answer: Any) -> None:
        assert request.read is not None and request.scores is not None
        found = request.read(answer)
        differences = [abs(a - b) for a, b in zip(found, request.scores, strict=True)]
        self.scores += len(found)
        self.largest_difference = max(self.largest_difference, *differences)
        if max(differences) > self.tolerance:
            self.complain(f"{request.kind}: wrong score", f"{found} for {request.scores}".encode())

    def complain(self, what: str, body: bytes = b"") -> None:
        self.wrong[what] += 1
        if self.wrong[what] <= 3 and len(self.examples) < EXAMPLES:
            self.examples.append(f"{what}: {body[:500]!r}")

    def complaints(self) -> list[str]:
        return [f"{count} times {what}" for what, count in self.wrong.items()]

    def line(self) -> str:
        total = sum(map(sum, (each.values() for each in self.statuses.values())))
        return f"{total} requests, {self.scores} scores, {sum(self.wrong.values())} wrong"

    def figures(self) -> dict[str, Any]:
        latencies, total = sorted(self.latencies), Counter[str]()
        for counted in self.statuses.values():
            total.update(counted)
        return {
            "requests": sum(total.values()),
            "requests_per_second": round(sum(total.values()) / max(self.seconds, 1e-9), 1),
            "statuses": dict(sorted(total.items())),
            "scores": self.scores,
            "largest_difference": self.largest_difference,
            "p50_ms": percentile(latencies, 0.50),
            "p99_ms": percentile(latencies, 0.99),
            "kinds": {kind: dict(sorted(each.items())) for kind, each in sorted(self.statuses.items())},
            "memory_mib_each_minute": self.memory,
            "examples": self.examples,
        }


def is_error(body: bytes) -> bool:
    """Whether a body is an `ErrorAnswer`."""
    try:
        return bool(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return False


def log_complaints(log: IO[str]) -> list[str]:
    """Errors in the server's log."""
    log.seek(0)
    found: Counter[str] = Counter()
    for line in log:
        if '"event": "error"' in line:
            found[json.loads(line)["traceback"].strip().splitlines()[-1][:300]] += 1
        elif line.startswith("Traceback"):
            found["a traceback"] += 1
    return [f"{count} times in the server's log: {error}" for error, count in found.items()]


def quiet_holdings(pid: int) -> dict[str, float]:
    """Memory in MiB, threads and open files of the server and its children, after a moment without clients."""
    time.sleep(2)
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    server = processes[0]
    return {
        "rss_mib": round(server.memory_info().rss / 2**20, 1),
        "threads": server.num_threads(),
        "files": server.num_fds(),
        "children": len(processes) - 1,
        "children_rss_mib": round(sum(each.memory_info().rss for each in processes[1:]) / 2**20, 1),
    }


def growth(holdings: dict[str, dict[str, float]]) -> list[str]:
    """What the server holds more of at the end than in the middle, beyond what comes and goes."""
    middle, end = holdings["middle"], holdings["end"]
    room = {"files": MORE_FILES, "threads": MORE_THREADS, "children": 0}
    for name in ("rss_mib", "children_rss_mib"):
        room[name] = GROWTH_MIB + GROWTH_SHARE * middle[name]
    return [f"{name} grew from {middle[name]} to {end[name]}" for name in room if end[name] > middle[name] + room[name]]


# ---- clients --------------------------------------------------------------------------------------------


async def run_clients(clients: list[Client], seconds: float, pid: int, tally: Tally) -> None:
    """Let all clients send requests for some seconds, or ten requests each for none."""
    start, minute = time.perf_counter(), 0

    def goes_on(sent: int) -> bool:
        return time.perf_counter() < start + seconds if seconds else sent < 10

    running = asyncio.gather(*(client.run(goes_on) for client in clients))
    while not running.done():
        await asyncio.wait([running], timeout=60)
        if not running.done():
            minute += 1
            tally.memory.append(round(psutil.Process(pid).memory_info().rss / 2**20, 1))
            print(f"minute {minute}: {tally.line()}, {tally.memory[-1]} MiB", file=sys.stderr, flush=True)
    await running
    tally.seconds += time.perf_counter() - start


@dataclass
class Client:
    """Sends requests over one connection, and opens another where it was closed."""

    url: str
    valid: ValidRequests
    others: list[Request]
    tally: Tally
    seed: int
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(f"client {self.seed}")

    async def run(self, goes_on: Callable[[int], bool]) -> None:
        sent = 0
        while goes_on(sent):
            sent += 1
            request = self.valid() if self.draw.random() < VALID_SHARE else self.draw.choice(self.others)
            (way,) = self.draw.choices(list(WAYS), WAYS.values())
            start = time.perf_counter()
            try:
                status, body, wait = await asyncio.wait_for(self.exchange(request, way), ANSWER_SECONDS)
            except (OSError, asyncio.IncompleteReadError):
                self.drop()
                status, body, wait = CLOSED, b"", 0.0
            except asyncio.TimeoutError:
                self.drop()
                status, body, wait = "no answer", b"", 0.0
            if way == "whole" and status == "200" and request.read:
                self.tally.latencies.append(time.perf_counter() - start)
            self.tally.add(request, way, status, body)
            await asyncio.sleep(wait)
        self.drop()

    async def exchange(self, request: Request, way: str) -> tuple[str, bytes, float]:
        """Send a request and return status, body and the seconds that the server wants to be left alone."""
        reader, writer = await self.connection(small_buffer=way == "slow reader")
        if way == "broken request":
            writer.write(request.data[: self.draw.randrange(len(request.data))])
            return await self.break_off(writer)
        if way == "pieces":
            size = max(1, len(request.data) // 10)
            for start in range(0, len(request.data), size):
                writer.write(request.data[start : start + size])
                await writer.drain()
                await asyncio.sleep(BODY_SECONDS / 20 * self.draw.random())
        else:
            writer.write(request.data)
            await writer.drain()
        if way == "broken answer":
            return await self.break_off(writer)
        return await self.read_answer(reader, way == "slow reader", without_body=request.data[:4] == b"HEAD")

    async def connection(self, small_buffer: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if small_buffer:
            self.drop()
        if self.reader is None or self.writer is None or self.writer.is_closing() or self.reader.at_eof():
            parts = urlsplit(self.url)
            assert parts.hostname and parts.port
            opened = socket.socket()
            if small_buffer:
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            opened.setblocking(False)
            await asyncio.get_running_loop().sock_connect(opened, (parts.hostname, parts.port))
            limit = 1024 if small_buffer else 1 << 16
            self.reader, self.writer = await asyncio.open_connection(sock=opened, limit=limit)
        return self.reader, self.writer

    async def break_off(self, writer: asyncio.StreamWriter) -> tuple[str, bytes, float]:
        """Close the connection after a moment, half of the times with a reset."""
        await asyncio.sleep(0.2 * self.draw.random())
        if self.draw.random() < 0.5:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.drop()
        return BROKEN, b"", 0.0

    async def read_answer(
        self, reader: asyncio.StreamReader, slowly: bool, without_body: bool
    ) -> tuple[str, bytes, float]:
        if slowly:
            await asyncio.sleep(1)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", head)
        left = int(length[1]) if length and not without_body else 0
        body = bytearray()
        while left > len(body):
            piece = await reader.read(min(1024 if slowly else 1 << 16, left - len(body)))
            if not piece:
                raise asyncio.IncompleteReadError(bytes(body), left)
            body += piece
            if slowly and len(body) < 1 << 14:
                await asyncio.sleep(0.1 * self.draw.random())
        if "connection: close" in head or not length:
            self.drop()
        retry = re.search(r"retry-after: (\d+)", head)
        return head.split()[1], bytes(body), float(retry[1]) if retry else 0.0

    def drop(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


if __name__ == "__main__":
    sys.exit(main())
