"""Command-line options of `python app.py`."""

from __future__ import annotations

import pytest

from runtime.api.options import Limits, is_loopback, parse
from runtime.common.errors import ConfigurationError
from runtime.options import ModelOptions


def test_defaults():
    options = parse([])
    assert (options.host, options.port, options.models, options.insecure) == ("127.0.0.1", 7860, (), False)
    assert options.show_page and not options.log_text
    assert (options.limits, options.model_options) == (Limits(), ModelOptions())
    assert "localhost" in (options.host_names() or ())


def test_flags_reach_their_options():
    argv = "--max-body 1 --max-conversations 2 --max-tokens 3 --max-turns 4 --body-seconds 5 --queue-tokens 6 --stream"
    options = parse([*argv.split(), "--no-page", "--log-text", "--cors-origin", "https://example.org"])
    assert options.limits == Limits(body_bytes=1, conversations=2, tokens=3, turns=4, body_seconds=5.0)
    assert options.queue_tokens == 6 and options.model_options.stream
    assert not options.show_page and options.log_text and options.cors_origins == ("https://example.org",)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3", "::1"])
def test_loopback_hosts_need_no_key(host: str):
    assert is_loopback(host)
    assert parse(["--host", host]).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "no such host", "x" * 300])
def test_other_hosts_need_a_key_or_insecure(host: str):
    with pytest.raises(ConfigurationError, match="the server has no key; add --api-key-file FILE, or --insecure"):
        parse(["--host", host])
    assert parse(["--host", host, "--api-key-file", "key"]).host == host
    assert parse(["--host", host, "--insecure"]).host_names() is None


def test_allowed_hosts_are_added():
    assert "rewards.example" in (parse(["--allowed-host", "rewards.example"]).host_names() or ())


def test_several_models():
    assert parse(["--model", "a", "--model", "b"]).models == ("a", "b")


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
def test_invalid_values_are_rejected_by_flag(options: list[str]):
    with pytest.raises(ConfigurationError, match=options[0]):
        parse(options)
