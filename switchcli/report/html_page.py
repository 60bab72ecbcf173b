"""A page in one file: tables, charts, texts. Nothing is fetched, and all text from data is escaped.

A Content-Security-Policy lets the browser run only the two scripts of a page with charts, named by their digests, and
open no connection: text that slipped through the escaping would still run nothing. A page without charts has no script.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from switchcli import publish
from switchcli.errors import disk_errors
from switchcli.report import charts
from switchcli.report.charts import Figure
from switchcli.report.safe_text import safe_text

_FOLDER = Path(__file__).parent
_LIBRARY = _FOLDER / "vega" / "vega-embed.min.js"
"""Vega, Vega-Lite and vega-embed in one script, which defines `vegaEmbed`."""
_DIGITS = 6
"""Significant digits of a number in a chart."""


class Part(Protocol):
    """An element of a page."""

    def html(self) -> str: ...


class HtmlTable(NamedTuple):
    """A table with a title and a heading per column: the first column aligned left, the others right."""

    title: str
    headings: Sequence[str]
    rows: Iterable[Sequence[str]]
    caption: str = ""

    def html(self) -> str:
        rows = [_row("th", self.headings), *(_row("td", row) for row in self.rows)]
        title = f"<h3>{_text(self.title)}</h3>\n" if self.title else ""
        caption = f'\n<p class="caption">{_text(self.caption)}</p>' if self.caption else ""
        return f'{title}<div class="scroll" tabindex="0"><table>\n' + "\n".join(rows) + f"\n</table></div>{caption}"


class Highlights(NamedTuple):
    """The results to see first: (value, caption) pairs."""

    facts: Sequence[tuple[str, str]]

    def html(self) -> str:
        cells = (f"<div><dd>{_text(value)}</dd><dt>{_text(caption)}</dt></div>" for value, caption in self.facts)
        return f'<dl class="facts">{"".join(cells)}</dl>'


class Paragraphs(NamedTuple):
    """Lines of text, each a paragraph."""

    lines: Sequence[str]
    kind: Literal["words", "note", "caption"] = "words"
    """The style; `note` for what the reader has to know before the results."""

    def html(self) -> str:
        return "\n".join(f'<p class="{self.kind}">{_text(line)}</p>' for line in self.lines)


class Legend(NamedTuple):
    """The series of all charts of a page, with their styles; a click hides one and shows it again."""

    series: Sequence[str]

    def html(self) -> str:
        return f'<div class="legend">{"".join(map(_legend_button, range(len(self.series)), self.series))}</div>'


class Charts(NamedTuple):
    """Figures side by side where there is room."""

    figures: Sequence[Figure]

    def html(self) -> str:
        return f'<div class="charts">{"".join(map(_figure, self.figures))}</div>'


class Sample(NamedTuple):
    """Texts under their names, such as input, target and the answer of each series."""

    title: str
    texts: Mapping[str, str]

    def html(self) -> str:
        texts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(text.strip())}</dd>" for name, text in self.texts.items())
        return f'<article class="sample"><h3>{_text(self.title)}</h3><dl>{texts}</dl></article>'


class Collapsible(NamedTuple):
    """Parts that a click on the summary shows; their charts are drawn only then."""

    summary: str
    parts: Sequence[Part]

    def html(self) -> str:
        return f"<details><summary>{_text(self.summary)}</summary>\n{_html(self.parts)}\n</details>"


class Section(NamedTuple):
    """Parts under a heading, which the top of the page links to."""

    title: str
    parts: Sequence[Part]

    def html(self) -> str:
        return f'<section id="{_anchor(self.title)}"><h2>{_text(self.title)}</h2>\n{_html(self.parts)}\n</section>'


def page(title: str, parts: Iterable[Part]) -> str:
    """Return the HTML document."""
    parts = list(parts)
    figures = {figure.name: figure for figure in _figures(parts)}
    titles = [part.title for part in parts if isinstance(part, Section)]
    links = "".join(f'<a href="#{_anchor(title)}">{_text(title)}</a>' for title in titles)
    body = [f"<header><h1>{_text(title)}</h1>", f"<nav>{links}</nav>" if links else "", "</header>"]
    body += ["<main>", _html(parts), "</main>"]
    scripts: list[str] = []
    if figures:
        scripts = [_LIBRARY.read_text(encoding="utf-8"), (_FOLDER / "page.js").read_text(encoding="utf-8")]
        body.append(f'<script type="application/json" id="data">{_data(figures)}</script>')
        body += [f"<script>{_script(script)}</script>" for script in scripts]
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>",
        f"<style>\n{(_FOLDER / 'page.css').read_text(encoding='utf-8')}</style>",
    ]
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>"]
    return "\n".join(line for line in lines if line) + "\n"


def write_page(file: Path, title: str, parts: Iterable[Part]) -> None:
    """Publish a page as `file`, whose folder is made. Raises CheckpointError where the disk refuses."""
    text = page(title, parts)
    with disk_errors(file, "give another file by --html"):
        file.parent.mkdir(parents=True, exist_ok=True)
        publish.write_file(file, text)


def _html(parts: Iterable[Part]) -> str:
    return "\n".join(part.html() for part in parts)


def _figures(parts: Iterable[Part]) -> Iterator[Figure]:
    for part in parts:
        if isinstance(part, Charts):
            yield from part.figures
        elif isinstance(part, Collapsible | Section):
            yield from _figures(part.parts)


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figure(figure: Figure) -> str:
    caption = f'<p class="caption">{_text(figure.caption)}</p>' if figure.caption else ""
    plot = f'<div class="plot" data-figure="{_text(figure.name)}" role="img" aria-label="{_text(figure.title)}"></div>'
    return f"<figure><figcaption>{_text(figure.title)}</figcaption>{plot}{caption}</figure>"


def _legend_button(index: int, label: str) -> str:
    """Return a button with the line and the marker of a series."""
    color, dash, shape = charts.style_of(index)
    line = f'<line x1="1" x2="33" y1="7" y2="7" stroke="{color}" stroke-dasharray="{" ".join(map(str, dash))}"/>'
    marker = f'<path d="{_MARKER_PATHS[shape]}" transform="translate(17 7)" fill="{color}"/>'
    image = f'<svg width="34" height="14" aria-hidden="true" stroke-width="2">{line}{marker}</svg>'
    return f'<button type="button" aria-pressed="true">{image}{_text(label)}</button>'


_MARKER_PATHS: Mapping[str, str] = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "square": "M-4 -4h8v8h-8z",
    "triangle-up": "M0 -5l5 9h-10z",
    "diamond": "M0 -6l4 6l-4 6l-4 -6z",
    "cross": "M-2 -5h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "triangle-down": "M0 5l5 -9h-10z",
}
"""SVG paths of `charts.SHAPES`, centered on 0."""


def _data(figures: Mapping[str, Figure]) -> str:
    """Return what page.js draws as JSON: values by table and column, and specifications by figure.

    The characters of HTML markup are written as escapes, so that no text ends the element that holds the JSON.
    """
    tables = {figure.table.name: figure.table for figure in figures.values()}
    values = {
        name: {column: [*map(_json_value, table.column(column))] for column in table.columns}
        for name, table in tables.items()
    }
    specs = {name: {"table": figure.table.name, "spec": charts.in_page(figure)} for name, figure in figures.items()}
    text = json.dumps({"tables": values, "figures": specs}, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        rounded = float(f"{value:.{_DIGITS}g}")
        return int(rounded) if rounded.is_integer() else rounded
    return safe_text(value) if isinstance(value, str) else value


def _script(text: str) -> str:
    assert not re.search("</script|<!--|\r", text, re.IGNORECASE), "a script that its element does not hold"
    return text


def _policy(scripts: Iterable[str]) -> str:
    """Return the Content-Security-Policy that allows inline styles and exactly these scripts."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    rules = ["default-src 'none'", "style-src 'unsafe-inline'", "base-uri 'none'", "form-action 'none'"]
    if digests:
        rules.append("script-src" + "".join(f" 'sha256-{digest}'" for digest in digests))
    return "; ".join(rules)


def _anchor(title: str) -> str:
    return re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")


def _text(text: str) -> str:
    return escape(safe_text(text))
