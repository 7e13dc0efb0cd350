"""The tab that scores a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from runtime.api.service import Service
from runtime.errors import KitError
from runtime.figures import proportion
from runtime.page.batch_job import SUFFIXES, BatchJob, Downloads
from runtime.page.histogram import Histogram, histogram
from runtime.page.markup import fill, html_block, notice
from runtime.page.waiting import QUICK, Awaiting, model_choice
from runtime.scored_row import Record

SHOWN_ROWS = 1000
AT_ONCE = 4  # files at the same time; each holds a thread while its rows wait
FORMATS = ("JSONL", "CSV", "Parquet")


def batch_tab(service: Service) -> Awaiting:
    """Lay it out."""
    with gr.Column(elem_id="batch-inputs", elem_classes="inputs"):
        choice, filled = model_choice(service)
        upload = gr.File(
            label="Rows to score: JSONL, JSON, CSV or Parquet",
            file_types=list(SUFFIXES),
            height=170,
            elem_classes="upload",
        )
        html_block(fill("row_shapes"))
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

    def begin(name: str | None, path: str | None, truncate: bool) -> Iterator[list[Any]]:
        yield from score_upload(service, name, path, truncate)

    run.click(
        begin,
        [choice, upload, truncate],
        outputs,
        concurrency_limit=AT_ONCE,
        show_progress="hidden",
        api_visibility="private",
    )
    cancel.click(stop, job, cancel, **QUICK)
    return Awaiting([run, choice], lambda: [gr.update(interactive=True), filled()])


def stop(job: BatchJob | None) -> Any:
    """Cancel the visitor's job, which then shows what it has."""
    if job is not None:
        job.cancel()
    return gr.update(value="Cancelling …", interactive=False)


def score_upload(service: Service, name: str | None, path: str | None, truncate: bool) -> Iterator[list[Any]]:
    """The states of the tab while a file is scored: job, result, buttons, downloads."""
    idle = [gr.update(interactive=True), gr.update(value="Cancel", interactive=False)]
    hidden = [gr.update(visible=False), *[gr.skip()] * len(FORMATS)]
    if path is None:
        yield [None, notice("No file is chosen; drop one above."), *idle, *hidden]
        return
    try:
        job = BatchJob(service.get(name), Path(path), truncate=truncate)
    except KitError as fault:
        yield [None, notice(fault, "This file cannot be scored."), *idle, *hidden]
        return
    busy = [gr.update(interactive=False), gr.update(value="Cancel", interactive=True)]
    yield [job, show_progress(job), *busy, *hidden]
    try:
        for _ in job.run():
            yield [job, show_progress(job), *busy, *hidden]
    finally:
        job.cancel()  # the visitor may have left
    found = show_batch(job)
    if not job.records:
        yield [None, found, *idle, *hidden]
        return
    with_files = Downloads()
    try:
        yield [None, found, *idle, gr.update(visible=True), *job.write(with_files.path)]
    finally:
        with_files.close()


def show_progress(job: BatchJob) -> str:
    """HTML of how far it is."""
    done = len(job.records)
    share = min(1.0, done / job.total) if job.total else None
    left = job.seconds * (1 / share - 1) if share else None
    return fill("progress", done=done, total=job.total, share=share, left=left, errors=job.errors, doing="Scoring")


def show_batch(job: BatchJob) -> str:
    """HTML of what came of it: figures, histogram, table."""
    records = job.records
    margins = [record["margin"] for record in records if "margin" in record]
    scores = [score for record in records for score in record.get("scores", [])]
    plot: Histogram | None = None
    if len(margins) > 1:
        plot = histogram(margins, "margins", job.model.error_margin)
    elif len(scores) > 1:
        plot = histogram(scores, "scores")
    return fill(
        "batch",
        job=job,
        records=records[:SHOWN_ROWS],
        columns=columns_of(records),
        plot=plot,
        what="margin, chosen less rejected" if len(margins) > 1 else "score",
        errors=job.errors,
        tokens=sum(sum(record.get("tokens", [])) for record in records),
        pairs=len(margins),
        chosen=proportion(sum(margin > 0 for margin in margins), len(margins)) if margins else None,
        near=sum(abs(margin) <= job.model.error_margin for margin in margins) if job.model.error_margin else None,
    )


def columns_of(records: Sequence[Record]) -> list[str]:
    """What the table shows of these rows."""
    pairs = (
        ["margin", "P(chosen)", "chosen", "rejected"] if any("margin" in record for record in records) else ["score"]
    )
    category = ["category"] if any("category" in record for record in records) else []
    return ["row", *pairs, *category, "tokens", "remark"]
