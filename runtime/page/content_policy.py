"""The browser's own word that the page fetches nothing from elsewhere, whatever a library or a text asks for."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio's scripts are compiled in the browser from templates and styles written into the page.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)


class ContentPolicy:
    """Middleware that adds the policy to every HTML answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = dict(message["headers"])
                if headers.get(b"content-type", b"").startswith(b"text/html"):
                    added = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                    message["headers"] = [*message["headers"], *added]
            await send(message)

        await self.app(scope, receive, send_with_policy)
