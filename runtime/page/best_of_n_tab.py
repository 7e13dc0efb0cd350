"""The tab that ranks any number of responses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gradio as gr

from runtime.api.service import Service
from runtime.errors import KitError
from runtime.page.batch_job import SUFFIXES
from runtime.page.comparison import read_turns
from runtime.page.markup import fill, html_block, notice
from runtime.page.ranking import SEPARATOR, bar_axis, join_responses, rank, read_responses, split_responses
from runtime.page.waiting import QUICK, Awaiting, model_choice


def best_of_n_tab(service: Service) -> Awaiting:
    """Lay it out."""
    with gr.Column(elem_id="best-inputs", elem_classes="inputs"):
        choice, filled = model_choice(service)
        prompt = gr.Textbox("", label="Prompt", lines=3, max_lines=14, placeholder="What the user asks")
        with gr.Row(elem_classes="best", equal_height=True):
            pasted = gr.Textbox(
                "",
                label="Responses",
                info=f"One after the other, with a line {SEPARATOR} between two",
                lines=11,
                max_lines=30,
                scale=3,
                min_width=280,
            )
            upload = gr.File(
                label="Or a file of them",
                file_types=list(SUFFIXES),
                height=170,
                scale=1,
                min_width=240,
                elem_classes="upload",
            )
    with gr.Row(elem_classes="actions"):
        run = gr.Button("Rank", variant="primary", size="lg", elem_id="best-run", interactive=False, scale=0)
        clear = gr.Button("Clear", size="sm", elem_classes="quiet", scale=0)
    result = html_block(elem_id="best-result", elem_classes="live")

    async def ranking(name: str | None, prompt: str, pasted: str) -> str:
        return await show_ranking(service, name, prompt, pasted)

    asked, answered = "(...texts) => worldpm.asked(texts, 'best')", "() => worldpm.answered('best')"
    run.click(ranking, [choice, prompt, pasted], result, js=asked, **QUICK).then(None, js=answered)
    upload.upload(take_upload, [upload, prompt], [prompt, pasted, result], **QUICK)
    clear.click(lambda: ["", "", None, ""], None, [prompt, pasted, upload, result], **QUICK)
    return Awaiting([run, choice], lambda: [gr.update(interactive=True), filled()])


async def show_ranking(service: Service, name: str | None, prompt: str, pasted: str) -> str:
    """HTML of a ranking, or of what stands in its way."""
    start = time.perf_counter()
    try:
        model = service.get(name)
        turns = read_turns("", [{"role": "user", "content": prompt}])
        ranked = await rank(model, turns, split_responses(pasted))
    except KitError as fault:
        return notice(fault)
    return fill("ranking", model=model, ranked=ranked, axis=bar_axis(ranked), seconds=time.perf_counter() - start)


def take_upload(path: str | None, prompt: str) -> list[Any]:
    """The prompt and the responses of an uploaded file, for the reader to see before they are scored."""
    try:
        found, responses = read_responses(Path(path or ""))
        return [found or prompt, join_responses(responses), ""]
    except KitError as fault:
        return [gr.skip(), gr.skip(), notice(fault)]
