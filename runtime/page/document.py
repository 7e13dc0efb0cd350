"""The page as a whole: the masthead, five tabs, and how they come to life when the models are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from runtime.api.service import Service
from runtime.page.batch_tab import batch_tab
from runtime.page.best_of_n_tab import best_of_n_tab
from runtime.page.compare_tab import bits, compare_tab
from runtime.page.content_policy import ContentPolicy
from runtime.page.markup import fill, html_block
from runtime.page.model_tab import model_tab
from runtime.page.parity_tab import parity_tab
from runtime.page.sealed_blocks import SealedBlocks
from runtime.page.theme import make_theme
from runtime.page.waiting import QUICK, Awaiting
from runtime.summary import FIGURE_ROWS

HERE = Path(__file__).parent
REPORT_CSS = HERE.parent / "templates" / "parity.css"
TITLE = "worldpm-kit"
KEPT, LOOKED_AT = 24 * 3600, 3600  # seconds until an upload is removed, and between two looks at that
LONGEST_UPLOAD = "64mb"


def make_page(service: Service) -> gr.Blocks:
    """The page, without its looks; `mount_page` serves it with them."""
    with SealedBlocks(title=TITLE, analytics_enabled=False, delete_cache=(LOOKED_AT, KEPT)) as page:
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
        _come_to_life(service, page, masthead, tabs)
    page.queue(default_concurrency_limit=None, max_size=512)
    return page


def mount_page(
    application: FastAPI, service: Service, *, path: str = "/", longest_upload: str | int = LONGEST_UPLOAD
) -> FastAPI:
    """Serve the page beside an application's own routes, which are to be there before.

    Args:
        longest_upload: bytes, or text such as `64mb`.
    """
    application.add_middleware(ContentPolicy)
    return gr.mount_gradio_app(
        application,
        make_page(service),
        path=path,
        theme=make_theme(),
        head=read_head(),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=longest_upload,
        favicon_path=str(HERE / "icon.png"),
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )


def read_head() -> str:
    """The page's own rules and script, and the parity report's rules where one is shown.

    As gradio's `css` they would be taken apart at commas, those within a selector's brackets too.
    """
    style, report, script = (
        path.read_text(encoding="utf-8") for path in (HERE / "style.css", REPORT_CSS, HERE / "script.js")
    )
    return f"<style>{style}\n.gradio-container .report {{\n{report}\n}}</style>\n<script>{script}</script>"


def show_masthead(service: Service) -> str:
    """HTML of what is loaded, or how far loading is."""
    return fill(
        "masthead",
        ready=service.ready,
        failure=service.failure,
        status=service.status,
        models=[(name, _in_words(service, name)) for name in service.models],
    )


def _in_words(service: Service, name: str) -> str:
    model = service.models[name]
    words = f"{bits(model)} bits a weight"
    if report := model.variant.report:
        agreement = FIGURE_ROWS[0].value(report.figures)
        words += f", picks the original’s winner in {agreement} of {report.figures.pairs:,} pairs"
    return words


def _come_to_life(service: Service, page: gr.Blocks, masthead: gr.HTML, tabs: list[Awaiting]) -> None:
    """Look once a second while the models load, and once when the page is opened."""
    timer = gr.Timer(1.0)
    waiting = [component for tab in tabs for component in tab.components]

    def look() -> list[Any]:
        done = service.ready or service.failure is not None
        updates = [update for tab in tabs for update in tab.updates()] if service.ready else [gr.skip()] * len(waiting)
        return [show_masthead(service), gr.Timer(active=not done), *updates]

    page.load(look, None, [masthead, timer, *waiting], **QUICK)
    timer.tick(look, None, [masthead, timer, *waiting], **QUICK)
