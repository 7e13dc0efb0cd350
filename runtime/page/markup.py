"""HTML of what the page shows, out of templates that escape every text put into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from runtime.templating import templates

_environment = templates(Path(__file__).parent / "templates")


def fill(template: str, **values: Any) -> str:
    """The HTML of one template; `values` are text, never markup."""
    return _environment.get_template(f"{template}.html").render(**values)


def html_block(value: str = "", **arguments: Any) -> gr.HTML:
    """A place for what `fill` gives, styled by the page's own rules alone."""
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **arguments)


def notice(text: object, title: str = "") -> str:
    """What stands in the way of a result, announced at once."""
    return fill("notice", title=title, text=str(text))


def signed(value: float, decimals: int = 3) -> str:
    """`+1.234`, `−0.500`, `0.000`."""
    text = f"{abs(value):.{decimals}f}"
    sign = "" if not float(text) else "+" if value > 0 else "−"
    return sign + text


def percent(share: float) -> str:
    """A probability that is neither 0 nor 1 is not written as if it were."""
    text = f"{100 * share:.0f}"
    if text in ("0", "100") and 0 < share < 1:
        return "under 1 %" if share < 0.5 else "over 99 %"
    return f"{text} %"


def duration(seconds: float) -> str:
    """`0.42 s`, `12 s`, `3 min 20 s`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


_environment.filters |= {"signed": signed, "percent": percent, "duration": duration}
