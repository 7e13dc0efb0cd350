"""axe-core on every tab, empty and with a result, light and dark, wide and narrow."""

from __future__ import annotations

import pytest

from tests.helpers.browser import NARROW, TABS, WIDE, Visit
from tests.helpers.tiny_score import mixed_rows, write_jsonl

pytestmark = pytest.mark.slow


def violations(page) -> list[str]:
    """The serious and critical violations, one line each."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page).response
    assert len(found["passes"]) > 10  # axe has run
    return [
        f"{violation['id']} ({violation['impact']}): {node['html'][:200]}"
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_no_tab_has_a_serious_violation(chromium, page_url, tmp_path, size, scheme):
    with Visit(chromium, page_url, size, scheme) as visit:
        page, found = visit.page, {}
        visit.ready()
        for tab in TABS:
            visit.tab(tab)
            found[tab] = violations(page)

        visit.tab("Compare")
        visit.conversation()
        visit.compare()
        found["a comparison"] = violations(page)
        page.get_by_label("Response A").press_sequentially("!")
        page.locator("#compare-result.stale").wait_for()
        found["a stale one"] = violations(page)
        page.get_by_label("Show responses as Markdown").check()
        page.locator(".side-a .prose-body p").wait_for()
        found["markdown"] = violations(page)

        visit.tab("Best of N")
        visit.fill("Prompt", "the question")
        page.locator("#best-inputs textarea").nth(1).fill("yes\n===\nno")
        page.locator("#best-run").click()
        visit.result("best")
        found["a ranking"] = violations(page)

        visit.tab("Batch")
        page.get_by_text("What a row looks like").click()
        visit.upload(write_jsonl(tmp_path / "rows.jsonl", mixed_rows(20)))
        page.locator("#batch-run").click()
        visit.result("batch")
        found["a batch"] = violations(page)

        visit.tab("Parity")
        page.locator("details.worst summary").first.click()
        found["a pair in full"] = violations(page)
        assert not {where: lines for where, lines in found.items() if lines}
