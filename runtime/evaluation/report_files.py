"""Write a parity report as JSON, as an HTML page and as JUnit XML for CI servers."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from runtime.common.files import write_file_atomically
from runtime.common.html_templates import templates
from runtime.evaluation import charts
from runtime.evaluation import verdict as summary
from runtime.evaluation.report import JSON_FILE, BlockError, ParityReport

HTML_FILE, JUNIT_FILE = "parity.html", "parity.junit.xml"

_TEMPLATES = Path(__file__).parent / "templates"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_html(report: ParityReport) -> str:
    """The report as one self-contained page, without scripts or external resources; all texts are escaped."""
    return _render("parity.html", report, expanded=True)


def render_sections(report: ParityReport) -> str:
    """The page's sections, with the worst pairs collapsed, for embedding in a page that has `templates/parity.css`."""
    return _render("sections.html", report, expanded=False)


def _render(template: str, report: ParityReport, *, expanded: bool) -> str:
    page = templates(_TEMPLATES).get_template(template)
    return page.render(
        report=report,
        expanded=expanded,
        charts=charts,
        summary=summary,
        format_metric=summary.format_metric,
        verdict=summary.verdict(report),
        metrics_by_source=summary.metrics_by_source(report),
        linear_layers=sqnr_by_linear_layer(report.block_errors),
    )


def sqnr_by_linear_layer(errors: list[BlockError]) -> list[tuple[str, float, float, int]]:
    """(name, median, lowest, block of the lowest) of each linear layer's SQNR over blocks, in dB; lowest first."""
    ratios: dict[str, list[tuple[float, int]]] = {}
    for error in errors:
        for name, ratio in error.sqnr.items():
            if ratio is not None:
                ratios.setdefault(name, []).append((ratio, error.block))
    rows = [(name, sorted(found)[len(found) // 2][0], *min(found)) for name, found in ratios.items()]
    return sorted(rows, key=lambda row: row[2])


def render_junit(report: ParityReport) -> str:
    """JUnit XML: a test case for each threshold, which fails if missed, and an informative one for each category."""
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
            f"{summary.pluralize(group.pairs, 'pair')}, {summary.pluralize(group.flips, 'flip')}, "
            f"agreement {summary.format_metric(group.agreement.value)}, "
            f"mean absolute shift {summary.format_metric(group.mean_shift, 'shift')} sd"
        )
    suites = ElementTree.Element("testsuites", name="worldpm-parity", tests=str(cases), failures=str(missed))
    suites.append(suite)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def write_report(report: ParityReport, directory: str | Path) -> list[Path]:
    """Write parity.json, parity.html and parity.junit.xml into `directory`, which is created; return their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contents = {JSON_FILE: report.to_json(), HTML_FILE: render_html(report), JUNIT_FILE: render_junit(report)}
    for name, content in contents.items():
        write_file_atomically(directory / name, content)
    return [directory / name for name in contents]


def _xml(text: str) -> str:
    """Replace characters that XML 1.0 does not allow, even escaped."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
