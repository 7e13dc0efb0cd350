"""The page in a real browser: every tab, mouse and keyboard, hostile texts, wide and narrow."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from runtime.api.service import Service
from tests.helpers.browser import NARROW, TABS, WIDE, Visit
from tests.helpers.tiny_score import mixed_rows, write_jsonl

pytestmark = pytest.mark.slow
ATTACK = (
    "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"> ${document.title='run'} {{7*7}}"
)


@pytest.fixture
def visit(chromium, page_url) -> Iterator[Visit]:
    with Visit(chromium, page_url) as visit:
        yield visit.ready()
        assert not visit.errors
        assert visit.hosts == {"127.0.0.1"}  # no tab made a request to another host


def stale(visit: Visit) -> bool:
    return visit.page.locator("#compare-result.stale .stale-note").is_visible()


# ---- layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_every_tab_holds_at_every_size(chromium, page_url, size, scheme):
    """Nothing is wider than the window, and every tab shows its content."""
    with Visit(chromium, page_url, size, scheme) as visit:
        visit.ready().conversation()
        visit.compare()
        for tab, text in zip(
            TABS, ("Response A", "Responses", "Score the file", "Metrics", "This process"), strict=True
        ):
            visit.tab(tab)
            visit.page.get_by_text(text, exact=True).first.wait_for()
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= size[0]
            dark = visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
            assert dark == (scheme == "dark")
        assert not visit.errors and visit.hosts == {"127.0.0.1"}


# ---- compare ----------------------------------------------------------------------------------------------


def test_scores_of_both_responses_by_every_model(visit, page_service):
    visit.conversation("the question", "yes", "no, early")
    result = visit.compare()
    assert result.get_by_role("heading").inner_text() in ("A is preferred", "B is preferred", "Too close to call")
    shown = result.locator("table data").evaluate_all("all => all.map(each => Number(each.value))")
    for model in page_service.models.values():
        score = model.scorer.score(
            [[{"role": "user", "content": "the question"}, {"role": "assistant", "content": "yes"}]]
        ).item()
        assert min(abs(value - score) for value in shown) < 1e-5


def test_edits_mark_the_result_stale_and_comparing_again_does_not(visit):
    visit.conversation()
    visit.compare()
    assert not stale(visit)
    visit.page.get_by_label("Response B").press_sequentially("!")
    assert stale(visit)
    visit.compare()
    assert not stale(visit)
    for button in ("Swap A and B", "Add a turn"):
        visit.page.get_by_role("button", name=button).click()
        visit.page.locator("#compare-result.stale").wait_for()
        visit.page.get_by_label("Turn 2, assistant").fill("well") if button == "Add a turn" else None
        visit.compare()
        assert not stale(visit)


def test_an_edit_while_it_is_scored_counts(visit, page_service, monkeypatch):
    """The result belongs to the submitted inputs, which have changed since."""
    model = page_service.get(None)
    score = model.score
    monkeypatch.setattr(model, "score", lambda rendered: (time.sleep(1.0), score(rendered))[1])
    visit.conversation()
    visit.page.locator("#compare-run").click()
    visit.page.get_by_label("Response A").press_sequentially("x")
    visit.result("compare")
    visit.page.locator("#compare-result.stale").wait_for()


def test_turns_are_added_and_removed_with_their_texts(visit):
    visit.fill("Turn 1, user", "first")
    visit.page.get_by_role("button", name="Add a turn").click()
    visit.fill("Turn 2, assistant", "second")
    visit.page.get_by_role("button", name="Add a turn").click()
    visit.fill("Turn 3, user", "third")
    visit.page.get_by_role("button", name="Remove turn 1").click()
    visit.page.get_by_label("Turn 1, assistant").wait_for()
    assert visit.page.get_by_label("Turn 1, assistant").input_value() == "second"
    assert visit.page.get_by_label("Turn 2, user").input_value() == "third"


def test_swap_clear_and_examples(visit):
    visit.conversation(a="one", b="two")
    visit.page.get_by_role("button", name="Swap A and B").click()
    visit.page.wait_for_function("document.querySelector('.side-a textarea').value === 'two'")
    visit.page.get_by_label("Start from an example").click()
    visit.page.get_by_role("option", name="Change of plan (multi-turn)").click()
    visit.page.get_by_label("Turn 3, user").wait_for()
    assert "vegetarian" in visit.page.get_by_label("Turn 3, user").input_value()
    visit.page.get_by_role("button", name="Clear", exact=True).locator("visible=true").click()
    visit.page.get_by_label("Turn 3, user").wait_for(state="detached")
    assert visit.page.get_by_label("Response A").input_value() == ""


def test_a_link_is_made_on_demand_and_gives_the_inputs_back(visit, page_url):
    visit.conversation("Straße, 北?", "yes & <no>", "maybe")
    visit.compare()
    assert "#" not in visit.page.url
    visit.page.get_by_role("button", name="Copy link").click()
    visit.page.locator("#compare-status:not(:empty)").wait_for()
    link = visit.page.url
    assert link.startswith(f"{page_url}#compare=") and "Stra" not in link
    visit.page.goto("about:blank")
    visit.open(link)
    visit.page.wait_for_function("document.querySelector('.side-a textarea').value === 'yes & <no>'")
    visit.page.wait_for_function("document.querySelector('.turns textarea').value === 'Straße, 北?'")
    visit.page.goto("about:blank")
    visit.open(f"{page_url}#compare=@@@")
    visit.page.get_by_text("cannot be read").first.wait_for()


def test_what_is_asked_while_an_answer_arrives_is_answered(chromium, page_url):
    """Gradio closes its event stream after each answer and loses the next one, so no event may use the stream."""
    with Visit(chromium, page_url) as visit:
        streams: list[str] = []
        visit.page.on("request", lambda request: streams.append(request.url) if "/queue/" in request.url else None)
        visit.open(f"{page_url}?again")  # record all requests of a visit
        visit.ready().conversation()
        visit.page.get_by_role("button", name="Add a turn").click()
        visit.fill("Turn 2, assistant", "well")
        visit.page.get_by_label("Show responses as Markdown").check()
        visit.page.locator(".side-a .prose-body").wait_for()
        visit.compare()
        visit.page.get_by_role("button", name="Clear", exact=True).locator("visible=true").click()
        visit.page.get_by_label("Turn 2, assistant").wait_for(state="detached")
        visit.tab("Best of N")
        visit.fill("Prompt", "the question")
        visit.page.locator("#best-inputs textarea").nth(1).fill("yes\n===\nno")
        visit.page.locator("#best-run").click()
        visit.result("best")
        visit.tab("Model")
        visit.page.get_by_text("This process").wait_for()
        assert not streams and not visit.errors


def test_markdown_is_shown_and_runs_nothing(visit):
    visit.conversation(
        a=f"# Title\n\n- **one**\n\n{ATTACK}\n\n![x](http://192.0.2.1/a.png)", b="[x](javascript:alert(1))"
    )
    visit.page.get_by_label("Show responses as Markdown").check()
    prose = visit.page.locator(".side-a .prose-body")
    prose.locator("h1").wait_for()
    assert prose.locator("strong").inner_text() == "one"
    assert visit.page.locator(".prose-body :is(script, img, iframe)").count() == 0
    assert visit.page.locator(".side-b .prose-body a").count() == 0
    visit.page.get_by_label("Show responses as Markdown").uncheck()
    visit.page.get_by_label("Response A").wait_for()
    assert visit.page.title() == "worldpm-kit"


def test_keyboard_alone(visit):
    """Reach a result and another tab by keyboard; every focused element is visible."""
    page, stops = visit.page, []

    def step() -> str:
        page.keyboard.press("Tab")
        stop = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e), r = e.getBoundingClientRect();"
            "return [e.labels?.[0]?.innerText || e.ariaLabel || e.innerText || '', r.width > 0,"
            "s.outlineStyle !== 'none' || s.boxShadow !== 'none'] }"
        )
        stops.append(stop[0].split("\n")[0])
        assert stop[1] and stop[2], stop
        return stops[-1]

    def to(label: str) -> None:
        for _ in range(20):
            if step().startswith(label):
                return
        raise AssertionError(stops)

    page.locator("body").click(position={"x": 5, "y": 5})
    to("Turn 1, user")
    page.keyboard.type("Is it?")
    to("Response A")
    page.keyboard.type("yes")
    to("Response B")
    page.keyboard.type("no")
    page.keyboard.press("Control+Enter")
    visit.result("compare")
    expected = ["Compare", "Best of N", "Batch", "Parity", "Model", "Start from an example"]
    assert [stop for stop in stops if stop in expected] == expected
    to("Compare")
    page.get_by_role("tab", name="Model").focus()
    page.keyboard.press("Enter")
    page.get_by_text("This process").wait_for()


# ---- hostile texts -----------------------------------------------------------------------------------------


def test_a_script_in_every_text_field_stays_text(visit, tmp_path):
    page = visit.page
    visit.page.get_by_role("button", name="System prompt").click()
    visit.page.get_by_role("button", name="Add a turn").click()
    visit.page.get_by_label("Turn 2, assistant").wait_for()
    for box in page.locator("#tab-compare textarea:visible").all():
        box.fill(ATTACK)
    visit.compare()
    visit.tab("Best of N")
    for box in page.locator("#tab-best textarea:visible").all():
        box.fill(f"{ATTACK}\n===\n{ATTACK} again")
    page.locator("#best-run").click()
    assert "<script>" in visit.result("best").inner_text()
    rows = [{"prompt": ATTACK, "id": ATTACK, "category": ATTACK, "chosen": ATTACK, "rejected": "b"}, {ATTACK: ATTACK}]
    upload(visit, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "<script>" in visit.result("batch").inner_text()
    assert page.locator("main script, main img[src=x]").count() == 0
    assert page.title() == "worldpm-kit"


# ---- the other tabs ---------------------------------------------------------------------------------------


def test_best_of_n_is_ranked_and_goes_stale(visit):
    visit.tab("Best of N")
    visit.fill("Prompt", "the question")
    visit.page.locator("#best-inputs textarea").nth(1).fill("yes\n===\nno\n===\nthe answer is early")
    visit.page.keyboard.press("Control+Enter")
    result = visit.result("best")
    scores = result.locator("data").evaluate_all("all => all.map(each => Number(each.value))")
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    widths = result.locator(".bar span").evaluate_all("all => all.map(each => each.getBoundingClientRect().width)")
    assert widths == sorted(widths, reverse=True) and widths[-1] > 0
    visit.page.keyboard.type("!")
    visit.page.locator("#best-result.stale").wait_for()


def upload(visit: Visit, path) -> None:
    visit.upload(path)
    visit.page.locator("#batch-run:enabled").click()


def test_a_batch_is_scored_sorted_and_downloaded(visit, tmp_path):
    upload(visit, write_jsonl(tmp_path / "rows.jsonl", mixed_rows(30)))
    result = visit.result("batch")
    assert "of 30 rows scored" in result.get_by_role("heading").first.inner_text()
    result.get_by_role("button", name="margin").click()
    assert result.locator("th[aria-sort=descending]").inner_text().startswith("margin")
    keys = result.locator("tbody tr").evaluate_all("rows => rows.map(row => row.children[1].dataset.sort ?? '')")
    numbers = [float(key) for key in keys if key]
    assert numbers == sorted(numbers, reverse=True) and keys[: len(numbers)] == [key for key in keys if key]
    assert result.locator("tr.bad .fault").first.inner_text().startswith("rows.jsonl:")
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="JSONL").last.click()
    rows = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert len(rows) == 30


def test_cancel_works(visit, page_service, tmp_path, monkeypatch):
    model = page_service.get(None)
    score = model.score
    monkeypatch.setattr(model, "score", lambda rendered: (time.sleep(0.3), score(rendered))[1])
    upload(visit, write_jsonl(tmp_path / "rows.jsonl", mixed_rows(400)))
    visit.page.get_by_text("of 400").wait_for()
    visit.page.locator("#batch-cancel:enabled").click()
    heading = visit.result("batch").get_by_role("heading").first.inner_text()
    assert heading.startswith("Cancelled after")
    assert page_service.batcher.waiting_requests == 0
    visit.page.locator("#batch-run:enabled").wait_for()


@pytest.mark.parametrize("content", [b"PK\x03\x04 no rows", b"\x80\x04\x95 a pickle", b"\xff\xfe\x00", b""])
def test_a_broken_upload_is_answered_and_the_next_one_works(visit, tmp_path, content):
    path = tmp_path / "broken.parquet"
    path.write_bytes(content)
    upload(visit, path)
    assert "cannot be read as Parquet" in visit.result("batch").inner_text()


def test_parity_is_shown_and_measured_again(visit):
    visit.tab("Parity")
    visit.page.get_by_text("Measured at quantization").wait_for()
    visit.page.locator("#parity-check").click()
    visit.page.get_by_text("Measured just now").wait_for()
    visit.page.locator("details.worst summary").first.click()
    assert visit.page.locator("details.worst .text").first.is_visible()
    visit.page.get_by_role("button", name="Show the stored report").click()
    visit.page.get_by_text("Measured at quantization").wait_for()


def test_the_model_tab_counts_what_was_done(visit, page_service):
    visit.conversation()
    visit.compare()
    visit.tab("Model")
    visit.page.get_by_text("resident: all blocks on cpu").first.wait_for()
    count = f"{page_service.get(None).conversations:,}"
    visit.page.locator(".model").first.get_by_text(count, exact=True).first.wait_for()


# ---- waiting and others ------------------------------------------------------------------------------------


def test_the_page_turns_itself_on(chromium, page_models):
    from tests.helpers.page_server import load, serving

    service = Service()
    service.status = "quantizing the demo: block 7 of 30"
    with serving(service) as url, Visit(chromium, url) as visit:
        visit.page.get_by_text("block 7 of 30").wait_for()
        assert visit.page.locator("#compare-run").is_disabled()
        service.status = "loading it"
        visit.page.get_by_text("loading it").wait_for()
        load(service, page_models[:1])
        visit.ready().conversation()
        assert visit.compare().get_by_role("heading").count() >= 1
    service.close()


def test_one_visitor_s_batch_does_not_block_another_s_comparison(
    chromium, visit, page_url, page_service, tmp_path, monkeypatch
):
    model = page_service.get(None)
    score = model.score
    monkeypatch.setattr(model, "score", lambda rendered: (time.sleep(0.1), score(rendered))[1])
    upload(visit, write_jsonl(tmp_path / "rows.jsonl", mixed_rows(2000)))
    visit.page.get_by_text("of 2,000").wait_for()
    with Visit(chromium, page_url) as other:
        other.ready().conversation()
        other.compare()
        assert visit.page.get_by_text("of 2,000").is_visible()  # the batch is still running
    visit.page.locator("#batch-cancel").click()
    visit.result("batch")
