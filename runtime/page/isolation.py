"""Headers of the page's responses, and no downloads on a visitor's behalf.

The content security policy is a barrier against requests to other hosts.
"""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio_client import utils
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# 'unsafe-inline' and 'unsafe-eval': gradio compiles its scripts in the browser from inline templates and styles.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
KEEP = "public, max-age=31536000, immutable"


class PageHeaders:
    """ASGI middleware that adds the content security policy to HTML, and lets browsers keep gradio's assets.

    The name of an asset contains a hash of its content.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request, adding headers to the response."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                if headers.get(b"content-type", b"").startswith(b"text/html"):
                    added = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                    message["headers"] = [*message["headers"], *added]
                if message["status"] == 200 and "/assets/" in scope["path"] and b"cache-control" not in headers:
                    message["headers"] = [*message["headers"], (b"cache-control", KEEP.encode())]
            await send(message)

        await self.app(scope, receive, send_with_headers)


class UploadOnlyBlocks(gr.Blocks):
    """`gr.Blocks` that accepts uploaded files but no URLs, which gradio would download.

    Every input is checked, since gradio looks for files in the values of text boxes too.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *arguments: Any, **options: Any) -> list[Any]:
        """Check the inputs of an event, then preprocess them as gradio does.

        Raises:
            gradio.Error: the path of a file among the inputs is a URL.
        """
        utils.traverse(inputs, _refuse_url, utils.is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *arguments, **options)


def _refuse_url(file: dict[str, Any]) -> None:
    if utils.is_http_url_like(file["path"]):
        raise gr.Error("The file is a URL, which this page does not download; upload the file itself.")
