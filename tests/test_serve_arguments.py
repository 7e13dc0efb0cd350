from __future__ import annotations

import pytest

from runtime.api.limits import Limits
from runtime.errors import PlanError
from runtime.serve import hosts_of
from runtime.serve_arguments import is_loopback, limits_of, parse


def test_defaults():
    arguments = parse([])
    assert (arguments.host, arguments.port, arguments.model, arguments.insecure) == ("127.0.0.1", 7860, None, False)
    assert limits_of(arguments) == Limits()
    assert "localhost" in hosts_of(arguments)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3", "::1"])
def test_this_machine_needs_no_key(host: str):
    assert is_loopback(host)
    assert parse(["--host", host]).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "no such host", "x" * 300])
def test_others_do(host: str):
    with pytest.raises(PlanError, match="asks for no key; give it one with --api-key-file, or say --insecure"):
        parse(["--host", host])
    assert parse(["--host", host, "--api-key-file", "key"]).host == host
    assert hosts_of(parse(["--host", host, "--insecure"])) is None


def test_names_are_added():
    assert "rewards.example" in hosts_of(parse(["--allowed-host", "rewards.example"]))


def test_several_models():
    assert parse(["--model", "a", "--model", "b"]).model == ["a", "b"]


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "70000"],
        ["--queue-tokens", "0"],
        ["--max-body", "-1"],
        ["--body-seconds", "0"],
        ["--cors-origin", "*"],
        ["--cors-origin", "https://example.org/path"],
        ["--token-budget", "0"],
    ],
)
def test_values_that_cannot_be(options: list[str]):
    with pytest.raises(PlanError, match=options[0]):
        parse(options)
