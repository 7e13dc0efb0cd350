"""The page and the API: `python app.py --model worldpm-72b-gptq-4bit`.

`serve` is the story; `runtime.command` handles how a run can end.
"""

from __future__ import annotations

import logging
import socket
import sys
from argparse import Namespace

from fastapi import FastAPI
from rich.console import Console

from runtime.api import journal
from runtime.api.application import make_api
from runtime.api.key import read_key
from runtime.api.loading import Loading
from runtime.api.server import Server, listen
from runtime.api.service import Service
from runtime.command import run_command
from runtime.errors import KitError
from runtime.serve_arguments import limits_of, parse

LOADING_SECONDS = 10  # for the thread that loads to notice that all ends


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, serve, lambda _: "nothing was served yet.", argv)


def serve(arguments: Namespace, console: Console) -> int:
    """The whole story: take the port, answer at once, load meanwhile, stop in order."""
    if not arguments.model:
        console.print("No --model given, so this is the embedded demo. The real one: --model worldpm-72b-gptq-4bit")

    # 1. Take key and port, before anything heavy happens.
    key = read_key(arguments.api_key_file, console) if arguments.api_key_file else None
    listener = listen(arguments.host, arguments.port)
    port = listener.getsockname()[1]

    # 2. Make API and page, over models that are still to come.
    logging.basicConfig(handlers=[journal.JournalHandler()], level=logging.WARNING)
    service = Service(arguments.queue_tokens)
    api = make_api(
        service,
        limits_of(arguments),
        key,
        hosts=hosts_of(arguments),
        cors_origins=arguments.cors_origin,
        log_text=arguments.log_text,
    )
    if not arguments.no_page:
        api = add_page(api, service)

    # 3. Load in a thread of its own, and answer meanwhile.
    loading = Loading(service, arguments)
    loading.start()
    shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    what = "the API alone" if arguments.no_page else "the page"
    console.print(f"http://{shown}:{port}  {what}; /docs explains the API; Ctrl-C stops")
    journal.write("serving", host=arguments.host, port=port)
    Server(api).run(sockets=[listener])

    # 4. Everything that was accepted is answered.
    loading.stop()
    loading.join(LOADING_SECONDS)
    service.close()
    journal.write("stopped")
    return 2 if service.failure else 0


def hosts_of(arguments: Namespace) -> set[str] | None:
    """Names under which the server may be asked, beside addresses; None for any."""
    if arguments.insecure:
        return None
    return {"localhost", arguments.host, socket.gethostname(), *arguments.allowed_host}


def add_page(api: FastAPI, service: Service) -> FastAPI:
    """The page at `/`, beside the API.

    Raises:
        KitError: this installation has no page.
    """
    try:
        from runtime.page import mount_page  # here, since the API alone needs none of it
    except ModuleNotFoundError as error:
        raise KitError(f"the page cannot be made, as {error.name} is missing; install it, or say --no-page.") from error
    return mount_page(api, service)


if __name__ == "__main__":
    sys.exit(main())
