"""Targets: parity.json and reference_scores.json beside a checkpoint."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from benchmarks.fuzz.mutation import mutate_json
from benchmarks.fuzz.target import Target, Violation
from runtime.evaluation.comparison import measure_parity
from runtime.evaluation.reference_scores import REFERENCE_SCORES_FILE, ReferenceScores
from runtime.evaluation.report import BlockError, ParityReport, Subject, Thresholds, read_report
from runtime.evaluation.report_files import render_html, render_junit
from runtime.evaluation.scored_pair import ScoredPairWithTexts


@cache
def _report() -> ParityReport:
    generator = np.random.default_rng(1)
    turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    pairs = [
        ScoredPairWithTexts(
            id=f"pair{index}",
            category=f"words/{index % 2}",
            **{name: [{"role": role, "content": f"{name} {index}"}] for name, role in turns.items()},
            **{run: tuple(generator.normal(size=2)) for run in ("reference", "quantized", "noise_floor", "unrepaired")},
        )
        for index in range(4)
    ]
    subject = Subject(
        model="m",
        method="gptq",
        bits=4,
        bits_per_weight=4.25,
        reference_dtype="float32",
        kit_version="1",
        settings={"a": 1},
    )
    blocks = [BlockError(block=index, mean_error=0.01, max_error=0.03, sqnr={"q_proj": 20.0}) for index in range(2)]
    limits = Thresholds(min_agreement=0.9, max_shift=0.2)
    return measure_parity(pairs, subject, block_errors=blocks, repair={"slope": 1.5}, notes=["n"], thresholds=limits)


def _check_report(data: bytes, scratch: Path) -> None:
    """What is accepted survives being written, and has a page and a JUnit file that is XML."""
    path = scratch / "parity.json"
    path.write_bytes(data)
    report = read_report(path)
    path.write_text(report.to_json())
    if read_report(path) != report:
        raise Violation("a report is read back as another")
    render_html(report).encode()
    ElementTree.fromstring(render_junit(report).encode())


def _reference_scores() -> list[bytes]:
    stored = {
        "schema": 1,
        "model": "m",
        "fingerprint": "f" * 8,
        "dtype": "bfloat16 weights",
        "scores": {"a" * 64: -1.5},
    }
    return [json.dumps(stored).encode()]


def _check_reference_scores(data: bytes, scratch: Path) -> None:
    """What is accepted has finite scores and texts, and survives being written."""
    (scratch / REFERENCE_SCORES_FILE).write_bytes(data)
    stored = ReferenceScores.load(scratch)
    if not all(isinstance(text, str) for text in (stored.model, stored.fingerprint, stored.dtype)):
        raise Violation("a name is no text")
    if not all(math.isfinite(score) for score in stored.scores.values()):
        raise Violation("a score is not finite")
    stored.save(scratch)
    if ReferenceScores.load(scratch) != stored:
        raise Violation("the scores are read back as others")


EVALUATION = [f"runtime.evaluation.{name}" for name in ("report", "report_files", "charts", "verdict", "scored_pair")]
TARGETS = [
    Target("report", EVALUATION, lambda: [_report().to_json().encode()], mutate_json, _check_report),
    Target(
        "reference-scores",
        ["runtime.evaluation.reference_scores"],
        _reference_scores,
        mutate_json,
        _check_reference_scores,
    ),
]
