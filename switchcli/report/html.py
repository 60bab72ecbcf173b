"""A page of tables in one file: no script, no font, nothing that is fetched. All text is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from switchcli.report.text import safe_text

_STYLE = """\
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse; margin-bottom: 2em }
th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
"""


class HtmlTable(NamedTuple):
    """A title, and rows under their headings: the first column to the left, figures to the right."""

    title: str
    headings: Sequence[str]
    rows: Iterable[Sequence[str]]


def page(title: str, tables: Iterable[HtmlTable]) -> str:
    """The whole document."""
    head = f'<meta charset="utf-8">\n<title>{_text(title)}</title>\n<style>\n{_STYLE}</style>'
    body = "\n".join([f"<h1>{_text(title)}</h1>", *(_table(table) for table in tables)])
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _table(table: HtmlTable) -> str:
    rows = [_row("th", table.headings), *(_row("td", row) for row in table.rows)]
    return f"<h2>{_text(table.title)}</h2>\n<table>\n" + "\n".join(rows) + "\n</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"


def _text(text: str) -> str:
    return escape(safe_text(text))
