"""The kill test runs; whether a command survives it is the benchmark's result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_test.py"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_few_faults_of_a_command(tmp_path):
    command = [sys.executable, SCRIPT, "--writer", "demo", "--kills", "3", "--others", "2", "--moments", "1"]
    done = subprocess.run([*command, "--work", tmp_path / "work"], capture_output=True, text=True)
    result = json.loads(done.stdout)
    faults = result["writers"]["demo"]["faults"]
    assert done.returncode == 0 and result["bad"] == {}, done.stderr
    assert faults["kill"]["kills"] >= 3 and faults["full"]["errors"] == faults["EIO"]["errors"] == 2
    assert result["writers"]["demo"]["calls"] > 40
