"""Uploaded files in the Batch tab: same records as `runtime.score`, bad rows, cancelling, refused files."""

from __future__ import annotations

import csv
import io
import json
import pickle
import threading
import zipfile
from pathlib import Path

import pyarrow.parquet
import pytest

from runtime.api.batcher import ServerBusyError, ServerStoppingError
from runtime.api.service import Service
from runtime.common.errors import ConversationError
from runtime.conversations.rendering import RenderedConversation
from runtime.page import batch_job
from runtime.page.batch_job import BatchJob
from runtime.page.tabs.batch import columns_of, score_upload, show_batch
from tests.helpers.tiny_score import mixed_rows, read_jsonl, score, write_jsonl


@pytest.fixture
def model(page_service):
    return page_service.get(None)


def whole(model, path: Path) -> BatchJob:
    job = BatchJob(model, path)
    for _ in job.run():
        pass
    return job


def test_records_are_those_of_the_command(model, page_models, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*mixed_rows(40), "not json"])
    assert score(page_models[0], path, "--output", tmp_path / "there.jsonl", budget=64) == 0
    job = whole(model, path)
    assert job.finished and not job.failure and job.total == 41
    for here, there in zip(job.records, read_jsonl(tmp_path / "there.jsonl"), strict=True):
        assert here.keys() == there.keys() and here["where"] == there["where"]
        assert here.get("error") == there.get("error")
        assert here.get("scores", []) == pytest.approx(there.get("scores", []), abs=1e-5)


def test_csv_columns_are_pairs_or_single_responses(model, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\nQ,"yes, ""really""\nyes",no\nQ,,no\nQ,a,b,c\n')
    first, second, third = whole(model, path).records
    assert first["where"] == "rows.csv:2" and len(first["scores"]) == 2  # `where` is the line on which the row begins
    assert "blank" in second["error"] and "4 cells but 3 columns" in third["error"]
    path.write_text("id,prompt,response\n7,Q,yes\n")
    (record,) = whole(model, path).records
    assert record["id"] == "7" and record["score"] == record["scores"][0]


def test_downloads_hold_every_row(model, tmp_path):
    job = whole(model, write_jsonl(tmp_path / "rows.jsonl", mixed_rows(12)))
    lines, table, parquet = (Path(path) for path in job.write(tmp_path))
    assert read_jsonl(lines) == job.records
    assert len(list(csv.DictReader(io.StringIO(table.read_text())))) == 12
    assert pyarrow.parquet.read_table(parquet).num_rows == 12


def test_downloads_are_removed_after_gradio_has_copied_them(page_service, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", mixed_rows(4))
    for state in score_upload(page_service, None, str(path), False):
        downloads = [Path(each) for each in state[-3:] if isinstance(each, str)]
        assert all(each.is_file() for each in downloads)
    assert len(downloads) == 3 and not any(each.exists() for each in downloads)


def archive(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("rows.jsonl", json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b"}))
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("kind", ["zip", "pickle", "empty", "zeros"])
def test_what_is_not_what_its_name_says_is_an_answer_and_never_opened(model, page_service, tmp_path, suffix, kind):
    class Mine:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    contents = {"zip": archive(tmp_path / "a.zip"), "pickle": pickle.dumps(Mine()), "empty": b"", "zeros": bytes(4096)}
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(contents[kind])
    *_, last = score_upload(page_service, None, str(path), False)
    assert 'class="notice"' in last[1] or 'class="bad"' in last[1] or "0 rows scored" in last[1]
    assert not (tmp_path / "ran").exists()
    after = write_jsonl(tmp_path / "good.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "b"}])
    assert "1 rows scored" in list(score_upload(page_service, None, str(after), False))[-1][1]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.pkl", "rows.npz", "rows", "rows.jsonl.exe"])
def test_other_names_are_refused(model, tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ConversationError, match="upload one of these"):
        BatchJob(model, tmp_path / name)


def test_a_file_that_breaks_off_shows_what_it_gave(model, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,response\n" + b"Q,yes it is and more\n" * 40 + b'Q,"never closed\n')
    job = whole(model, path)
    assert not job.finished and "not CSV" in job.failure and job.records
    assert f"Stopped after {len(job.records)} rows" in show_batch(job) and "not CSV" in show_batch(job)


def test_files_of_too_many_rows_are_refused_or_broken_off(model, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_job, "MAX_ROWS", 20)
    with pytest.raises(ConversationError, match=r"more than 20 rows.*python -m runtime\.score"):
        BatchJob(model, write_jsonl(tmp_path / "rows.jsonl", mixed_rows(21)))
    path = tmp_path / "rows.csv"  # the rows of a CSV file are not counted beforehand
    path.write_text("prompt,response\n" + "Q,yes it is and more\n" * 40)
    job = whole(model, path)
    assert not job.finished and "more than 20 rows" in job.failure and 0 < len(job.records) <= 20


def test_errors_are_counted_as_they_come(model, tmp_path):
    job = BatchJob(model, write_jsonl(tmp_path / "rows.jsonl", [*mixed_rows(40), "not json", {}]))
    for _ in job.run():
        assert job.errors == sum("error" in record for record in job.records)
    assert job.errors >= 2


def test_cancelling_stops_between_rows_and_leaves_the_queue(model, tmp_path, monkeypatch):
    """The second window waits for scores that never come, until another thread cancels the job."""
    job = BatchJob(model, write_jsonl(tmp_path / "rows.jsonl", mixed_rows(60)))
    steps = job.run()
    next(steps)
    done = len(job.records)
    waiting = []

    def never(rendered):
        from concurrent.futures import Future

        waiting.append(Future())
        return waiting[-1]

    monkeypatch.setattr(model, "submit_each", never)
    threading.Timer(0.3, job.cancel).start()
    assert list(steps) == []
    assert job.cancelled and not job.finished and not job.failure and len(job.records) == done
    assert waiting[0].cancelled()
    assert f"Cancelled after {done} rows" in show_batch(job)


def test_a_full_queue_is_waited_for(model, tmp_path, monkeypatch):
    submit, refused = model.submit_each, []

    def busy_at_first(rendered):
        if len(refused) < 2:
            refused.append(1)
            raise ServerBusyError("full", 0)
        return submit(rendered)

    monkeypatch.setattr(model, "submit_each", busy_at_first)
    assert whole(model, write_jsonl(tmp_path / "rows.jsonl", mixed_rows(4))).finished and len(refused) == 2


def test_a_server_that_stops_ends_the_job(page_models, tmp_path):
    from tests.helpers.page_server import load

    service = load(Service(), page_models[:1])
    job = BatchJob(service.get(None), write_jsonl(tmp_path / "rows.jsonl", mixed_rows(60)))
    steps = job.run()
    next(steps)
    done = len(job.records)
    service.close()
    limit = threading.Timer(5, job.cancel)  # ends the test if the job retries for ever
    limit.start()
    assert list(steps) == []
    limit.cancel()
    assert not job.finished and "The server is stopping" in job.failure and len(job.records) == done
    with pytest.raises(ServerStoppingError):
        job.model.submit([RenderedConversation([1], 0, [])])


def test_a_visitor_who_leaves_stops_the_job(page_service, tmp_path):
    states = score_upload(page_service, None, str(write_jsonl(tmp_path / "rows.jsonl", mixed_rows(60))), False)
    job = next(states)[0]
    next(states)
    states.close()
    assert job.cancelled and len(job.records) < 60


def test_the_table_shows_bad_rows_and_what_there_is(model, tmp_path):
    rows = [{"prompt": "Q", "chosen": "<b>a</b>", "rejected": "b"}, {"prompt": "<script>alert(1)</script>"}]
    html = show_batch(whole(model, write_jsonl(tmp_path / "<img>.jsonl", rows)))
    assert "1 of 2 rows scored" in html and html.count('class="bad"') == 1
    assert "<script" not in html and "<img" not in html and "&lt;img&gt;.jsonl:1" in html
    assert columns_of([{"score": 1.0}]) == ["row", "score", "tokens", "remark"]
    assert "margin" in columns_of([{"margin": 1.0, "category": "x"}])


def test_no_file_and_no_such_model_are_said(page_service, tmp_path):
    assert "No file is selected" in list(score_upload(page_service, None, None, False))[-1][1]
    path = write_jsonl(tmp_path / "rows.jsonl", mixed_rows(2))
    assert "not served" in list(score_upload(page_service, "other", str(path), False))[-1][1]
