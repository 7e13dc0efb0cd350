"""Signals during a command."""

from __future__ import annotations

import os
import signal
import time

import pytest

from runtime.common.command import STOPPED, run_command


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_that_a_library_turns_into_an_error_is_an_interrupt(number, capfd):
    def run(options, console):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt as interrupt:
            raise ValueError("could not determine the shape") from interrupt  # as safetensors does

    assert run_command(lambda argv: None, run, lambda _: "run again with --resume.", []) == STOPPED
    assert capfd.readouterr().err == "stopped; run again with --resume.\n"


def test_an_interrupt_in_a_destructor_is_not_lost(capfd):
    """Python drops what is raised in a `__del__`, and prints a traceback."""

    class Lock:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))  # time for the handler

    def run(options, console):
        Lock()
        time.sleep(30)
        return 0

    start = time.monotonic()
    assert run_command(lambda argv: None, run, lambda _: "run again.", []) == STOPPED
    assert time.monotonic() - start < 20
    assert capfd.readouterr().err == "stopped; run again.\n"


def test_other_errors_in_a_destructor_are_reported_as_ever(monkeypatch):
    reported = []
    monkeypatch.setattr("sys.unraisablehook", lambda each: reported.append(each.exc_type))

    class Broken:
        def __del__(self):
            raise ValueError("a fault")

    def run(options, console):
        Broken()
        return 0

    assert run_command(lambda argv: None, run, lambda _: "", []) == 0
    assert reported == [ValueError]


def test_an_error_without_an_interrupt_keeps_its_traceback():
    def run(options, console):
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        run_command(lambda argv: None, run, lambda _: "", [])


def test_an_ignored_ctrl_c_stays_ignored(capfd):
    """As under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(options, console):
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    assert run_command(lambda argv: None, run, lambda _: "", []) == 0
