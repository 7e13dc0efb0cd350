"""A checkpoint's chat template, evaluated in a process of its own (see `template_worker.py`)."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.common.errors import CheckpointError, ConversationError, brief
from runtime.common.json_object import read_json_object
from runtime.conversations.template_worker import CPU_SECONDS

WORKER = Path(__file__).with_name("template_worker.py")
WALL_SECONDS = 120.0  # for a worker that waits for a busy machine; the worker itself counts processor time
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """Renders messages with a template.

    Attributes:
        source: the template's text.
        variables: of the template, such as `bos_token`.
    """

    def __init__(self, source: str, variables: Mapping[str, str] | None = None, where: str = "chat template") -> None:
        """
        Args:
            where: names the checkpoint in errors.

        Raises:
            CheckpointError: the template does not compile.
        """
        self.source, self.variables = source, dict(variables or {})
        self._worker = _worker_of(source, tuple(sorted(self.variables.items())))
        try:
            self._worker.check()
        except _TemplateFailure as error:
            raise CheckpointError(f"{where}: the chat template does not compile: {error}") from error

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate:
        """Read `chat_template.jinja`, or the template in `tokenizer_config.json` or `chat_template.json`.

        Raises:
            CheckpointError: none exists, or one is damaged.
        """
        config = _read_if_there(directory / "tokenizer_config.json")
        tokens = _read_if_there(directory / "special_tokens_map.json") | config
        variables = {name: text for name in SPECIAL_TOKENS if (text := _token_text(tokens.get(name))) is not None}
        file = directory / "chat_template.jinja"
        if not file.is_file():
            return cls(_configured_template(config, directory), variables, str(directory))
        try:
            return cls(file.read_text(encoding="utf-8"), variables, str(directory))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}; copy it from the original checkpoint.") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render a conversation, without a prompt for a further response.

        Raises:
            ConversationError: the template rejects the conversation, fails on it, or takes too much time or memory.
        """
        try:
            return self._worker.ask({"messages": [*messages]})
        except _TemplateFailure as error:
            verb = "rejects" if error.refused else "fails on"
            raise ConversationError(f"the chat template {verb} this conversation: {error}") from error


def _token_text(token: Any) -> str | None:
    """Special tokens are stored as text, or as objects with their `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.exists() else {}


def _configured_template(config: dict[str, Any], directory: Path) -> str:
    """The template in tokenizer_config.json, else the one in chat_template.json; of several, the default one."""
    config_file = directory / "tokenizer_config.json"
    template = config.get("chat_template")
    if template is None:
        template = _read_if_there(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {str(each.get("name")): each.get("template") for each in template if isinstance(each, dict)}
        if named and "default" not in named:
            raise CheckpointError(
                f"{config_file} has chat templates named {brief(', '.join(named))}, and none named default; save the "
                "one that the model was trained with as chat_template.jinja."
            )
        template = named.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{config_file} has no chat_template, and chat_template.jinja is missing; copy it from the original "
            "checkpoint."
        )
    return template


class _TemplateFailure(Exception):
    """Why a template did not give a text; `refused` if it says so itself."""

    def __init__(self, reason: str, refused: bool = False) -> None:
        printable = "".join(character if character.isprintable() else " " for character in reason)
        super().__init__(printable if len(printable) <= 300 else printable[:300] + "...")
        self.refused = refused


class _Worker:
    """The process of one template, started at its first use, and again after its end."""

    def __init__(self, opening: dict[str, Any]) -> None:
        """`opening` is the first request."""
        self._opening = opening
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it; a forked child must not read its answers

    def check(self) -> None:
        """Compile the template."""
        with self._lock:
            self._running()

    def ask(self, request: dict[str, Any]) -> str:
        """Return the text for a request."""
        with self._lock:
            return self._exchange(self._running(), request)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._forget()
        process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER), *_library_directories()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this process
        )
        self._process, self._owner = process, os.getpid()
        self._finalizer = weakref.finalize(self, _stop, process, self._owner)
        try:
            self._exchange(process, self._opening)
        except _TemplateFailure:  # it has no template to answer with
            self._forget()
            raise
        return process

    def _forget(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._finalizer()
        self._process = None

    def _exchange(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> str:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process.stdout.fileno())
        except BrokenPipeError:
            line = b""
        except BaseException:  # such as Ctrl-C: the answer must not be taken for that to the next request
            self._end(process)
            raise
        if not line:
            raise _TemplateFailure(_why_ended(self._end(process)))
        result = json.loads(line)
        if "text" not in result:
            raise _TemplateFailure(result["reason"], result["refused"])
        return str(result["text"])

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        """Return the exit status of a process that ended by itself, or is ended here."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        self._forget()
        return process.returncode


@lru_cache(maxsize=8)
def _worker_of(source: str, variables: tuple[tuple[str, str], ...]) -> _Worker:
    """The worker of a template, which all its renderers share."""
    return _Worker({"template": source, "variables": dict(variables)})


def _read_line(file: int) -> bytes:
    """Read up to the end of a line; empty if the process ended or did not answer within `WALL_SECONDS`."""
    deadline = time.monotonic() + WALL_SECONDS
    pieces: list[bytes] = []
    poll = select.poll()  # select() takes no file above number 1023
    poll.register(file, select.POLLIN)
    while not pieces or not pieces[-1].endswith(b"\n"):
        if not poll.poll(1000 * max(deadline - time.monotonic(), 0)) or not (piece := os.read(file, 1 << 16)):
            return b""
        pieces.append(piece)
    return b"".join(pieces)


@cache
def _library_directories() -> list[str]:
    """Where the worker finds jinja2 and what it needs: `-I` hides the user's site and PYTHONPATH."""
    specs = [find_spec(name) for name in ("jinja2", "markupsafe")]
    return [str(Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin]


def _why_ended(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"it takes more than {CPU_SECONDS:g} s of processor time"
    return f"its process ended with {f'signal {-status}' if status < 0 else f'status {status}'}"


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not flushed is for nobody
                pipe.close()
