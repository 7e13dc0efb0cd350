"""HTML for the page: templates that escape every value, and Markdown rendered without active content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from runtime.common.html_templates import templates
from runtime.page.formatting import duration, percent, signed

# HTML in the source stays text, so the output has no tags other than those of the renderer.
# Images would be requests to other hosts; with the rule disabled they become links.
_markdown = MarkdownIt("commonmark", {"html": False}).enable("table").enable("strikethrough")
_markdown.disable("image")

_environment = templates(Path(__file__).parent / "templates")
_environment.filters |= {"signed": signed, "percent": percent, "duration": duration}


def markdown_to_html(text: str) -> str:
    """Render Markdown as HTML; links open in a new tab and send no referrer."""
    tokens = _markdown.parse(text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "link_open":
                child.attrs |= {"rel": "noopener noreferrer nofollow", "target": "_blank"}
    return str(_markdown.renderer.render(tokens, _markdown.options, {}))


def render_template(template: str, **values: Any) -> str:
    """Render `templates/{template}.html`; every value is escaped."""
    return _environment.get_template(f"{template}.html").render(**values)


def notice(text: object, title: str = "") -> str:
    """Render an error or hint that is shown in place of a result; screen readers announce it at once."""
    return render_template("notice", title=title, text=str(text))
