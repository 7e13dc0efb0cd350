"""uvicorn with a timeout for request headers and a shutdown that answers every accepted request."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.api.middleware import RequestTracker
from runtime.common.errors import ConfigurationError

HEADER_TIMEOUT_SECONDS = 15  # to receive the headers of a request
KEEP_ALIVE_SECONDS = 65  # more than most clients use, so that the client closes idle connections, not the server
SHUTDOWN_GRACE_SECONDS = 0.5  # during which new requests on open connections are answered with 503
STREAM_SHUTDOWN_SECONDS = 2  # for event streams of the page, which do not end by themselves
MAX_CONNECTIONS = 1000


class HeaderTimeoutProtocol(H11Protocol):
    """Closes a connection that does not finish the headers of a request in time; uvicorn has no such timeout."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout for the first request."""
        super().connection_made(transport)
        self._start_timeout()

    def data_received(self, data: bytes) -> None:
        """Start or stop the timeout; `BodyLimitMiddleware` has its own for the body."""
        if self._deadline is None and not self._is_answering():
            self._start_timeout()
        super().data_received(data)
        if self._is_answering():
            self._stop_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        self._stop_timeout()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_timeout(self) -> None:
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_SECONDS, self.timeout_keep_alive_handler)

    def _stop_timeout(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT, stops after answering all accepted requests; a second signal stops at once."""

    def __init__(self, api: FastAPI):
        super().__init__(
            uvicorn.Config(
                api,
                http=HeaderTimeoutProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=STREAM_SHUTDOWN_SECONDS,
                limit_concurrency=MAX_CONNECTIONS,
            )
        )
        self._tracker: RequestTracker = api.state.request_tracker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Request a shutdown. uvicorn's own handler also records the signal and raises it again after the shutdown."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listening sockets, reject new requests, wait for the accepted ones, then stop uvicorn."""
        self._tracker.stopping = True
        for server in self.servers:
            server.close()
        await self._wait_for_in_flight()
        await asyncio.sleep(SHUTDOWN_GRACE_SECONDS)
        await self._wait_for_in_flight()
        await super().shutdown(sockets)

    async def _wait_for_in_flight(self) -> None:
        while self._tracker.in_flight and not self.force_exit:
            await asyncio.sleep(0.05)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigurationError: the port is in use or needs privileges, or the host is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sets TCP_NODELAY only if the protocol is given; without it each response is delayed by up to 40 ms.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigurationError(
            f"--host {host} --port {port}: cannot listen ({error}); choose another port, such as --port {port + 1}, or "
            "stop the process that uses this one."
        ) from error
    return listener
