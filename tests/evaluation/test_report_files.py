"""The HTML page and the JUnit file: well-formed, escaped, self-contained, reproducible."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from runtime.evaluation.breakdowns import BenchmarkAccuracy, BenchmarkSection
from runtime.evaluation.charts import Axis, block_chart, margin_scatter, score_scatter
from runtime.evaluation.comparison import measure_parity
from runtime.evaluation.metrics import Estimate
from runtime.evaluation.report import BlockError, ParityReport, Subject, Thresholds, read_report
from runtime.evaluation.report_files import render_html, render_junit, write_report
from runtime.evaluation.scored_pair import ScoredPairWithTexts

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;]]>"
VOID = {"meta", "br"}


def subject(text: str = "tiny") -> Subject:
    return Subject(
        model=text,
        method=text,
        bits=4,
        bits_per_weight=4.25,
        reference_dtype=text,
        kit_version=text,
        settings={text: text, "nested": {text: [text, None]}, "desc_act": False},
    )


def make_report(pairs: int = 12, text: str = "words", *, whole: bool = True, **limits: float) -> ParityReport:
    generator = np.random.default_rng(1)
    turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [
        ScoredPairWithTexts(
            id=f"{text}{index}",
            category=f"{text}/{index % 3}",
            **{name: [{"role": role, "content": f"{text} {name} {index}"}] for name, role in turns.items()},
            **{
                run: tuple(generator.normal(size=2))
                for run in ("reference", "quantized", *(("noise_floor", "unrepaired") if whole else ()))
            },
        )
        for index in range(pairs)
    ]
    blocks = [
        BlockError(block=index, mean_error=0.01 * index, max_error=0.03 * index, sqnr={text: 20.0 - index})
        for index in range(3)
    ]
    report = measure_parity(
        rows,
        subject(text),
        block_errors=blocks if whole else (),
        repair={text: {text: text}} if whole else None,
        notes=[text] if whole else (),
        thresholds=Thresholds(**limits),
    )
    return report.with_benchmark(benchmark(text)) if whole else report


def benchmark(text: str = "words", accuracy: float = 0.8125) -> BenchmarkAccuracy:
    compared = BenchmarkSection(
        name=text,
        rows=10,
        accuracy=Estimate(value=accuracy, low=0.5, high=0.9),
        published=0.9888,
        reference_accuracy=0.75,
        flips=3,
        p_value=0.0213,
    )
    alone = BenchmarkSection(name="Ties", rows=7, accuracy=Estimate(value=0.25))
    return BenchmarkAccuracy(title=text, reference=text, sections=[compared, alone])


class Page(HTMLParser):
    """Collects tags, attributes, ids, visible text, and whether every tag is closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    "report",
    [
        make_report(),
        make_report(whole=False),
        make_report(1),
        make_report(1, whole=False),
        make_report(40, min_agreement=0.99, max_shift=0.1),
    ],
    ids=["whole", "bare", "one pair", "one bare pair", "thresholds"],
)
def test_the_page_is_well_formed_and_names_every_id_once(report):
    page = Page(render_html(report))
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for _, a in page.tags if (a.get("href") or "").startswith("#")}
    assert targets <= set(ids)
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower())


def test_constant_scores_render():
    turns = {name: [{"role": "user", "content": "x"}] for name in ("prompt", "chosen", "rejected")}
    flat = ScoredPairWithTexts(id="a", reference=(1, 1), quantized=(1, 1), **turns)
    assert "None: no margin changed." in render_html(measure_parity([flat] * 2, subject()))


def test_the_page_has_no_external_resources_and_no_scripts():
    page = Page(render_html(make_report()))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert (attributes.get("href") or "#").startswith("#")
    style = re.search("<style>(.*)</style>", render_html(make_report()), re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in render_html(make_report())


def test_every_text_is_escaped_and_shown_in_full():
    report = make_report(text=ATTACK, min_agreement=0.99)
    html = render_html(report)
    assert "<script" not in html and "<img" not in html
    page = Page(html)
    for pair in report.worst:
        for turn in (*pair.prompt, *pair.chosen, *pair.rejected):
            assert turn["content"] in page.text
    for shown in (f"{ATTACK}/0", "Parity report of " + ATTACK, f"{ATTACK}, {ATTACK}"):
        assert shown in page.text


def test_text_keeps_its_line_breaks_and_its_direction():
    html = render_html(make_report(text="first\n\n    second مرحبا"))
    assert '<div class="text" dir="auto">first\n\n    second مرحبا prompt' in html
    assert "white-space: pre-wrap" in html


def test_the_page_starts_with_what_was_compared():
    page = Page(render_html(make_report(40)))
    start = page.text[page.text.index("Can this variant") : page.text.index("Compared with the reference")]
    for answer in ("40 preference pairs", "plain bf16", "fp16 parity", "words", "4.25 bits per weight"):
        assert answer in start


def test_a_later_evaluation_replaces_the_one_on_the_same_benchmark():
    report = make_report(whole=False)
    assert "Public benchmarks" not in render_html(report)
    report = report.with_benchmark(benchmark("A", 0.5)).with_benchmark(benchmark("B")).with_benchmark(benchmark("A"))
    assert [each.title for each in report.benchmarks] == ["B", "A"]
    page = Page(render_html(report)).text
    assert "81.2%" in page and "50.0% to 90.0%" in page and "98.9%" in page and "0.021" in page


def test_dark_light_and_print_are_styled():
    html = render_html(make_report())
    assert "prefers-color-scheme: dark" in html and "@media print" in html and "width=device-width" in html


def test_junit_fails_where_a_threshold_is_missed_and_only_there():
    report = make_report(min_agreement=1.0, max_shift=100.0)
    suite = ElementTree.fromstring(render_junit(report)).find("testsuite")
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases if case.find("failure") is not None] == ["min_agreement"]
    assert "at least 100%" in suite.find("testcase/failure").get("message")
    assert (suite.get("tests"), suite.get("failures")) == (str(len(cases)), "1")
    assert len(cases) == 2 + len(report.by_category)


def test_junit_holds_any_text():
    text = ATTACK + "\x00\x0b\ufffe é 日本"
    suite = ElementTree.fromstring(render_junit(make_report(text=text))).find("testsuite")
    names = [case.get("name") for case in suite.findall("testcase")]
    assert names[0] == ATTACK + "\ufffd\ufffd\ufffd é 日本/0"


def test_writing_twice_gives_the_same_bytes(tmp_path):
    first, second = write_report(make_report(), tmp_path / "a"), write_report(make_report(), tmp_path / "b")
    assert [path.name for path in first] == ["parity.json", "parity.html", "parity.junit.xml"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert read_report(first[0]) == make_report()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(path.name for path in first)


@pytest.mark.parametrize(("low", "high"), [(-2.9, 3.1), (0, 1), (0.013, 0.014), (-1200, 5), (1e-7, 9e-7)])
def test_ticks_are_round_inside_and_true(low, high):
    axis = Axis(low, high, 0, 1000)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 12
    assert len({label for _, label in ticks}) == len(ticks)
    for at, label in ticks:
        assert -0.01 <= at <= 1000.01
        assert axis.at(float(label.replace("−", "-"))) == pytest.approx(at, abs=0.02)


def dots(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"M(\S+) (\S+?)h0", path)]


def test_scatter_plots_show_every_point_on_equal_axes():
    report = make_report(30)
    plot = score_scatter(report)
    assert plot.x.end - plot.x.start == plot.y.start - plot.y.end
    assert {name: len(dots(path)) for name, path in plot.layers} == {"unrepaired": 60, "quantized": 60}
    x, y = dots(dict(plot.layers)["quantized"])[0]
    assert (x, y) == pytest.approx(
        (plot.x.at(report.scores[0].reference[0]), plot.y.at(report.scores[0].quantized[0])), abs=0.01
    )
    margins = margin_scatter(report)
    assert len(margins.marks) == sum(not pair.agrees for pair in report.scores)
    assert len(dots(dict(margins.layers)["quantized"])) + len(margins.marks) == 30
    assert [mark.link for mark in margins.marks if mark.link]


def test_the_block_chart_starts_at_zero_and_holds_the_largest_error():
    for errors in ([0.0], [0.02], [0.1, 0.5, 0.3]):
        chart = block_chart([BlockError(block=i, mean_error=e / 2, max_error=e) for i, e in enumerate(errors)])
        assert chart.y.low == 0 and chart.y.high >= max(errors)
        assert chart.x_ticks
    assert block_chart([]) is None
