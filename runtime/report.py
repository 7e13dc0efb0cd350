"""A parity report as a page for people and as JUnit XML for build servers."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from runtime import charts, summary
from runtime.files import write_whole
from runtime.parity_report import BlockError, ParityReport
from runtime.templating import templates

JSON_FILE, HTML_FILE, JUNIT_FILE = "parity.json", "parity.html", "parity.junit.xml"

_TEMPLATES = Path(__file__).parent / "templates"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_html(report: ParityReport) -> str:
    """One self-contained page: no script, nothing fetched, every text of the report escaped."""
    return _render("parity.html", report, unfolded=True)


def render_sections(report: ParityReport) -> str:
    """What that page says, its worst pairs folded, for another page to show under `templates/parity.css`."""
    return _render("sections.html", report, unfolded=False)


def _render(template: str, report: ParityReport, *, unfolded: bool) -> str:
    page = templates(_TEMPLATES).get_template(template)
    return page.render(
        report=report,
        unfolded=unfolded,
        charts=charts,
        summary=summary,
        number=summary.number,
        verdict=summary.verdict(report),
        columns=summary.columns(report),
        linears=linear_layers(report.block_errors),
    )


def linear_layers(errors: list[BlockError]) -> list[tuple[str, float, float, int]]:
    """(name, median SQNR, lowest SQNR, its block) of each kind of linear layer, weakest first; in dB."""
    ratios: dict[str, list[tuple[float, int]]] = {}
    for error in errors:
        for name, ratio in error.sqnr.items():
            if ratio is not None:
                ratios.setdefault(name, []).append((ratio, error.block))
    rows = [(name, sorted(found)[len(found) // 2][0], *min(found)) for name, found in ratios.items()]
    return sorted(rows, key=lambda row: row[2])


def render_junit(report: ParityReport) -> str:
    """One test case for each threshold, failed where it is missed, and one for each category to read."""
    missed = sum(not threshold.met for threshold in report.thresholds)
    cases = len(report.thresholds) + len(report.by_category)
    suite = ElementTree.Element(
        "testsuite", name="worldpm-parity", tests=str(cases), failures=str(missed), errors="0", skipped="0"
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in report.subject.model_dump(exclude={"settings"}).items():
        ElementTree.SubElement(properties, "property", name=name, value=_xml(str(value)))
    for threshold in report.thresholds:
        case = ElementTree.SubElement(suite, "testcase", classname="parity.thresholds", name=threshold.name)
        sentence = summary.describe_threshold(threshold)
        if not threshold.met:
            ElementTree.SubElement(case, "failure", type="ThresholdMissed", message=sentence).text = sentence
    for group in report.by_category:
        case = ElementTree.SubElement(suite, "testcase", classname="parity.categories", name=_xml(group.name))
        ElementTree.SubElement(case, "system-out").text = (
            f"{summary.count(group.pairs, 'pair')}, {summary.count(group.flips, 'flip')}, "
            f"agreement {summary.number(group.agreement.value)}, "
            f"mean shift {summary.number(group.mean_shift, 'shift')} sd"
        )
    suites = ElementTree.Element("testsuites", name="worldpm-parity", tests=str(cases), failures=str(missed))
    suites.append(suite)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def write_report(report: ParityReport, directory: str | Path) -> list[Path]:
    """Write parity.json, parity.html and parity.junit.xml into `directory`, made if missing; their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contents = {JSON_FILE: report.to_json(), HTML_FILE: render_html(report), JUNIT_FILE: render_junit(report)}
    for name, content in contents.items():
        write_whole(directory / name, content)
    return [directory / name for name in contents]


def _xml(text: str) -> str:
    """`text` without the characters that XML 1.0 cannot hold, even escaped."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
