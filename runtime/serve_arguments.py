"""The command line of `python app.py`."""

from __future__ import annotations

import argparse
import ipaddress
import re
import socket
from pathlib import Path

from runtime.api.batcher import QUEUE_TOKENS
from runtime.api.limits import Limits
from runtime.command import make_parser
from runtime.demo_variant import OUTPUT
from runtime.errors import PlanError
from runtime.machine_arguments import add_machine, check_machine

DESCRIPTION = f"""\
Open a page that compares responses with a WorldPM reward model, and an API that trainers speak.

Without --model it is the demo's 4-bit variant in {OUTPUT}, made first if it is missing. The server answers at
once; /health says how far loading is, and turns from 503 to 200 when it is done.
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

exit status: 0 stopped by Ctrl-C or SIGTERM, all accepted requests answered; 2 an error that the message explains
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the arguments.

    Raises:
        PlanError: others could reach a server without a key, or an argument has a value that cannot be.
    """
    arguments = _parser().parse_args(argv)
    if not (arguments.api_key_file or arguments.insecure or is_loopback(arguments.host)):
        raise PlanError(
            f"--host is {arguments.host}, where others can reach a server that asks for no key; give it one with "
            "--api-key-file, or say --insecure if that is meant."
        )
    if not 0 <= arguments.port <= 65535:
        raise PlanError(f"--port is {arguments.port}; a number from 0 (any free one) to 65535 was expected.")
    for name in ("queue_tokens", "max_body", "max_conversations", "max_tokens", "max_turns", "body_seconds"):
        if getattr(arguments, name) <= 0:
            raise PlanError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; more than 0 was expected.")
    for origin in arguments.cors_origin:
        if not re.fullmatch(r"https?://[^/*\s]+", origin):
            raise PlanError(
                f"--cors-origin is {origin}; one such as https://example.org, without a path, was expected."
            )
    check_machine(arguments)
    return arguments


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(each[4][0]).is_loopback for each in found)


def limits_of(arguments: argparse.Namespace) -> Limits:
    """What one client may ask for."""
    return Limits(
        body_bytes=arguments.max_body,
        conversations=arguments.max_conversations,
        tokens=arguments.max_tokens,
        turns=arguments.max_turns,
        body_seconds=arguments.body_seconds,
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("python app.py", DESCRIPTION, EXAMPLES)
    _add_where(parser.add_argument_group("where, and for whom"))
    _add_limits(parser.add_argument_group("limits of a request; beyond them it is refused by name"))
    _add_machine(parser.add_argument_group("models and machine"))
    return parser


def _add_where(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine)")
    group.add_argument(
        "--port", type=int, default=7860, help="port to listen on (default %(default)s; 0: any free one)"
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="a file with the key that everything but /health asks for: Authorization: Bearer KEY, or in a browser the "
        "key as password and any name",
    )
    group.add_argument(
        "--insecure", action="store_true", help="let others reach a server that asks for no key, under any host name"
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which the server is asked, such as a proxy's, beside addresses and this machine's name",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages of this origin, such as https://example.org, may read answers (default: none may)",
    )
    group.add_argument("--no-page", action="store_true", help="the API alone")
    group.add_argument("--log-text", action="store_true", help="write the conversations to the log too")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    limits = Limits()
    group.add_argument(
        "--max-body", type=int, default=limits.body_bytes, metavar="BYTES", help="of its body (default %(default)s)"
    )
    group.add_argument(
        "--max-conversations", type=int, default=limits.conversations, metavar="N", help="(default %(default)s)"
    )
    group.add_argument(
        "--max-tokens", type=int, default=limits.tokens, metavar="N", help="of all together (default %(default)s)"
    )
    group.add_argument(
        "--max-turns", type=int, default=limits.turns, metavar="N", help="of a conversation (default %(default)s)"
    )
    group.add_argument(
        "--body-seconds", type=float, default=limits.body_seconds, metavar="S", help="to send it (default %(default)s)"
    )
    group.add_argument(
        "--queue-tokens",
        type=int,
        default=QUEUE_TOKENS,
        metavar="N",
        help="of all requests that wait; beyond it they are asked to come back (default %(default)s)",
    )


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help="a directory, a hub id, or `demo`, the 16-bit one; several times for several (default: the demo's 4-bit "
        "variant)",
    )
    add_machine(group)
