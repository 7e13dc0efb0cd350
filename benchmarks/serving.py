"""Measure a server's requests/s with 1, 8, 64 and 256 clients, and compare with scoring in this process.

    python benchmarks/serving.py --seconds 25 --json result.json
    python benchmarks/serving.py --url http://127.0.0.1:7860 --model output/demo-gptq-4bit --clients 64

Without `--url` it starts `app.py --no-page` with `--model` on a free port. Each client keeps one connection and posts
one sample at a time to `/get_reward`, as OpenRLHF's rollouts do; all clients share the bundled pairs, or `--rows`.
After a 429 a client waits for the time in Retry-After. Latencies are in milliseconds; memory is in MiB, from
`/metrics`. `local` is `Scorer.score` on the same number of rows in one call, in this process, while the server is idle.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from calibration.sources import load_rows  # noqa: E402
from runtime.common.errors import ConversationError  # noqa: E402
from runtime.conversations.conversation import ChatMessage  # noqa: E402
from runtime.demo.variant import DEMO_VARIANT_DIRECTORY  # noqa: E402
from runtime.scorer import Scorer  # noqa: E402

WARM_UP = 3  # seconds


def main() -> int:
    arguments = parse()
    rows = read_conversations(arguments)
    requests = [http_request(arguments.url or "http://127.0.0.1", row) for row in rows]
    result: dict[str, Any] = {"threads": os.environ.get("OMP_NUM_THREADS"), "conversations": len(rows), "phases": {}}
    with server(arguments) as url:
        result["model"] = json.loads(get(f"{url}/v1/models"))["data"][0]["id"]
        asyncio.run(load(url, requests, 8, WARM_UP))
        for clients in arguments.clients:
            phase = result["phases"][clients] = measure(url, requests, clients, arguments.seconds)
            progress(clients, phase)
        busiest = max(result["phases"].values(), key=lambda phase: phase["answered"])
        result["local"] = score_here(arguments.model, rows, busiest["answered"])
        print(f"local: {result['local']['conversations_per_second']:.1f} conversations/s", file=sys.stderr)
    result |= ratios(result)
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address of a running server (default: start one)")
    parser.add_argument("--model", default=str(DEMO_VARIANT_DIRECTORY), help="model to serve (default %(default)s)")
    parser.add_argument("--rows", help="preference pairs (default: the bundled ones)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256], help="default: 1 8 64 256")
    parser.add_argument("--seconds", type=float, default=25, help="per number of clients (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def read_conversations(arguments: argparse.Namespace) -> list[list[ChatMessage]]:
    """Both conversations of every pair, in order, without those that are too long for the model."""
    scorer = Scorer.from_pretrained(arguments.model)
    conversations = []
    for pair in load_rows(arguments.rows).pairs:
        for conversation in (pair.chosen_conversation, pair.rejected_conversation):
            try:
                scorer.renderer.render(conversation)
            except ConversationError:
                continue
            conversations.append(conversation)
    return conversations


def http_request(url: str, conversation: list[ChatMessage]) -> bytes:
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in conversation)
    prompt = text[: text.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")]
    body = json.dumps({"query": [text], "prompts": [prompt], "labels": [""]}).encode()
    head = f"POST /get_reward HTTP/1.1\r\nHost: {urlsplit(url).hostname}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[str]:
    """The address of the running server, or of a new one once it is ready."""
    if arguments.url:
        yield arguments.url.rstrip("/")
        return
    with tempfile.TemporaryFile("w+") as log, started(arguments.model, log) as (url, process):
        yield url
    print(f"server ended with status {process.returncode}", file=sys.stderr)


@contextmanager
def started(model: str, log: IO[str], *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address and the process of a new server that logs to a file, once it is ready; it is stopped at the end."""
    command = [sys.executable, str(ROOT / "app.py"), "--model", model, "--port", "0", "--no-page", *options]
    process = subprocess.Popen(command, stderr=log)
    try:
        while process.poll() is None and '"event": "ready"' not in read_log(log):
            time.sleep(0.2)
        port = re.search(r'"port": (\d+)', read_log(log))
        if port is None or process.poll() is not None:
            raise SystemExit(read_log(log))
        yield f"http://127.0.0.1:{port[1]}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def read_log(log: Any) -> str:
    return os.pread(log.fileno(), 1 << 20, 0).decode()


# ---- load -----------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Latencies in seconds of answered requests, and counts by status or error."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)


def measure(url: str, requests: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    before, start = memory(url), time.perf_counter()
    tokens = counter(url, "worldpm_tokens_total")
    tally = asyncio.run(load(url, requests, clients, seconds))
    took = time.perf_counter() - start
    latencies = sorted(tally.latencies)
    return {
        "seconds": round(took, 2),
        "answered": len(latencies),
        "requests_per_second": round(len(latencies) / took, 2),
        "tokens_per_second": round((counter(url, "worldpm_tokens_total") - tokens) / took, 1),
        "p50_ms": percentile(latencies, 0.50),
        "p99_ms": percentile(latencies, 0.99),
        "statuses": dict(tally.statuses),
        "memory_before_mib": before,
        "memory_after_mib": memory(url),
    }


async def load(url: str, requests: list[bytes], clients: int, seconds: float) -> Tally:
    tally, turn, end = Tally(), itertools.count(), time.perf_counter() + seconds
    await asyncio.gather(*(client(url, requests, turn, end, tally) for _ in range(clients)))
    return tally


async def client(url: str, requests: list[bytes], turn: Iterator[int], end: float, tally: Tally) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    while time.perf_counter() < end:
        start = time.perf_counter()
        try:
            writer.write(requests[next(turn) % len(requests)])
            status, wait = await read_answer(reader)
        except (OSError, asyncio.IncompleteReadError) as error:
            tally.statuses[type(error).__name__] += 1
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            continue
        tally.statuses[status] += 1
        if status == "200":
            tally.latencies.append(time.perf_counter() - start)
        await asyncio.sleep(wait)
    writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[str, int]:
    """Read a response; return its status and the seconds in Retry-After."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = re.search(r"content-length: (\d+)", head)
    await reader.readexactly(int(length[1]) if length else 0)
    retry = re.search(r"retry-after: (\d+)", head)
    return head.split()[1], int(retry[1]) if retry else 0


# ---- figures --------------------------------------------------------------------------------------------


def score_here(model: str, rows: list[list[ChatMessage]], count: int) -> dict[str, Any]:
    """Time `Scorer.score` on the first `count` rows, in one call."""
    scorer = Scorer.from_pretrained(model)
    scorer.score(rows[:8])
    start = time.perf_counter()
    scorer.score(rows[:count])
    took = time.perf_counter() - start
    scored = len(rows[:count])
    return {"seconds": round(took, 2), "rows": scored, "conversations_per_second": round(scored / took, 2)}


def ratios(result: dict[str, Any]) -> dict[str, float]:
    rates = {clients: phase["requests_per_second"] for clients, phase in result["phases"].items()}
    found = {}
    if 64 in rates:
        found["throughput_64_against_local"] = rates[64] / result["local"]["conversations_per_second"]
    if 64 in rates and rates.get(1):
        found["throughput_64_against_1"] = rates[64] / rates[1]
    return {name: round(value, 3) for name, value in found.items()}


def progress(clients: int, phase: dict[str, Any]) -> None:
    print(
        f"{clients:>4} clients: {phase['requests_per_second']:8.1f} requests/s, p50 {phase['p50_ms']} ms, p99 "
        f"{phase['p99_ms']} ms, {phase['statuses']}, {phase['memory_before_mib']} to {phase['memory_after_mib']} MiB",
        file=sys.stderr,
    )


def percentile(ordered: list[float], share: float) -> float | None:
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else None


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


def counter(url: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in get(f"{url}/metrics").splitlines() if line.startswith(name))


def memory(url: str) -> float:
    return round(counter(url, "process_resident_memory_bytes") / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
