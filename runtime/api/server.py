"""uvicorn, with the patience and the end that this server wants."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.api.traffic import Traffic
from runtime.errors import PlanError

HEAD_SECONDS = 15  # for a request's head to arrive
KEEP_ALIVE = 65  # longer than clients keep connections, so that none is closed while a request is on its way
LAST_REQUESTS = 0.5  # seconds in which requests on open connections still hear that the server stops
PAGE_SECONDS = 2  # for a page's event streams, which never end by themselves
CONNECTIONS = 1000


class PatientProtocol(H11Protocol):
    """Closes a connection that does not finish the head of a request, which uvicorn would wait for for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is due."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """More of a head, or of a body, which is timed where it is read."""
        if self._deadline is None and not self._is_answering():
            self._expect_head()
        super().data_received(data)
        if self._is_answering():
            self._cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._cancel()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT when all that it accepted is answered; a second signal does not wait."""

    def __init__(self, api: FastAPI):
        super().__init__(
            uvicorn.Config(
                api,
                http=PatientProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=PAGE_SECONDS,
                limit_concurrency=CONNECTIONS,
            )
        )
        self._traffic: Traffic = api.state.traffic

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not recorded, unlike uvicorn's own, which ends the process by the same signal after stopping in order."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no connection, turn new requests away, answer the others, then let go."""
        self._traffic.stopping = True
        for server in self.servers:
            server.close()
        await self._answered()
        await asyncio.sleep(LAST_REQUESTS)
        await self._answered()
        await super().shutdown(sockets)

    async def _answered(self) -> None:
        while self._traffic.in_flight and not self.force_exit:
            await asyncio.sleep(0.05)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        PlanError: the port is in use, or not ours to take, or the host is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sends small packets at once only on a named one
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, OverflowError, UnicodeError) as error:
        raise PlanError(
            f"--host {host} --port {port}: nobody can listen there ({error}); choose another port, such as --port "
            f"{port + 1}, or end what uses this one."
        ) from error
    return listener
