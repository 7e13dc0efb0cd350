"""The Batch tab: scores an uploaded file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from runtime.api.service import Service
from runtime.batch.row import OutputRecord
from runtime.common.errors import KitError
from runtime.evaluation.metrics import proportion
from runtime.page.batch_job import UPLOAD_SUFFIXES, BatchJob
from runtime.page.charts import Histogram, make_histogram
from runtime.page.components import UNQUEUED_EVENT, DeferredComponents, html_block, model_dropdown
from runtime.page.markup import notice, render_template

SHOWN_ROWS = 1000
MAX_CONCURRENT_FILES = 4  # each file occupies a thread while its rows wait in the queue
FORMATS = ("JSONL", "CSV", "Parquet")


def batch_tab(service: Service) -> DeferredComponents:
    """Build the tab."""
    with gr.Column(elem_id="batch-inputs", elem_classes="inputs"):
        model, update_models = model_dropdown(service)
        upload = gr.File(
            label="Rows to score: JSONL, JSON, CSV or Parquet",
            file_types=list(UPLOAD_SUFFIXES),
            height=170,
            elem_classes="upload",
        )
        html_block(render_template("row_shapes"))
        truncate = gr.Checkbox(label="Drop the oldest turns of conversations that are too long", container=False)
    with gr.Row(elem_classes="actions"):
        run = gr.Button("Score the file", variant="primary", size="lg", elem_id="batch-run", interactive=False, scale=0)
        cancel = gr.Button("Cancel", size="lg", elem_id="batch-cancel", interactive=False, scale=0)
    result = html_block(elem_id="batch-result", elem_classes="live")
    with gr.Row(elem_classes="downloads", visible=False) as row:
        html_block('<p class="hint">Download all rows as</p>', elem_classes="hint-block")
        downloads = [gr.DownloadButton(each, size="sm", elem_classes="quiet", scale=0) for each in FORMATS]
    job = gr.State(None)
    outputs = [job, result, run, cancel, row, *downloads]

    def score(name: str | None, path: str | None, truncate: bool) -> Iterator[list[Any]]:
        yield from score_upload(service, name, path, truncate)

    run.click(
        score,
        [model, upload, truncate],
        outputs,
        concurrency_limit=MAX_CONCURRENT_FILES,
        show_progress="hidden",
        api_visibility="private",
    )
    cancel.click(stop, job, cancel, **UNQUEUED_EVENT)
    return DeferredComponents([run, model], lambda: [gr.update(interactive=True), update_models()])


def stop(job: BatchJob | None) -> Any:
    """Cancel the visitor's job; the records so far are then shown."""
    if job is not None:
        job.cancel()
    return gr.update(value="Cancelling …", interactive=False)


def score_upload(service: Service, name: str | None, path: str | None, truncate: bool) -> Iterator[list[Any]]:
    """Score a file, yielding updates of the tab: job, result, two buttons, download row and download buttons."""
    idle = [gr.update(interactive=True), gr.update(value="Cancel", interactive=False)]
    hidden = [gr.update(visible=False), *[gr.skip()] * len(FORMATS)]
    if path is None:
        yield [None, notice("No file is selected; choose one above or drop it there."), *idle, *hidden]
        return
    try:
        job = BatchJob(service.get(name), Path(path), truncate=truncate)
    except KitError as error:
        yield [None, notice(error, "This file cannot be scored."), *idle, *hidden]
        return
    busy = [gr.update(interactive=False), gr.update(value="Cancel", interactive=True)]
    yield [job, show_progress(job), *busy, *hidden]
    try:
        for _ in job.run():
            yield [job, show_progress(job), *busy, *hidden]
    finally:
        job.cancel()  # the generator is closed when the visitor leaves
    result = show_batch(job)
    if not job.records:
        yield [None, result, *idle, *hidden]
        return
    with tempfile.TemporaryDirectory(prefix="worldpm-scores-") as directory:  # gradio copies the files at the yield
        yield [None, result, *idle, gr.update(visible=True), *job.write(Path(directory))]


def show_progress(job: BatchJob) -> str:
    """HTML of the progress."""
    done = len(job.records)
    share = min(1.0, done / job.total) if job.total else None
    left = job.seconds * (1 / share - 1) if share else None
    return render_template(
        "progress", done=done, total=job.total, share=share, left=left, errors=job.errors, doing="Scoring"
    )


def show_batch(job: BatchJob) -> str:
    """HTML of the result: key figures, histogram, table of rows."""
    records = job.records
    margins = [record["margin"] for record in records if "margin" in record]
    scores = [score for record in records for score in record.get("scores", [])]
    plot: Histogram | None = None
    if len(margins) > 1:
        plot = make_histogram(margins, "margins", job.model.error_margin)
    elif len(scores) > 1:
        plot = make_histogram(scores, "scores")
    return render_template(
        "batch",
        job=job,
        records=records[:SHOWN_ROWS],
        columns=columns_of(records),
        plot=plot,
        x_label="margin (chosen − rejected)" if len(margins) > 1 else "score",
        errors=job.errors,
        tokens=sum(sum(record.get("tokens", [])) for record in records),
        pairs=len(margins),
        chosen=proportion(sum(margin > 0 for margin in margins), len(margins)) if margins else None,
        near=sum(abs(margin) <= job.model.error_margin for margin in margins) if job.model.error_margin else None,
    )


def columns_of(records: Sequence[OutputRecord]) -> list[str]:
    """The column headings of the table for these records."""
    pairs = (
        ["margin", "P(chosen)", "chosen", "rejected"] if any("margin" in record for record in records) else ["score"]
    )
    category = ["category"] if any("category" in record for record in records) else []
    return ["row", *pairs, *category, "tokens", "remark"]
