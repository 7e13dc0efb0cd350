"""A visitor with a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
TABS = ("Compare", "Best of N", "Batch", "Parity", "Model")
WIDE, NARROW = (1280, 844), (390, 844)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless one; the test is skipped where there is none."""
    if not CHROMIUM:
        pytest.skip("no chromium is installed (apt-get install chromium), so the page is not tested in a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """One visitor, from an empty cache.

    Attributes:
        page: the browser's.
        hosts: of everything that the page asked for.
        faults: of its scripts, and what its console was told as an error.
    """

    def __init__(self, browser: Any, url: str, size: tuple[int, int] = WIDE, scheme: str = "light"):
        self.url = url
        self.hosts: set[str] = set()
        self.faults: list[str] = []
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname or ""))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda line: self.faults.append(line.text) if line.type == "error" else None)

    def __enter__(self) -> Visit:
        self.open(self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.page.get_by_label("Turn 1, user").wait_for()

    def ready(self) -> Visit:
        """Wait until the page knows its models."""
        self.page.locator("#compare-run:enabled").wait_for()
        return self

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()
        self.page.locator(f"#{ {'Best of N': 'tab-best'}.get(name, 'tab-' + name.lower()) }").wait_for()

    def fill(self, label: str, text: str) -> None:
        self.page.get_by_label(label, exact=True).fill(text)

    def conversation(self, prompt: str = "Is it?", a: str = "yes it is", b: str = "no, the thing is not") -> None:
        self.fill("Turn 1, user", prompt)
        self.fill("Response A", a)
        self.fill("Response B", b)

    def compare(self) -> Any:
        """Ask, and wait for the answer to it."""
        self.page.evaluate("document.querySelector('#compare-result .result')?.remove()")
        self.page.locator("#compare-run").click()
        return self.result("compare")

    def upload(self, path: Path) -> None:
        """Choose a file in the batch tab, and wait until the server has it."""
        self.tab("Batch")
        chosen = self.page.locator("#batch-inputs .file-preview")
        for _ in range(2):  # a driver can be faster than the page's scripts, and nobody listens yet
            self.page.locator("#batch-inputs input[type=file]").set_input_files(path)
            with suppress(Exception):
                return chosen.wait_for(timeout=7_000)
        chosen.wait_for()

    def result(self, tab: str) -> Any:
        found = self.page.locator(f"#{tab}-result").locator(".result:not(.progress), .notice").first
        found.wait_for()
        return found
