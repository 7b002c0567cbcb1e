"""The page itself: plain HTML with its style and its pictures inside, every text escaped."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
td + td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: 0; } svg { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; } details { margin-top: 2rem; }
"""


@dataclass
class Section:
    """A heading and what stands under it; `rows` is a table whose first row is the head, `picture` an SVG."""

    title: str
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""
    picture: str = ""


def page(title: str, record: dict[str, Any], sections: list[Section]) -> str:
    """The whole document. `record` is shown as it is, at the end."""
    body = "\n".join(_section(section) for section in sections)
    load = (
        "import linearize  # or pass trust_remote_code=True\n"
        "from transformers import AutoModelForCausalLM\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")'
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>
<style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
{body}
<h2>How to load it</h2>
<pre>{html.escape(load)}</pre>
<details><summary>Provenance</summary>
<pre>{html.escape(json.dumps(record, indent=1, ensure_ascii=False, default=str))}</pre></details>
</body>
</html>
"""


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.rows:
        head, *rows = section.rows
        parts.append("<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
        parts += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        parts.append("</table>")
    if section.picture:
        parts.append(f"<figure>{section.picture}</figure>")
    return "\n".join(parts)
