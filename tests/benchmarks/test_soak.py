"""The soak: a few seconds of it, and what it must notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import CLOSED, Tally, growth, log_complaints
from benchmarks.soak_requests import Request

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
VALID = Request("valid", b"", (200,), (0.5, -1.0), lambda answer: answer["scores"])
REFUSED = Request("bad JSON", b"", (400,))
ERROR = json.dumps({"error": {"message": "no", "field": None, "code": 400}}).encode()
HOLDINGS = {"rss_mib": 400.0, "threads": 10, "files": 9, "children": 1, "children_rss_mib": 20.0}


@pytest.mark.slow
def test_a_few_seconds(tmp_path):
    command = [sys.executable, SCRIPT, "--model", "tiny", "--minutes", "0.05", "--clients", "6"]
    done = subprocess.run(
        [*command, "--conversations", "20", "--json", tmp_path / "result.json"], capture_output=True, text=True
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert done.returncode == 0 and not result["complaints"], done.stderr + str(result["examples"])
    assert result["requests"] >= 60 and result["scores"] > 30
    assert {*result["server"]} == {"start", "middle", "end"}


@pytest.mark.parametrize(
    ("request_", "status", "body", "wrong"),
    [
        (VALID, "200", b'{"scores": [0.5, -1.0]}', ""),
        (VALID, "429", ERROR, ""),
        (VALID, "200", b'{"scores": [0.5, -1.1]}', "wrong score"),
        (VALID, "500", ERROR, "status 500"),
        (VALID, CLOSED, b"", "status closed"),
        (REFUSED, "400", ERROR, ""),
        (REFUSED, "400", b"Internal Server Error", "not the API's error"),
        (REFUSED, "200", b"{}", "status 200"),
        (Request("no HTTP", b"", (400,)), CLOSED, b"", ""),
    ],
)
def test_an_answer_is_judged(request_, status, body, wrong):
    tally = Tally(tolerance=1e-4)
    tally.add(request_, "whole", status, body)
    assert [wrong in each for each in tally.complaints()] == [True] * bool(wrong)


@pytest.mark.parametrize(
    ("name", "value", "grew"),
    [
        ("rss_mib", 420, False),
        ("rss_mib", 440, True),
        ("files", 20, True),
        ("threads", 60, True),
        ("children", 2, True),
    ],
)
def test_growth_is_noticed(name, value, grew):
    assert bool(growth({"middle": HOLDINGS, "end": HOLDINGS | {name: value}})) == grew


def test_errors_of_the_log_are_counted(tmp_path):
    error = json.dumps({"event": "error", "traceback": "Traceback\n  File\nValueError: what\n"})
    with open(tmp_path / "log", "w+") as log:
        log.write(f'{{"event": "request"}}\n{error}\n{error}\n')
        assert log_complaints(log) == ["2 times in the server's log: ValueError: what"]
