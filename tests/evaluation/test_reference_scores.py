"""reference_scores.json is read whole or refused."""

from __future__ import annotations

import json

import pytest

from runtime.common.errors import CheckpointError
from runtime.evaluation.reference_scores import REFERENCE_SCORES_FILE, ReferenceScores

STORED = {"schema": 1, "model": "m", "fingerprint": "f", "dtype": "d", "scores": {"a": -1.5}}


def test_what_is_saved_is_read(tmp_path):
    stored = ReferenceScores("m", "f", "d", {"a": -1.5})
    stored.save(tmp_path)
    assert ReferenceScores.load(tmp_path) == stored
    assert json.loads((tmp_path / REFERENCE_SCORES_FILE).read_text()) == STORED


@pytest.mark.parametrize(
    "damage",
    [
        *({"model": 1}, {"fingerprint": None}, {"dtype": []}),
        *({"scores": {"a": value}} for value in (float("nan"), float("inf"), 10**400, None, "much")),
        *({"scores": []}, {"schema": 2}, {"more": 1}),
    ],
)
def test_damaged_scores_are_refused(tmp_path, damage):
    (tmp_path / REFERENCE_SCORES_FILE).write_text(json.dumps(STORED | damage))
    with pytest.raises(CheckpointError, match="cannot be read"):
        ReferenceScores.load(tmp_path)


def test_deep_nesting_is_refused(tmp_path):
    (tmp_path / REFERENCE_SCORES_FILE).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ReferenceScores.load(tmp_path)
