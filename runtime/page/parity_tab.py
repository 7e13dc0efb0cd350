"""The tab that shows why to trust a variant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from runtime import summary
from runtime.api.service import ServedModel, Service
from runtime.errors import KitError
from runtime.page.markup import fill, html_block, notice
from runtime.page.quick_parity import QuickParity
from runtime.page.waiting import QUICK, Awaiting, model_choice
from runtime.parity_report import ParityReport
from runtime.report import render_sections
from runtime.side_by_side import side_by_side


def parity_tab(service: Service) -> Awaiting:
    """Lay it out."""
    with gr.Row(elem_classes="toolbar"):
        choice, filled = model_choice(service)
        check = gr.Button("Check here and now", elem_id="parity-check", interactive=False, scale=0)
        stored = gr.Button("Show the stored report", visible=False, elem_classes="quiet", size="sm", scale=0)
    overview = html_block(elem_classes="overview")
    checked = html_block(elem_id="parity-checked", elem_classes="live")
    report = html_block(elem_id="parity-report")

    def again(name: str | None) -> Iterator[list[Any]]:
        yield from check_again(service, name)

    def show(name: str | None) -> list[Any]:
        return ["", show_stored(service, name), gr.update(visible=False)]

    shown = [checked, report, stored]
    check.click(again, choice, [*shown, check], concurrency_limit=2, show_progress="hidden", api_visibility="private")
    stored.click(show, choice, shown, **QUICK)
    choice.change(show, choice, shown, **QUICK)
    return Awaiting(
        [check, choice, overview, report],
        lambda: [gr.update(interactive=True), filled(), show_side_by_side(service), show_stored(service, None)],
    )


def show_stored(service: Service, name: str | None) -> str:
    """HTML of the report beside a model."""
    try:
        model = service.get(name)
    except KitError as fault:
        return notice(fault)
    if model.variant.report is None:
        return fill("no_report", model=model, unquantized=model.variant.checkpoint.quantization is None)
    return show_report(model, model.variant.report, "From when it was quantized")


def show_report(model: ServedModel, report: ParityReport, when: str) -> str:
    """HTML of a report, with what it was held to."""
    return fill("parity", model=model, report=report, when=when, sections=render_sections(report), summary=summary)


def show_side_by_side(service: Service) -> str:
    """HTML of all stored reports' figures, where there are several."""
    reports = {name: model.variant.report for name, model in service.models.items() if model.variant.report}
    if len(reports) < 2:
        return ""
    header, *rows = side_by_side(reports)
    return fill("side_by_side", header=header, rows=rows)


def check_again(service: Service, name: str | None) -> Iterator[list[Any]]:
    """The states of the tab while a model is checked: what is said, the report, the buttons."""
    back, waits, ready = gr.update(visible=True), gr.update(interactive=False), gr.update(interactive=True)
    try:
        model = service.get(name)
        yield [fill("progress", doing="Checking", **_progress(0, 0)), gr.skip(), gr.skip(), waits]
        quick = QuickParity.prepare(model)
        for _ in quick.run():
            progress = _progress(quick.done, len(quick.selection.pairs))
            yield [fill("progress", doing="Checking", **progress), gr.skip(), gr.skip(), waits]
    except KitError as fault:
        yield [notice(fault, "It could not be checked."), gr.skip(), gr.skip(), ready]
        return
    said = fill("checked", golden=quick.golden, missing="" if quick.report else quick.sentence())
    if quick.report is None:
        yield [said, gr.skip(), gr.skip(), ready]
    else:
        yield [said, show_report(model, quick.report, "Measured here and now"), back, ready]


def _progress(done: int, total: int) -> dict[str, Any]:
    return {"done": done, "total": total, "share": done / total if total else None, "left": None, "errors": 0}
