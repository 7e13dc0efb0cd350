"""The rows of a benchmark: read and checked before a model is loaded, and judged when their scores are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.common.errors import ConversationError, JobError, printable
from runtime.conversations.row_files import read_rows
from runtime.conversations.row_shapes import read_id
from runtime.conversations.row_sources import list_row_files
from runtime.conversations.rows.context import RowOptions, RowReading
from runtime.conversations.rows.recognise import read_row
from runtime.preference_benchmarks.benchmark import Benchmark, JudgedRow, Row


@dataclass(frozen=True)
class BenchmarkRows:
    """The rows of a benchmark on this machine.

    Attributes:
        source: their file, directory or pattern, as `find_rows` gives it.
        count: their number.
        digest: sha256 of their content and order.
    """

    benchmark: Benchmark
    source: str
    count: int
    digest: str

    @classmethod
    def check(cls, benchmark: Benchmark, source: str) -> BenchmarkRows:
        """Read all rows once.

        Raises:
            ConversationError: no row counts, or one lacks a key or has a value that the benchmark cannot use; the
                message names file, row and key.
        """
        digest, judged = hashlib.sha256(), []
        for where, row in _located_rows(source):
            judged.append(_judge(benchmark, row, where, None))
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        if not any(row.outcomes for row in judged):
            raise ConversationError(f"{source} has no row that counts; rows of {benchmark.title} were expected.")
        benchmark.special_scores(judged)  # for its errors
        return cls(benchmark, source, len(judged), digest.hexdigest())

    @property
    def row_options(self) -> RowOptions:
        """How the scoring command reads them."""
        return _row_options(self.benchmark)

    def judge(self, scores_file: Path) -> list[JudgedRow]:
        """Judge every row by the scores that the scoring command wrote.

        Raises:
            JobError: the file does not have the scores of these rows.
        """
        judged = []
        with open(scores_file, encoding="utf-8") as lines:
            for where, row in _located_rows(self.source):
                record = json.loads(next(lines, "{}"))
                if record.get("where") != where:
                    raise JobError(
                        f"{scores_file} does not have the scores of {where}; remove it, or choose another --output."
                    )
                judged.append(_judge(self.benchmark, row, where, record))
        return judged


def _located_rows(source: str) -> Iterator[tuple[str, Any]]:
    for file in list_row_files(source):
        for where, row in read_rows(file):
            yield printable(where), row  # as the scoring command names it


def _judge(benchmark: Benchmark, row: Any, where: str, record: dict[str, Any] | None) -> JudgedRow:
    """Judge a row by its record. Without scores, its preferred responses are worse than the others."""
    reading = _read(benchmark, row, where)
    better = {index for index, _ in reading.preferences}
    record = record or {}
    scores = record.get("scores") or [-float("inf") if i in better else 0.0 for i in range(len(reading.responses))]
    row_id = next((row[key] for key in benchmark.id_keys if row.get(key) is not None), None)
    return JudgedRow(
        where,
        read_id({"id": row_id}, where),
        tuple(score for index, score in enumerate(scores) if index in better),
        tuple(score for index, score in enumerate(scores) if index not in better),
        tuple(benchmark.judge(row, scores, where)),
        record.get("error", ""),
    )


def _read(benchmark: Benchmark, row: Row, where: str) -> RowReading:
    missing = [key for key in benchmark.needs if isinstance(row, dict) and row.get(key) is None]
    if missing:
        raise ConversationError(
            f"{where}: the row has no {missing[0]!r}, which every row of {benchmark.title} has; give a copy of it."
        )
    return read_row(row, where, _row_options(benchmark))


def _row_options(benchmark: Benchmark) -> RowOptions:
    return RowOptions(benchmark.format, allow_blank=True)
