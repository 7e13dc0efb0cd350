"""Gradio's blocks, less what they would fetch for a visitor."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio_client import utils


class SealedBlocks(gr.Blocks):
    """Blocks that take files that were uploaded, and no addresses of files, which gradio would download.

    Of any component's value, since gradio looks for files in those of text boxes too.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *arguments: Any, **options: Any) -> list[Any]:
        """The events' arguments.

        Raises:
            gradio.Error: a file among the inputs has an address for a path.
        """
        utils.traverse(inputs, _refuse_address, utils.is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *arguments, **options)


def _refuse_address(file: dict[str, Any]) -> None:
    if utils.is_http_url_like(file["path"]):
        raise gr.Error("The file is an address, which is not fetched here; upload the file itself.")
