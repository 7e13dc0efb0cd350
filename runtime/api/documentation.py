"""The OpenAPI document as a page that asks nothing of anybody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from runtime.templating import templates

_TEMPLATES = Path(__file__).parent.parent / "templates"


def add_documentation(api: FastAPI) -> None:
    """Serve `/docs`."""
    template = templates(_TEMPLATES).get_template("api.html")

    @api.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(template.render(document=api.openapi(), endpoints=_endpoints(api.openapi())))


def _endpoints(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page says of each endpoint."""
    return [
        {
            "method": method.upper(),
            "path": path,
            "summary": operation.get("summary", ""),
            "description": operation.get("description", ""),
            "parameters": operation.get("parameters", []),
            "request": _schema_text(operation.get("requestBody", {}).get("content", {}), document),
            "answer": _schema_text(operation["responses"].get("200", {}).get("content", {}), document),
            "faults": {code: each["description"] for code, each in operation["responses"].items() if code != "200"},
        }
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]


def _schema_text(content: dict[str, Any], document: dict[str, Any]) -> str:
    """A body's schema, and those of its parts, as JSON; empty where there is no JSON body."""
    schema = content.get("application/json", {}).get("schema")
    if not schema:
        return ""
    named = {name: document["components"]["schemas"][name] for name in _references(schema, document, set())}
    return json.dumps(schema if not named else {"schema": schema, **named}, indent=2)


def _references(node: Any, document: dict[str, Any], seen: set[str]) -> list[str]:
    """Names of the schemas that `node` refers to, in their order."""
    found: list[str] = []
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    reference = node.get("$ref") if isinstance(node, dict) else None
    if isinstance(reference, str) and (name := reference.rpartition("/")[2]) not in seen:
        seen.add(name)
        found += [name, *_references(document["components"]["schemas"][name], document, seen)]
    for part in parts:
        found += _references(part, document, seen)
    return found
