"""The whole page: the header, five tabs, and the updates once the models are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware

from runtime.api.service import ServedModel, Service
from runtime.evaluation.verdict import METRIC_ROWS
from runtime.page.components import UNQUEUED_EVENT, DeferredComponents, html_block
from runtime.page.formatting import bits_per_weight
from runtime.page.isolation import PageHeaders, UploadOnlyBlocks
from runtime.page.markup import render_template
from runtime.page.tabs.batch import batch_tab
from runtime.page.tabs.best_of_n import best_of_n_tab
from runtime.page.tabs.compare import compare_tab
from runtime.page.tabs.model import model_tab
from runtime.page.tabs.parity import parity_tab
from runtime.page.theme import make_theme

PAGE_DIRECTORY = Path(__file__).parent
REPORT_CSS = PAGE_DIRECTORY.parent / "evaluation" / "templates" / "parity.css"
TITLE = "worldpm-kit"
UPLOAD_MAX_AGE_SECONDS = 24 * 3600  # older uploads are removed
UPLOAD_CLEANUP_SECONDS = 3600  # interval between removals
MAX_UPLOAD_SIZE = "64mb"


def make_page(service: Service) -> gr.Blocks:
    """Build the page without theme, styles and script, which `mount_page` adds."""
    with UploadOnlyBlocks(
        title=TITLE, analytics_enabled=False, delete_cache=(UPLOAD_CLEANUP_SECONDS, UPLOAD_MAX_AGE_SECONDS)
    ) as page:
        masthead = html_block(show_masthead(service), elem_id="masthead")
        with gr.Tabs(overflow_behavior="wrap", elem_id="tabs"):
            with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                tabs = [compare_tab(service, page)]
            with gr.Tab("Best of N", id="best", elem_id="tab-best"):
                tabs.append(best_of_n_tab(service))
            with gr.Tab("Batch", id="batch", elem_id="tab-batch"):
                tabs.append(batch_tab(service))
            with gr.Tab("Parity", id="parity", elem_id="tab-parity"):
                tabs.append(parity_tab(service))
            with gr.Tab("Model", id="model", elem_id="tab-model") as tab:
                tabs.append(model_tab(service, tab))
        _refresh_until_ready(service, page, masthead, tabs)
    page.queue(default_concurrency_limit=None, max_size=512)
    return page


def mount_page(
    application: FastAPI,
    service: Service,
    *,
    path: str = "/",
    root_path: str = "",
    max_upload_size: str | int = MAX_UPLOAD_SIZE,
) -> FastAPI:
    """Mount the page in an application, whose own routes must be added before.

    Args:
        root_path: sub-path of a proxy under which visitors see the page.
        max_upload_size: bytes, or text such as `64mb`.
    """
    application.add_middleware(PageHeaders)
    application.add_middleware(GZipMiddleware, compresslevel=6)
    return gr.mount_gradio_app(
        application,
        make_page(service),
        path=path,
        root_path=root_path or None,
        theme=make_theme(),
        head=read_head(),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=max_upload_size,
        favicon_path=str(PAGE_DIRECTORY / "icon.png"),
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )


def read_head() -> str:
    """The `<style>` and `<script>` elements: the page's own, and the parity report's rules limited to `.report`.

    They are not passed as gradio's `css`, which splits selectors at every comma, including those in parentheses.
    """
    style, report, script = (
        path.read_text(encoding="utf-8")
        for path in (PAGE_DIRECTORY / "style.css", REPORT_CSS, PAGE_DIRECTORY / "script.js")
    )
    return f"<style>{style}\n.gradio-container .report {{\n{report}\n}}</style>\n<script>{script}</script>"


def show_masthead(service: Service) -> str:
    """HTML of the header: the loaded models, or the progress of loading."""
    return render_template(
        "masthead",
        ready=service.ready,
        failure=service.failure,
        status=service.status,
        models=[(name, _describe(service.models[name])) for name in service.models],
    )


def _describe(model: ServedModel) -> str:
    text = f"{bits_per_weight(model)} bits per weight"
    if report := model.variant.report:
        agreement = METRIC_ROWS[0].value(report.figures)
        text += f", agrees with the original in {agreement} of {report.figures.pairs:,} pairs"
    return text


def _refresh_until_ready(service: Service, page: gr.Blocks, masthead: gr.HTML, tabs: list[DeferredComponents]) -> None:
    """Update the page when it is opened, and once a second while the models load."""
    timer = gr.Timer(1.0)
    deferred = [component for tab in tabs for component in tab.components]

    def refresh() -> list[Any]:
        done = service.ready or service.failure is not None
        updates = [update for tab in tabs for update in tab.updates()] if service.ready else [gr.skip()] * len(deferred)
        return [show_masthead(service), gr.Timer(active=not done), *updates]

    page.load(refresh, None, [masthead, timer, *deferred], **UNQUEUED_EVENT)
    timer.tick(refresh, None, [masthead, timer, *deferred], **UNQUEUED_EVENT)
