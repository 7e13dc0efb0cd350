"""Command-line options of the server (`python app.py`)."""

from __future__ import annotations

import argparse
import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from runtime.api.batcher import QUEUE_TOKENS
from runtime.common.command import make_parser
from runtime.common.errors import ConfigurationError
from runtime.demo.variant import DEMO_VARIANT_DIRECTORY
from runtime.options import ModelOptions, add_model_arguments

DESCRIPTION = f"""\
Serve WorldPM reward models: a page that compares responses, and an HTTP API for trainers.

Without --model, the demo's 4-bit variant in {DEMO_VARIANT_DIRECTORY} is served; it is quantized first if it is missing.
The server answers while models load: /health reports the progress with status 503, and 200 once all are loaded.
"""

EXAMPLES = """\
examples:
  python app.py                                                 the demo, at http://127.0.0.1:7860
  python app.py --model worldpm-72b-gptq-4bit --model Qwen/WorldPM-72B --devices cuda:0,cuda:1
  python app.py --model worldpm-72b-gptq-4bit --host 0.0.0.0 --api-key-file key --no-page     for trainers elsewhere
  curl http://127.0.0.1:7860/v1/comparisons --json '{"prompt": "Tips?", "response_a": "Sleep.", "response_b": "idk"}'

for trainers:
  OpenRLHF   --reward.remote_url http://127.0.0.1:7860/get_reward
  verl       /classify or /v1/embeddings, as of a vLLM or SGLang server
  TRL        reward_funcs=runtime.trl.reward_function(model="worldpm-72b-gptq-4bit"), without a server

exit status: 0 stopped by Ctrl-C or SIGTERM after answering all accepted requests; 2 an error that the message explains
"""


_ROOT_PATH = re.compile(r"(?:/[\w.~-]+)+", re.ASCII)
_OWN_PATHS = ("v1", "v2", "docs", "gradio_api", "assets", "static")


@dataclass(frozen=True)
class Limits:
    """Maximum values of one request.

    Attributes:
        body_bytes: size of the body.
        conversations: number of conversations.
        tokens: tokens of all conversations; a shared prefix counts once per conversation.
        turns: turns per conversation.
        body_seconds: seconds to receive the body.
    """

    body_bytes: int = 4 << 20
    conversations: int = 256
    tokens: int = 131_072
    turns: int = 1_000
    body_seconds: float = 30.0


@dataclass(frozen=True)
class ServeOptions:
    """Options of one server process.

    Attributes:
        models: directories or hub ids, the default model first; empty for the demo's 4-bit variant.
        allowed_hosts: values accepted in the Host header, besides IP addresses, localhost, `host` and the host name.
        cors_origins: origins whose pages may read responses.
        insecure: serve without a key on any interface, and accept any Host header.
        show_page: whether the page is served at `/`.
        log_text: whether conversations are written to the log.
        queue_tokens: most tokens that wait in the queue.
        root_path: sub-path of a proxy under which clients see the server, such as ``/reward``.
    """

    host: str
    port: int
    api_key_file: Path | None
    insecure: bool
    allowed_hosts: tuple[str, ...]
    cors_origins: tuple[str, ...]
    show_page: bool
    log_text: bool
    limits: Limits
    queue_tokens: int
    models: tuple[str, ...]
    model_options: ModelOptions
    root_path: str

    def host_names(self) -> set[str] | None:
        """Host names that a Host header may have; None allows any."""
        if self.insecure:
            return None
        return {"localhost", self.host, socket.gethostname(), *self.allowed_hosts}


def parse(argv: list[str] | None = None) -> ServeOptions:
    """Parse and validate the command line.

    Raises:
        ConfigurationError: a value is out of range, or the server would be reachable from other machines without a
            key.
    """
    arguments = _parser().parse_args(argv)
    _validate(arguments)
    return ServeOptions(
        host=arguments.host,
        port=arguments.port,
        api_key_file=arguments.api_key_file,
        insecure=arguments.insecure,
        allowed_hosts=tuple(arguments.allowed_host),
        cors_origins=tuple(arguments.cors_origin),
        show_page=not arguments.no_page,
        log_text=arguments.log_text,
        limits=Limits(
            body_bytes=arguments.max_body,
            conversations=arguments.max_conversations,
            tokens=arguments.max_tokens,
            turns=arguments.max_turns,
            body_seconds=arguments.body_seconds,
        ),
        queue_tokens=arguments.queue_tokens,
        models=tuple(arguments.model),
        model_options=ModelOptions.from_arguments(arguments),
        root_path=arguments.root_path.rstrip("/"),
    )


def is_loopback(host: str) -> bool:
    """Whether `host` resolves to loopback addresses only."""
    try:
        resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in resolved)


def _validate(arguments: argparse.Namespace) -> None:
    if not (arguments.api_key_file or arguments.insecure or is_loopback(arguments.host)):
        raise ConfigurationError(
            f"--host is {arguments.host}, which other machines can reach, and the server has no key; add "
            "--api-key-file FILE, or --insecure to serve without a key."
        )
    if not 0 <= arguments.port <= 65535:
        raise ConfigurationError(f"--port is {arguments.port}; it must be from 0 (any free port) to 65535.")
    for name in ("queue_tokens", "max_body", "max_conversations", "max_tokens", "max_turns", "body_seconds"):
        if getattr(arguments, name) <= 0:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigurationError(f"{flag} is {getattr(arguments, name)}; it must be greater than 0.")
    root_path = arguments.root_path.rstrip("/")
    if root_path and (not _ROOT_PATH.fullmatch(root_path) or root_path.split("/")[1] in _OWN_PATHS):
        raise ConfigurationError(
            f"--root-path is {arguments.root_path}; a path such as /reward was expected, which does not begin like a "
            f"path of the server ({', '.join(_OWN_PATHS)})."
        )
    for origin in arguments.cors_origin:
        if not re.fullmatch(r"https?://[^/*\s]+", origin):
            raise ConfigurationError(
                f"--cors-origin is {origin}; it must be an origin without a path, such as https://example.org."
            )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python app.py", DESCRIPTION, EXAMPLES)
    _add_network_arguments(parser.add_argument_group("address and access"))
    _add_limit_arguments(parser.add_argument_group("limits per request; a request above one is rejected with 4xx"))
    models = parser.add_argument_group("models and devices")
    models.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="directory, hub id (OWNER/NAME or OWNER/NAME@REVISION), or `demo` for the 16-bit demo; repeat for several "
        "models, the first is the default (without it: the demo's 4-bit variant)",
    )
    add_model_arguments(models)
    return parser


def _add_network_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine)")
    group.add_argument(
        "--port", type=int, default=7860, help="port to listen on (default %(default)s; 0: any free port)"
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with the key that every request except /health must send: Authorization: Bearer KEY, or in a "
        "browser KEY as the password with any user name",
    )
    group.add_argument(
        "--insecure", action="store_true", help="serve other machines without a key, and accept any Host header"
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="further host name to accept in the Host header, such as a proxy's; IP addresses and this machine's name "
        "are always accepted",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin whose pages may call the API, such as https://example.org (default: none)",
    )
    group.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="sub-path at which a proxy serves this server, such as /reward; the proxy may remove it or leave it",
    )
    group.add_argument("--no-page", action="store_true", help="serve the API only")
    group.add_argument("--log-text", action="store_true", help="write conversations to the log")


def _add_limit_arguments(group: argparse._ArgumentGroup) -> None:
    limits = Limits()
    group.add_argument(
        "--max-body",
        type=int,
        default=limits.body_bytes,
        metavar="BYTES",
        help="size of the body (default %(default)s)",
    )
    group.add_argument(
        "--max-conversations", type=int, default=limits.conversations, metavar="N", help="(default %(default)s)"
    )
    group.add_argument(
        "--max-tokens", type=int, default=limits.tokens, metavar="N", help="all conversations (default %(default)s)"
    )
    group.add_argument(
        "--max-turns", type=int, default=limits.turns, metavar="N", help="per conversation (default %(default)s)"
    )
    group.add_argument(
        "--body-seconds",
        type=float,
        default=limits.body_seconds,
        metavar="S",
        help="time to receive the body (default %(default)s)",
    )
    group.add_argument(
        "--queue-tokens",
        type=int,
        default=QUEUE_TOKENS,
        metavar="N",
        help="tokens of all waiting requests; above it, requests get 429 with Retry-After (default %(default)s)",
    )
