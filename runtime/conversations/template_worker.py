"""Evaluate one chat template in a process of its own; run as a script by `chat_template.py`.

A template comes with a checkpoint and is not trusted. jinja2's sandbox keeps it from reaching Python, but not from
looping for ever or making a string of 10 GB. So each evaluation may use a limited amount of memory and processor time.

Requests and answers are lines of JSON. The first request has the `template` and its `variables`, the others
`messages`. An answer has the `text`, or a `reason` and whether the template itself `refused`.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from typing import Any

if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])  # where the parent has jinja2

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: no limits
    resource = None  # type: ignore[assignment]

CPU_SECONDS, CPU_SECONDS_PER_MEBIBYTE = 2.0, 1.0
MEMORY_BYTES, MEMORY_PER_BYTE = 512 << 20, 64  # address space of the process, and for each byte of the request


class Refused(jinja2.TemplateError):
    """Raised by `raise_exception` in a template."""


class Generation(Extension):
    """`{% generation %}`, with which transformers marks the assistant's text: its body as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The filters, functions and tags that transformers gives to chat templates."""
    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise Refused(message)


def limit(request_bytes: int) -> None:
    """Give the next evaluation its memory and processor time; the kernel ends the process when the time is up."""
    if resource is None:
        return
    seconds = CPU_SECONDS + CPU_SECONDS_PER_MEBIBYTE * request_bytes / (1 << 20)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = MEMORY_BYTES + MEMORY_PER_BYTE * request_bytes
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def answer(template: jinja2.Template | None, request: dict[str, Any]) -> tuple[jinja2.Template | None, dict[str, Any]]:
    """Compile the template, or render the messages. Every error becomes an answer."""
    try:
        if template is None:
            return make_environment().from_string(request["template"], request["variables"]), {"text": ""}
        return template, {"text": template.render(messages=request["messages"], add_generation_prompt=False)}
    except MemoryError:
        return template, {"reason": "it needs too much memory", "refused": False}
    except Exception as error:
        reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        return template, {"reason": reason[:1000], "refused": isinstance(error, Refused)}


def main() -> None:
    """Answer requests until standard input ends."""
    template = None
    for line in sys.stdin.buffer:
        limit(len(line))
        template, result = answer(template, json.loads(line))
        if resource is not None:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(result).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
