"""A table in each place that shows it: what is unknown, what is missing, and text that would mean something there."""

import csv
import io

import pytest
from markdown_it import MarkdownIt

from switchcli.terminal.console import Console
from switchcli.terminal.table import Table

NASTY = 'a | <b>*c*</b> `d` "e"\n=1'
TABLE = Table(("series", "value"), [(NASTY, 0.1), ("=1+1", None), ("-1",), ("n", 12345)], "Title & more", "why", "t")


def test_csv_is_read_back_and_runs_no_formula() -> None:
    rows = [*csv.reader(io.StringIO(TABLE.csv()))]
    assert rows == [["series", "value"], [NASTY, "0.1"], ["'=1+1", ""], ["'-1", ""], ["n", "12345"]]


def test_markdown_shows_each_cell_as_it_is() -> None:
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(TABLE.markdown())
    cells = [cell for cell in tokens if cell.type == "inline"]
    assert {child.type for cell in cells for child in cell.children or []} <= {"text", "text_special"}
    shown = ["".join(child.content for child in cell.children or []) for cell in cells]
    assert shown == ["series", "value", NASTY.replace("\n", "\\n"), "0.1", "=1+1", "-", "-1", "", "n", "12,345"]


def test_html_shows_each_cell_as_it_is() -> None:
    html = TABLE.html()
    assert "<h3>Title &amp; more</h3>" in html
    assert "<td>a | &lt;b&gt;*c*&lt;/b&gt; `d` &quot;e&quot;\n=1</td><td>0.1</td>" in html
    assert "<tr><td>=1+1</td><td>-</td></tr>\n<tr><td>-1</td><td></td></tr>" in html
    assert html.endswith('<p class="caption">why</p>')


def test_lines_to_paste_are_not_aligned() -> None:
    stream = io.StringIO()
    Console(stream=stream).show(Table(("",), [("a b",), ("c",)], "Keys"))
    assert stream.getvalue() == "\nKeys\na b\nc\n"


def test_a_row_has_no_more_values_than_there_are_columns() -> None:
    with pytest.raises(AssertionError, match="scores"):
        Table(("task",), [("rte", 50.0)], "scores")
