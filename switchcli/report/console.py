"""The console: what a person sees while a run goes on, on one stream (stderr unless told otherwise).

In a terminal there are colours and a live bar; elsewhere plain lines only. It gets numbers and text, never tensors,
and keeps nothing: the metrics file does (`switchcli.report.sinks`). Each text is one line: it goes through `one_line`
and `rich.text.Text`, never through markup.
"""

import io
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TextIO, TypeVar

from rich import console as rich_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from switchcli.metric_names import (
    BALANCE,
    DEAD_EXPERTS,
    FLOPS_PER_SECOND,
    GRADIENT_NORM,
    HELD_OUT,
    LEARNING_RATE,
    NEG_LOG_PERPLEXITY,
    TASK_PREFIX,
    TEACHER_DIVERGENCE,
    TOKENS_PER_SECOND,
)
from switchcli.report.safe_text import one_line, shorten
from switchcli.report.units import clock, number, si

T = TypeVar("T")

PLAIN_WIDTH = 10_000
"""Columns where there is no terminal. Nothing is folded there, so no part of a long name begins an output line."""

_SECONDS_BETWEEN_REFRESHES = 0.1
_SECONDS_BETWEEN_PLAIN_LINES = 30.0
_ROWS_BETWEEN_HEADERS = 20
_SAMPLE_CHARACTERS = 500


class Column(NamedTuple):
    """One figure of a logged step: its key among the metrics, its heading, its width in characters, its form."""

    key: str
    heading: str
    width: int
    write: Callable[[float], str]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


COLUMNS = (
    Column(NEG_LOG_PERPLEXITY, "neg log ppl", 11, "{:.4f}".format),
    Column(TOKENS_PER_SECOND, "tokens/s", 8, si),
    Column(FLOPS_PER_SECOND, "FLOP/s", 6, si),
    Column(LEARNING_RATE, "lr", 8, "{:.2e}".format),
    Column(GRADIENT_NORM, "grad norm", 9, "{:.3g}".format),
    Column("seconds_left", "time left", 9, clock),
)
TEACHER_COLUMNS = (Column(TEACHER_DIVERGENCE, "to teacher", 10, "{:.4f}".format),)
SPARSE_COLUMNS = (
    Column("encoder_dropped_fraction", "enc drop", 8, _percent),
    Column("decoder_dropped_fraction", "dec drop", 8, _percent),
    Column(BALANCE, "balance", 7, "{:.3f}".format),
    Column(DEAD_EXPERTS, "dead", 4, "{:.0f}".format),
)


class AdvanceTo(Protocol):
    """Moves a bar to a count, with other words before it if there are some."""

    def __call__(self, count: int, said: str | None = None) -> None: ...


class Preparation(Protocol):
    """How far a preparation is."""

    @property
    def source_shards(self) -> int:
        """Whole ones."""

    @property
    def size(self) -> int:
        """Bytes of their sources."""

    @property
    def tokens(self) -> int:
        """Written so far."""


class Console:
    """Messages, warnings, progress and results for people. `quiet` leaves only warnings and errors."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        """`stream` is stderr when absent. Ranks other than the first are made quiet by their caller."""
        stream = sys.stderr if stream is None else stream
        terminal = stream.isatty()
        self._quiet = quiet
        self._rich = rich_console.Console(
            file=stream,
            force_terminal=terminal,  # the stream decides, not FORCE_COLOR: a log file holds no escape codes
            width=None if terminal else PLAIN_WIDTH,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._live = terminal and not quiet and not self._rich.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._rich,
            refresh_per_second=4,
            transient=True,
            expand=True,
            redirect_stdout=False,  # results go to stdout while the bar is on stderr
        )

    def message(self, text: str = "", style: str = "") -> None:
        """Print one line of plain text; line breaks in it are printed as escapes."""
        if not self._quiet:
            self._print(text, style)

    def warning(self, text: str) -> None:
        """An alarm in words; shown even when quiet."""
        self._print(f"warning: {text}", "yellow")

    def error(self, *lines: str) -> None:
        """Print why the run ends; shown even when quiet."""
        for place, line in enumerate(lines):
            self._print(line if place else f"error: {line}", "bold red")

    def track(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yields the items and shows how many have passed: a bar, or a line every half minute.

        One line with the sum stays, unless it was done within a second.
        """
        started = time.monotonic()
        interval = _SECONDS_BETWEEN_REFRESHES if self._live else _SECONDS_BETWEEN_PLAIN_LINES
        due = started + interval
        count = 0
        with self._bar(description, total) as reach:
            for count, item in enumerate(iterable, start=1):
                yield item
                now = time.monotonic()
                if now >= due:
                    due = now + interval
                    reach(count)
                    if not self._live:
                        self.message(f"{description}: {count:,}" + (f" of {total:,}" if total else ""))
        seconds = time.monotonic() - started
        if seconds >= 1:
            self.message(f"{description}: {count:,} in {clock(seconds)}")

    @contextmanager
    def preparing(self, label: str, pieces: int, size: int | None) -> Iterator[Callable[["Preparation"], None]]:
        """Yields what is told how many pieces, bytes of sources and tokens are done; `size` is that of all sources.

        A bar, or a line every half minute; and one with the sum.
        """
        started = time.monotonic()
        interval = _SECONDS_BETWEEN_REFRESHES if self._live else _SECONDS_BETWEEN_PLAIN_LINES
        due = started + interval
        last: Preparation | None = None
        with self._bar(label, pieces) as reach:

            def show(done: Preparation) -> None:
                nonlocal due, last
                last, now = done, time.monotonic()
                if now < due:
                    return
                due = now + interval
                said = f"{label}: {si(done.tokens)} tokens, {si(done.tokens / (now - started))} tokens/s"
                reach(done.source_shards, said)
                if not self._live:
                    left = (size - done.size) * (now - started) / done.size if size and done.size else math.nan
                    self.message(f"{said}, {done.source_shards:,} of {pieces:,} pieces, time left {clock(left)}")

            yield show
        seconds = time.monotonic() - started
        if last is not None and seconds >= 1:
            self.message(f"{label}: {last.tokens:,} tokens in {clock(seconds)}, {si(last.tokens / seconds)} tokens/s")

    @contextmanager
    def training(self, steps: int, first: int = 0) -> Iterator["TrainingDisplay"]:
        """The bar and the lines of a run of `steps` steps of which `first` are done already."""
        with self._bar("training", steps, first) as reach:
            yield TrainingDisplay(self, steps, reach)

    def table(self, title: str, rows: Mapping[str, str | float]) -> None:
        """Names and figures, one a line: the final results."""
        if self._quiet:
            return
        grid = Table.grid(padding=(0, 3))
        grid.add_column()
        grid.add_column(justify="right", overflow="fold")
        for name, value in rows.items():
            grid.add_row(_text(name), _text(value if isinstance(value, str) else number(value)))
        self._title(title)
        self._rich.print(grid)

    def rows(self, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> None:
        """A table of several columns: the first to the left, figures to the right; below it what they are."""
        if self._quiet:
            return
        grid = Table.grid(padding=(0, 3))
        for place in range(len(headings)):
            grid.add_column(justify="right" if place else "left", overflow="fold")
        grid.add_row(*(_text(heading, "dim") for heading in headings))
        for row in rows:
            grid.add_row(*map(_text, row))
        self._title(title)
        self._rich.print(grid)
        if caption:
            self._rich.print(_text(caption, "dim"))

    def sample(self, input: str, target: str, prediction: str) -> None:
        """A text with its gaps, what was taken out of them, and what the model puts there."""
        if self._quiet:
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for name, text in (("input", input), ("target", target), ("model", prediction)):
            grid.add_row(name, _text(shorten(text, _SAMPLE_CHARACTERS)))
        self._rich.print()
        self._rich.print(grid)

    def _title(self, title: str) -> None:
        self._rich.print()
        self._print(title, "bold")

    def _print(self, text: str, style: str) -> None:
        self._rich.print(_text(text, style), soft_wrap=True)

    @contextmanager
    def _bar(self, description: str, total: int | None, first: int = 0) -> Iterator["AdvanceTo"]:
        """A live bar where there is a terminal; yields what takes the count reached. Bars may be nested."""

        def reach(count: int, said: str | None = None) -> None:
            if self._live:
                self._progress.update(task, completed=count, description=None if said is None else one_line(said))

        if not self._live:
            yield reach
            return
        task = self._progress.add_task(one_line(description), total=total, completed=first)
        self._progress.start()
        try:
            yield reach
        finally:
            self._progress.remove_task(task)
            if not self._progress.tasks:
                self._progress.stop()


def silent() -> Console:
    """Return a console that prints nothing, not even warnings and errors."""
    return Console(stream=io.StringIO())


class TrainingDisplay:
    """The console of one run: `advance(step)` at each step, which only moves the bar, `log` at each logged one."""

    def __init__(self, console: Console, steps: int, advance: Callable[[int], None]) -> None:
        self.advance = advance
        self._console = console
        self._steps = steps
        self._rows = 0
        self._shown: tuple[Column, ...] = ()

    def log(self, metrics: Mapping[str, float]) -> None:
        """The line of one logged step. An absent figure is `-`; unknown ones are left to the metrics file."""
        if NEG_LOG_PERPLEXITY in metrics:
            columns = _columns(metrics)
            if self._rows % _ROWS_BETWEEN_HEADERS == 0 or columns != self._shown:
                self._console.message(_heading(columns, self._steps), "bold")
                self._shown = columns
            self._rows += 1
            self._console.message(_row(columns, self._steps, metrics))
        if tasks := {
            name.removeprefix(TASK_PREFIX): score for name, score in metrics.items() if name.startswith(TASK_PREFIX)
        }:
            said = "  ".join(f"{name} {score:.1f}" for name, score in tasks.items())
            self._console.message(f"{_step(self._steps, metrics)}  {said}", "bold")
        if HELD_OUT in metrics:
            held_out = metrics[HELD_OUT]
            self._console.message(f"{_step(self._steps, metrics)}  held-out neg. log perplexity {held_out:.4f}", "bold")


def _columns(metrics: Mapping[str, float]) -> tuple[Column, ...]:
    sparse = any(column.key in metrics for column in SPARSE_COLUMNS)
    taught = any(column.key in metrics for column in TEACHER_COLUMNS)
    return COLUMNS + TEACHER_COLUMNS * taught + SPARSE_COLUMNS * sparse


def _heading(columns: Iterable[Column], steps: int) -> str:
    width = len(_step(steps, {}))
    return "  ".join(["step".rjust(width), *(column.heading.rjust(column.width) for column in columns)])


def _row(columns: Iterable[Column], steps: int, metrics: Mapping[str, float]) -> str:
    cells = (
        (column.write(metrics[column.key]) if column.key in metrics else "-").rjust(column.width) for column in columns
    )
    return "  ".join([_step(steps, metrics), *cells])


def _step(steps: int, metrics: Mapping[str, float]) -> str:
    return f"{metrics.get('step', 0):.0f}/{steps}".rjust(2 * len(str(steps)) + 1)


def _text(text: str, style: str = "") -> Text:
    return Text(one_line(text), style)
