"""Markdown of a response: readable, and nothing in it that runs or is fetched."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.page.markup import markdown_to_html

TAGS = {"p", "a", "em", "strong", "s", "code", "pre", "ul", "ol", "li", "blockquote", "hr", "br", "table", "thead"}
TAGS |= {"tbody", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6"}
ATTRIBUTES = {"href", "title", "rel", "target", "start", "style", "class"}


class Collector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(text: str) -> list[tuple[str, dict[str, str | None]]]:
    collector = Collector()
    collector.feed(markdown_to_html(text))
    return collector.found


def check_harmless(text: str) -> None:
    for tag, attributes in elements(text):
        assert tag in TAGS and set(attributes) <= ATTRIBUTES, (tag, attributes)
        assert not re.match(r"\s*(javascript|vbscript|data|file):", attributes.get("href") or "", re.IGNORECASE)
        assert re.fullmatch(r"(text-align:(left|right|center))?", attributes.get("style") or "")


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![a picture](https://example.com/a.png)",
        "[link](javascript:alert(1)) [other](JaVaScRiPt:alert(1)) <javascript:alert(1)>",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        '```"><script>alert(1)</script>\ncode\n```',
        "[a]: javascript:alert(1)\n\n[a]",
        "<svg><style>*{background:url(https://example.com)}</style></svg>",
        '[x](https://example.com "\\" onmouseover=alert(1)")',
    ],
)
def test_nothing_runs_and_nothing_is_fetched(text):
    check_harmless(text)


@given(st.text(alphabet="<>[]()!\"'`*_#|-=:/\\&; \naescriptonjv{}$", max_size=80))
def test_no_text_makes_other_elements(text):
    check_harmless(text)


def test_what_it_is_for():
    html = markdown_to_html("# Title\n\nA **bold** word, a list:\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    assert [tag in html for tag in ("<h1>", "<strong>", "<ul>", "<table>")] == [True] * 4


def test_links_open_elsewhere_and_tell_nothing():
    (_, link), *_ = [found for found in elements("see [this](https://example.com)") if found[0] == "a"]
    assert link == {"href": "https://example.com", "rel": "noopener noreferrer nofollow", "target": "_blank"}
