"""Rendering runs outside the event loop's thread, and is limited."""

from __future__ import annotations

import asyncio
import threading

import pytest

from runtime.page import tokenizing
from runtime.page.tabs.best_of_n import show_ranking
from runtime.page.tabs.compare import show_comparison

USER = [{"role": "user", "content": "the question"}]


def compared(service) -> str:
    return asyncio.run(show_comparison(service, "", USER, ("yes", "no")))


def ranked(service) -> str:
    return asyncio.run(show_ranking(service, None, "the question", "yes\n===\nno"))


@pytest.mark.parametrize("show", [compared, ranked])
def test_the_event_loop_s_thread_renders_nothing(page_service, monkeypatch, show):
    kind, threads = type(page_service.get(None).scorer.renderer), []
    render = kind.render

    def watched(*arguments, **options):
        threads.append(threading.get_ident())
        return render(*arguments, **options)

    monkeypatch.setattr(kind, "render", watched)
    assert 'role="alert"' not in show(page_service)
    assert threads and threading.get_ident() not in threads


@pytest.mark.parametrize("show", [compared, ranked])
def test_more_tokens_than_a_request_may_have_are_refused(page_service, monkeypatch, show):
    monkeypatch.setattr(tokenizing, "MAX_TOKENS", 20)
    for model in page_service.models.values():
        monkeypatch.setattr(model, "submit", lambda rendered: pytest.fail("was queued"))
    html = show(page_service)
    assert 'role="alert"' in html and "tokens; the limit is 20" in html
