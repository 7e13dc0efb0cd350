"""Run the server: `python app.py --model worldpm-72b-gptq-4bit` serves the page and the HTTP API."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile

try:
    from fastapi import FastAPI
    from rich.console import Console

    from runtime.api import json_log
    from runtime.api.access import read_key
    from runtime.api.application import make_api
    from runtime.api.options import ServeOptions, parse
    from runtime.api.server import Server, listen
    from runtime.api.service import ModelLoader, Service
    from runtime.common.command import run_command
    from runtime.common.errors import KitError
except ModuleNotFoundError as missing:
    print(f"error: {missing.name} is not installed; run pip install -c constraints.txt -e '.[serve]'", file=sys.stderr)
    raise SystemExit(2) from None

LOADER_STOP_SECONDS = 10  # for the loading thread to end after `stop`


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(parse, run, lambda _: "nothing was served yet.", argv)


def run(options: ServeOptions, console: Console) -> int:
    """Serve until a signal stops the server; return 2 if loading a model failed, else 0.

    Raises:
        ConfigurationError: the key file is invalid, or the port cannot be opened.
        KitError: the page cannot be imported.
    """
    if not options.models:
        console.print("No --model given: serving the bundled demo. The 72B model: --model worldpm-72b-gptq-4bit")

    # 1. Read the key and open the port, so that their errors come before models load.
    key = read_key(options.api_key_file, console) if options.api_key_file else None
    listener = listen(options.host, options.port)
    port = listener.getsockname()[1]

    # 2. Build the application; the service has no models yet.
    logging.basicConfig(handlers=[json_log.JsonLogHandler()], level=logging.WARNING)
    service = Service(options.queue_tokens)
    api = make_api(
        service,
        options.limits,
        key,
        hosts=options.host_names(),
        cors_origins=options.cors_origins,
        log_text=options.log_text,
        root_path=options.root_path,
    )
    if options.show_page:
        api = _add_page(api, service, options.root_path)

    # 3. Load the models in a thread while the server runs.
    loader = ModelLoader(service, options.models, options.model_options)
    loader.start()
    url_host = f"[{options.host}]" if ":" in options.host else options.host
    served = "the page" if options.show_page else "the API only"
    console.print(f"http://{url_host}:{port}  {served}; API documentation at /docs; Ctrl-C stops")
    json_log.write("serving", host=options.host, port=port)
    Server(api).run(sockets=[listener])

    # 4. The server has stopped; end loading and the scoring thread.
    loader.stop()
    loader.join(LOADER_STOP_SECONDS)
    service.close()
    json_log.write("stopped")
    return 2 if service.failure else 0


def _add_page(api: FastAPI, service: Service, root_path: str) -> FastAPI:
    try:
        from runtime.page import mount_page  # imported only here, because the API alone does not need gradio
    except ModuleNotFoundError as error:
        raise KitError(
            f"the page needs {error.name}, which is not installed; run pip install -c constraints.txt -e '.[serve]', "
            "or add --no-page."
        ) from error
    if "GRADIO_TEMP_DIR" not in os.environ:  # gradio's own default is a directory that all users of the machine share
        os.environ["GRADIO_TEMP_DIR"] = uploads = tempfile.mkdtemp(prefix="worldpm-uploads-")
        atexit.register(shutil.rmtree, uploads, ignore_errors=True)
    return mount_page(api, service, root_path=root_path)


if __name__ == "__main__":
    sys.exit(main())
