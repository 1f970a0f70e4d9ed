"""The documentation of the HTTP interface as one page that needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#23262d;background:#fbfaf8}
code,pre{font:13px/1.5 ui-monospace,monospace;background:#efece7;border-radius:5px}
code{padding:.1em .3em}pre{padding:.8em 1em;overflow:auto}
h2{margin-top:2.2em;font-size:1.05rem}h2 b{color:#9a4a1e;margin-right:.5em}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;
padding:.25em .8em .25em 0;border-bottom:1px solid #e3ded6}
@media(prefers-color-scheme:dark){body{color:#dcdad5;background:#17181b}
code,pre{background:#26282d}td,th{border-color:#34363c}h2 b{color:#e59a6a}}
"""
_CURL = """curl -s -X POST localhost:6006/api/generate -H 'Content-Type: application/json' \\
  -H 'Accept: image/png' -d '{"prompt": "a neon elephant", "seed": 0}' -o picture.png"""


def docs_page(schema: Mapping[str, Any]) -> str:
    """Write an OpenAPI document as HTML.

    Args:
        schema: The document.

    Returns:
        The page.
    """
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>AutoLoRA HTTP API</title>',
        f"<style>{_STYLE}</style><h1>AutoLoRA HTTP API</h1>",
        "<p>JSON in, JSON out. What is wrong is answered with status 4xx and one sentence as "
        '<code>{"error": "..."}</code>. With a password, send it as HTTP Basic authentication. '
        'The same as an OpenAPI document: <a href="api/openapi.json">api/openapi.json</a>.</p>',
        f"<pre>{escape(_CURL)}</pre>",
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts += _operation(schema, path, method, operation)
    return "\n".join(parts) + "</html>"


def _operation(
    schema: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]
) -> Iterator[str]:
    yield f"<h2><b>{escape(method.upper())}</b><code>{escape(path)}</code></h2>"
    yield f"<p>{_prose(operation.get('description', ''))}</p>"
    rows = [
        (
            parameter["name"],
            f"in the {parameter['in']}",
            _type(parameter["schema"]),
            parameter.get("description") or parameter["schema"].get("description", ""),
        )
        for parameter in operation.get("parameters", ())
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        rows += _body_rows(schema, kind, content.get("schema", {}))
    if rows:
        yield "<table><tr><th>Name<th>Where<th>Type<th>What</tr>"
        for row in rows:
            yield "<tr>" + "".join(f"<td>{_prose(cell)}" for cell in row) + "</tr>"
        yield "</table>"


def _body_rows(
    schema: Mapping[str, Any], kind: str, body: Mapping[str, Any]
) -> list[tuple[str, str, str, str]]:
    model = _resolve(schema, body)
    if "properties" not in model:
        return [("the body", kind, _type(model), "")]
    required = set(model.get("required", ()))
    return [
        (
            name + ("" if name in required else " (optional)"),
            kind,
            _type(field),
            str(field.get("description", "")),
        )
        for name, field in model["properties"].items()
    ]


def _resolve(schema: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = part.get("$ref", "")
    if not reference:
        return part
    return schema["components"]["schemas"][reference.rsplit("/", 1)[-1]]


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(choice) for choice in field["anyOf"])
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1]
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("format") or field.get("type", "anything"))


def _prose(text: str) -> str:
    """Escape a text; what stands in backquotes is code."""
    pieces = escape(text).split("`")
    return "".join(
        f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces)
    ).replace("\n\n", "<p>")
