"""A response as a reader would see it: Markdown in, HTML out, with nothing in it that runs or is fetched."""

from __future__ import annotations

from markdown_it import MarkdownIt

# Built from tokens, so that markup is only what this writes: HTML in the text stays text, which is safer than
# cleaning it afterwards. A picture would be an outside request, and becomes a link.
_markdown = MarkdownIt("commonmark", {"html": False}).enable("table").enable("strikethrough")
_markdown.disable("image")


def to_html(text: str) -> str:
    """HTML of some Markdown; links open elsewhere and do not say where they were followed from."""
    tokens = _markdown.parse(text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "link_open":
                child.attrs |= {"rel": "noopener noreferrer nofollow", "target": "_blank"}
    return str(_markdown.renderer.render(tokens, _markdown.options, {}))
