"""A table, with one writer for each place that shows it: a terminal, JSON, CSV, Markdown and a page.

Each writer makes text from data harmless in its own place, so that a table may hold any text.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import console as rich_console
from rich.table import Table as Grid
from rich.text import Text

from switchcli.terminal.safe_text import html_text, markdown_text, one_line
from switchcli.terminal.units import number

Value = str | int | float | None

_GAP = 3
_FOLDED_WIDTH = 16
"""Characters that the names of a table's rows need at least. They are folded where they are longer."""


@dataclass(frozen=True)
class Table:
    """Rows of values under the names of their columns; the first column names the rows.

    An unknown value is None. A row may leave out its last values.
    """

    columns: Sequence[str]
    """Where all names are empty, a table has no headings."""
    rows: Sequence[Sequence[Value]]
    title: str = ""
    note: str = ""
    """What the reader has to know to read the numbers, below the table."""
    name: str = ""
    """The name of its file, `NAME.csv`, and of its values in a page."""
    align: Literal["left", "right"] = "right"
    """The side of all columns but the first: right for numbers, left for text."""
    folds_names: bool = True
    """Whether a terminal folds the first column where it is too narrow, and not the others alone."""

    def __post_init__(self) -> None:
        assert all(len(row) <= len(self.columns) for row in self.rows), f"{self.title}: a row has too many values"

    def column(self, name: str) -> list[Value]:
        """Return the values of one column."""
        index = self.columns.index(name)
        return [row[index] if index < len(row) else None for row in self.rows]

    def texts(self) -> list[list[str]]:
        """Return the rows as people read them, all of one length; an unknown value is `-`."""
        missing = [""] * len(self.columns)
        return [[*map(_shown, row), *missing[len(row) :]] for row in self.rows]

    def to_json(self) -> dict[str, list[Value]]:
        """Return the values by column."""
        return {column: self.column(column) for column in self.columns}

    def csv(self) -> str:
        """Return the table as CSV with a heading; an unknown value is empty.

        Text that a spreadsheet would run as a formula, judged by its first character, gets an apostrophe before it.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow([*map(_without_formula, row), *[""] * (len(self.columns) - len(row))])
        return text.getvalue()

    def markdown(self) -> str:
        """Return the table in Markdown, without its title and its note."""
        lines = [[*map(markdown_text, line)] for line in (self.columns, *self.texts())]
        lines.insert(1, ["---"] * len(self.columns))
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def html(self) -> str:
        """Return the table in HTML."""
        headings = [("th", self.columns)] if any(self.columns) else []
        rows = [*headings, *(("td", row) for row in self.texts())]
        lines = [
            "<tr>" + "".join(f"<{tag}>{html_text(cell)}</{tag}>" for cell in cells) + "</tr>" for tag, cells in rows
        ]
        title = f"<h3>{html_text(self.title)}</h3>\n" if self.title else ""
        note = f'\n<p class="caption">{html_text(self.note)}</p>' if self.note else ""
        return f'{title}<div class="scroll" tabindex="0"><table>\n' + "\n".join(lines) + f"\n</table></div>{note}"

    def print(self, console: rich_console.Console) -> None:
        """Print the table in a terminal, or on another stream, in which no line is folded.

        In a terminal that is too narrow for columns of numbers, each row becomes several lines: its first value, then a
        heading and a value per line. No number is folded. A table of one column has lines to paste, which are not
        folded either.
        """
        rows = self.texts()
        if self.title:
            console.print(terminal_text(self.title, "bold"))
        has_headings = any(self.columns)
        if len(self.columns) == 1:
            for (line,) in rows:
                console.print(terminal_text(line), soft_wrap=True)
        elif has_headings and self.align == "right" and not _fits([self.columns, *rows], console):
            self._print_stacked(rows, console)
        else:
            grid = Grid.grid(padding=(0, _GAP))
            for index in range(len(self.columns)):
                is_number = has_headings and self.align == "right" and index > 0
                no_wrap = is_number or (index == 0 and not self.folds_names)
                grid.add_column(justify=self.align if index else "left", overflow="fold", no_wrap=no_wrap)
            if has_headings:
                grid.add_row(*(terminal_text(column, "dim") for column in self.columns))
            for row in rows:
                grid.add_row(*map(terminal_text, row))
            _print_grid(grid, console)
        if self.note:
            console.print(terminal_text(self.note, "dim"))

    def _print_stacked(self, rows: Sequence[Sequence[str]], console: rich_console.Console) -> None:
        """Print each row as its first value, and below it a line for each other one that is not empty."""
        headings = [terminal_text(column, "dim") for column in self.columns[1:]]
        width = max(heading.cell_len for heading in headings)
        for heading in headings:
            heading.pad_right(width - heading.cell_len)
        for name, *values in rows:
            console.print(terminal_text(name))
            for heading, value in zip(headings, values, strict=True):
                if value:
                    console.print(Text.assemble("  ", heading, " " * _GAP, terminal_text(value)))


def terminal_text(text: str, style: str = "") -> Text:
    """Return text on one line that a terminal shows as it is, without markup and control characters."""
    return Text(one_line(text), style)


def _shown(value: Value) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else number(value)


def _without_formula(value: Value) -> Value:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _fits(rows: Sequence[Sequence[str]], console: rich_console.Console) -> bool:
    """Return whether a table fits the terminal without folding any column but the first."""
    if not console.is_terminal:
        return True
    first, *others = (max(terminal_text(cell).cell_len for cell in column) for column in zip(*rows, strict=True))
    return min(first, _FOLDED_WIDTH) + sum(_GAP + width for width in others) <= console.width


def _print_grid(grid: Grid, console: rich_console.Console) -> None:
    """Print a table. rich pads its cells with blanks, which only a terminal needs not show."""
    if console.is_terminal:
        console.print(grid)
        return
    with console.capture() as capture:
        console.print(grid)
    for line in capture.get().splitlines():
        console.print(Text(line.rstrip()), soft_wrap=True)
