"""A page in one file: tables, charts, texts. Nothing is fetched, and all text from data is escaped.

A Content-Security-Policy lets the browser run only the two scripts of a page with charts, named by their digests, and
open no connection: text that slipped through the escaping would still run nothing. A page without charts has no script.
"""

import base64
import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple

from switchcli import __version__
from switchcli.errors import disk_errors
from switchcli.report.charts import COLORS, DARK_COLORS, Figure, in_page
from switchcli.system import publish
from switchcli.terminal.safe_text import html_text, one_line, safe_text, shell_words
from switchcli.terminal.table import Table

_FOLDER = Path(__file__).parent
_LIBRARY = _FOLDER / "vega" / "vega-embed.min.js"
"""Vega, Vega-Lite and vega-embed in one script, which defines `vegaEmbed`."""
_DIGITS = 6
"""Significant digits of a number in a chart."""


class Part(NamedTuple):
    """Any other element of a page, with the figures that the page's script draws in it."""

    html: str
    figures: tuple[Figure, ...] = ()
    section: str = ""
    """The title of a section, which the top of the page links to."""


def paragraphs(*lines: str, kind: Literal["words", "note", "caption"] = "words") -> Part:
    """Return paragraphs; a `note` is for what the reader has to know before the results."""
    return Part("\n".join(f'<p class="{kind}">{html_text(line)}</p>' for line in lines))


def charts(figures: Sequence[Figure]) -> Part:
    """Return figures side by side where there is room."""
    return Part(f'<div class="charts">{"".join(map(_figure, figures))}</div>', tuple(figures))


def sample(title: str, texts: Mapping[str, str]) -> Part:
    """Return texts under their names, such as input, target and the answer of each series."""
    items = "".join(f"<dt>{html_text(name)}</dt><dd>{html_text(text.strip())}</dd>" for name, text in texts.items())
    return Part(f'<article class="sample"><h3>{html_text(title)}</h3><dl>{items}</dl></article>')


def collapsible(summary: str, *elements: Part | Table, is_open: bool = False) -> Part:
    """Return elements that a click on the summary shows or hides; their charts are drawn when they are first shown."""
    content = _join(elements)
    tag = "<details open>" if is_open else "<details>"
    return Part(f"{tag}<summary>{html_text(summary)}</summary>\n{content.html}\n</details>", content.figures)


def section(title: str, *elements: Part | Table) -> Part:
    """Return elements under a heading, which the top of the page links to."""
    content = _join(elements)
    html = f'<section id="{_anchor(title)}"><h2>{html_text(title)}</h2>\n{content.html}\n</section>'
    return Part(html, content.figures, title)


def page(title: str, elements: Iterable[Part | Table], origin: Mapping[str, str] | None = None) -> str:
    """Return the HTML document, which names its `origin` at the top: dates, versions and the like."""
    elements = list(elements)
    content = _join(elements)
    sections = [element.section for element in elements if isinstance(element, Part) and element.section]
    scripts = [_read(file) for file in (_LIBRARY, _FOLDER / "page.js")] if content.figures else []
    for script in scripts:
        assert not re.search("</script|<!--|\r", script, re.IGNORECASE), "a script that its element does not hold"
    tags = [f"<script>{script}</script>" for script in scripts]
    if content.figures:
        tags.insert(0, f'<script type="application/json" id="data">{_data(content.figures)}</script>')
    facts = (origin or {}).items()
    return Template(_read(_FOLDER / "page.html")).substitute(
        policy=_policy(scripts),
        title=html_text(title),
        style=_read(_FOLDER / "page.css") + _dark_colors(),
        origin="".join(f"<dt>{html_text(name)}</dt><dd>{html_text(value)}</dd>" for name, value in facts),
        links="".join(f'<a href="#{_anchor(section)}">{html_text(section)}</a>' for section in sections),
        content=content.html,
        scripts="\n".join(tags),
    )


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def write_page(file: Path, title: str, elements: Iterable[Part | Table]) -> None:
    """Publish a page as `file`, whose folder is made. Raises CheckpointError where the disk refuses."""
    origin = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "host": platform.node(),
        "versions": f"switchcli {__version__}, Python {platform.python_version()}",
        "command": one_line(shell_words("switchcli", *sys.argv[1:])),
    }
    text = page(title, elements, origin)
    with disk_errors(file, "give another file by --html"):
        file.parent.mkdir(parents=True, exist_ok=True)
        publish.write_file(file, text)


def _dark_colors() -> str:
    """Return the rules that replace the colors of series in dark mode. They overrule what Vega writes in the SVG."""
    rules = (
        f'[{attribute}="{color}" i] {{ {attribute}: {dark} }}'
        for color, dark in zip(COLORS, DARK_COLORS, strict=True)
        for attribute in ("stroke", "fill")
    )
    return "@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}\n"


def _join(elements: Iterable[Part | Table]) -> Part:
    parts = [Part(element.html()) if isinstance(element, Table) else element for element in elements]
    return Part("\n".join(part.html for part in parts), tuple(figure for part in parts for figure in part.figures))


def _figure(figure: Figure) -> str:
    caption = f'<p class="caption">{html_text(figure.caption)}</p>' if figure.caption else ""
    name, label = html_text(figure.name), html_text(figure.full_title)
    plot = f'<div class="plot" data-figure="{name}" role="img" aria-label="{label}"></div>'
    return f"<figure><figcaption>{html_text(figure.title)}</figcaption>{plot}{caption}</figure>"


def _data(figures: Sequence[Figure]) -> str:
    """Return what page.js draws as JSON: values by table and column, and specifications by figure.

    The characters of HTML markup are written as escapes, so that no text ends the element that holds the JSON.
    """
    tables = {
        name: {column: [*map(_json_value, values)] for column, values in table.to_json().items()}
        for name, table in {figure.table.name: figure.table for figure in figures}.items()
    }
    specs = {figure.name: {"table": figure.table.name, "spec": in_page(figure)} for figure in figures}
    text = json.dumps({"tables": tables, "figures": specs}, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _json_value(value: Any) -> Any:
    if isinstance(value, float):  # an integer, such as a step, keeps all its digits
        rounded = value if value.is_integer() else float(f"{value:.{_DIGITS}g}")
        return int(rounded) if rounded.is_integer() else rounded
    return safe_text(value) if isinstance(value, str) else value


def _policy(scripts: Iterable[str]) -> str:
    """Return the Content-Security-Policy that allows inline styles and exactly these scripts."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    rules = ["default-src 'none'", "style-src 'unsafe-inline'", "base-uri 'none'", "form-action 'none'"]
    if digests:
        rules.append("script-src" + "".join(f" 'sha256-{digest}'" for digest in digests))
    return "; ".join(rules)


def _anchor(title: str) -> str:
    return re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
