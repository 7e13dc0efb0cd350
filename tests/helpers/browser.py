"""Drive the page in headless Chromium."""

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
    """Start headless Chromium; skip the test if it is not installed."""
    if not CHROMIUM:
        pytest.skip("chromium is not installed; run apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """The page open in a new browser context with an empty cache.

    Attributes:
        page: playwright's page.
        hosts: hosts of all requests.
        errors: uncaught script errors and console errors.
    """

    def __init__(self, browser: Any, url: str, size: tuple[int, int] = WIDE, scheme: str = "light"):
        self.url = url
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname or ""))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)

    def __enter__(self) -> Visit:
        self.open(self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.page.get_by_label("Turn 1, user").wait_for()

    def ready(self) -> Visit:
        """Wait until the models are loaded."""
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
        """Click Compare and wait for the new result."""
        self.page.evaluate("document.querySelector('#compare-result .result')?.remove()")
        self.page.locator("#compare-run").click()
        return self.result("compare")

    def upload(self, path: Path) -> None:
        """Select a file in the Batch tab and wait until it is uploaded."""
        self.tab("Batch")
        chosen = self.page.locator("#batch-inputs .file-preview")
        for _ in range(2):  # the first attempt can come before the page's scripts listen
            self.page.locator("#batch-inputs input[type=file]").set_input_files(path)
            with suppress(Exception):
                return chosen.wait_for(timeout=7_000)
        chosen.wait_for()

    def result(self, tab: str) -> Any:
        found = self.page.locator(f"#{tab}-result").locator(".result:not(.progress), .notice").first
        found.wait_for()
        return found
