"""The Parity tab: stored parity reports, and a new measurement on demand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from runtime.api.service import ServedModel, Service
from runtime.common.errors import KitError
from runtime.evaluation import verdict
from runtime.evaluation.report import ParityReport
from runtime.evaluation.report_files import render_sections
from runtime.evaluation.side_by_side import side_by_side
from runtime.page.components import UNQUEUED_EVENT, DeferredComponents, html_block, model_dropdown
from runtime.page.markup import notice, render_template
from runtime.page.parity_check import ParityCheck


def parity_tab(service: Service) -> DeferredComponents:
    """Build the tab."""
    with gr.Row(elem_classes="toolbar"):
        model, update_models = model_dropdown(service)
        check = gr.Button("Measure parity now", elem_id="parity-check", interactive=False, scale=0)
        stored = gr.Button("Show the stored report", visible=False, elem_classes="quiet", size="sm", scale=0)
    overview = html_block(elem_classes="overview")
    checked = html_block(elem_id="parity-checked", elem_classes="live")
    report = html_block(elem_id="parity-report")

    def measure(name: str | None) -> Iterator[list[Any]]:
        yield from measure_parity(service, name)

    def show(name: str | None) -> list[Any]:
        return ["", show_stored(service, name), gr.update(visible=False)]

    shown = [checked, report, stored]
    check.click(measure, model, [*shown, check], concurrency_limit=2, show_progress="hidden", api_visibility="private")
    stored.click(show, model, shown, **UNQUEUED_EVENT)
    model.change(show, model, shown, **UNQUEUED_EVENT)
    return DeferredComponents(
        [check, model, overview, report],
        lambda: [gr.update(interactive=True), update_models(), show_side_by_side(service), show_stored(service, None)],
    )


def show_stored(service: Service, name: str | None) -> str:
    """HTML of the report stored with a model."""
    try:
        model = service.get(name)
    except KitError as error:
        return notice(error)
    if model.variant.report is None:
        return render_template("no_report", model=model, unquantized=model.variant.checkpoint.quantization is None)
    return show_report(model, model.variant.report, "Measured at quantization")


def show_report(model: ServedModel, report: ParityReport, when: str) -> str:
    """HTML of a report, with the rule behind its verdict."""
    return render_template(
        "parity", model=model, report=report, when=when, sections=render_sections(report), verdict=verdict
    )


def show_side_by_side(service: Service) -> str:
    """HTML of a table of all stored reports; empty if there are fewer than two."""
    reports = {name: model.variant.report for name, model in service.models.items() if model.variant.report}
    if len(reports) < 2:
        return ""
    header, *rows = side_by_side(reports)
    return render_template("side_by_side", header=header, rows=rows)


def measure_parity(service: Service, name: str | None) -> Iterator[list[Any]]:
    """Measure a model's parity, yielding updates of the tab: progress, report, two buttons."""
    shown, busy, ready = gr.update(visible=True), gr.update(interactive=False), gr.update(interactive=True)
    try:
        model = service.get(name)
        yield [render_template("progress", doing="Measuring parity", **_progress(0, 0)), gr.skip(), gr.skip(), busy]
        check = ParityCheck.prepare(model)
        for _ in check.run():
            progress = _progress(check.done, len(check.selection.pairs))
            yield [render_template("progress", doing="Measuring parity", **progress), gr.skip(), gr.skip(), busy]
    except KitError as error:
        yield [notice(error, "Parity could not be measured."), gr.skip(), gr.skip(), ready]
        return
    outcome = render_template(
        "checked", golden=check.golden, missing="" if check.report else check.explain_missing_report()
    )
    if check.report is None:
        yield [outcome, gr.skip(), gr.skip(), ready]
    else:
        yield [outcome, show_report(model, check.report, "Measured just now"), shown, ready]


def _progress(done: int, total: int) -> dict[str, Any]:
    return {"done": done, "total": total, "share": done / total if total else None, "left": None, "errors": 0}
