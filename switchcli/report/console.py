"""The console: messages, progress and results for people on stderr, and JSON for scripts on stdout.

A terminal gets colors and a live bar, any other stream plain lines only. The console takes numbers and text, never
tensors, and keeps nothing: that is the metrics file's job (`switchcli.report.sinks`). All text goes through `one_line`
and `rich.text.Text`, never through markup.
"""

import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TextIO, TypeVar

from rich import console as rich_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from switchcli import metric_names as metric
from switchcli.report.safe_text import one_line, shorten
from switchcli.report.units import clock, number, percent, si

T = TypeVar("T")

PLAIN_WIDTH = 10_000
"""Columns where there is no terminal. Nothing is folded there, so no part of a long name begins an output line."""

_SECONDS_BETWEEN_REFRESHES = 0.1
_SECONDS_BETWEEN_PLAIN_LINES = 30.0
_ROWS_BETWEEN_HEADERS = 20
_SAMPLE_CHARACTERS = 500


class Column(NamedTuple):
    """One metric in the line of a logged step; `width` is in characters."""

    key: str
    heading: str
    width: int
    write: Callable[[float], str]


COLUMNS = (
    Column(metric.NEG_LOG_PERPLEXITY, "neg log ppl", 11, "{:.4f}".format),
    Column(metric.TOKENS_PER_SECOND, "tokens/s", 8, si),
    Column(metric.FLOPS_PER_SECOND, "FLOP/s", 6, si),
    Column(metric.LEARNING_RATE, "lr", 8, "{:.2e}".format),
    Column(metric.GRADIENT_NORM, "grad norm", 9, "{:.3g}".format),
    Column("seconds_left", "time left", 9, clock),
)
TEACHER_COLUMNS = (Column(metric.TEACHER_DIVERGENCE, "to teacher", 10, "{:.4f}".format),)
SPARSE_COLUMNS = (
    Column("encoder_dropped_fraction", "enc drop", 8, percent),
    Column("decoder_dropped_fraction", "dec drop", 8, percent),
    Column(metric.BALANCE, "balance", 7, "{:.3f}".format),
    Column(metric.DEAD_EXPERTS, "dead", 4, "{:.0f}".format),
)


class AdvanceTo(Protocol):
    """A function that moves a bar to a count, and sets its description if one is given."""

    def __call__(self, count: int, description: str | None = None) -> None: ...


class Preparation(Protocol):
    """The progress of preparing text: finished source shards, their bytes, and the tokens written."""

    @property
    def source_shards(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class Console:
    """Messages, warnings, progress and results for people. `quiet` leaves only warnings and errors."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        """Write to `stream`, by default stderr. The caller makes the console of every rank but the first one quiet."""
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
        """Print a warning, even when quiet."""
        self._print(f"warning: {text}", "yellow")

    def error(self, *lines: str) -> None:
        """Print why the run ends, even when quiet."""
        for index, line in enumerate(lines):
            self._print(line if index else f"error: {line}", "bold red")

    def track(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items and show how many have passed: a bar, or a line every half minute.

        One line with their number and the time remains, unless they took less than a second.
        """
        timer = _Timer(self._live)
        count = 0
        with self._bar(description, total) as advance:
            for count, item in enumerate(iterable, start=1):
                yield item
                if timer.is_due():
                    advance(count)
                    if not self._live:
                        self.message(f"{description}: {count:,}" + (f" of {total:,}" if total else ""))
        seconds = timer.seconds()
        if seconds >= 1:
            self.message(f"{description}: {count:,} in {clock(seconds)}")

    @contextmanager
    def preparing(self, label: str, source_shards: int, size: int | None) -> Iterator[Callable[[Preparation], None]]:
        """Yield a function to call with the progress of preparing text: a bar, or a line every half minute.

        One line with the tokens, the time and the rate remains, unless it took less than a second.

        Args:
            label: The name of the text.
            source_shards: The number of source shards to prepare.
            size: Their bytes, or None where they are not known; the time left is then not known either.
        """
        timer = _Timer(self._live)
        last: Preparation | None = None
        with self._bar(label, source_shards) as advance:

            def show(done: Preparation) -> None:
                nonlocal last
                last = done
                if not timer.is_due():
                    return
                seconds = timer.elapsed
                line = f"{label}: {si(done.tokens)} tokens, {si(done.tokens / seconds)} tokens/s"
                advance(done.source_shards, line)
                if not self._live:
                    seconds_left = (size - done.size) * seconds / done.size if size and done.size else math.nan
                    shards = f"{done.source_shards:,} of {source_shards:,} pieces"
                    self.message(f"{line}, {shards}, time left {clock(seconds_left)}")

            yield show
        seconds = timer.seconds()
        if last is not None and seconds >= 1:
            self.message(f"{label}: {last.tokens:,} tokens in {clock(seconds)}, {si(last.tokens / seconds)} tokens/s")

    @contextmanager
    def training(self, steps: int, first: int = 0) -> Iterator["TrainingDisplay"]:
        """Yield the display of a run of `steps` steps, of which `first` are done already."""
        with self._bar("training", steps, first) as advance:
            yield TrainingDisplay(self, steps, advance)

    def table(self, title: str, values: Mapping[str, str | float]) -> None:
        """Print names with their values, one per line."""
        rows = [(name, value if isinstance(value, str) else number(value)) for name, value in values.items()]
        self.rows(title, ("", ""), rows)

    def rows(self, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> None:
        """Print a table with a heading per column, the first aligned left and the others right, and its caption."""
        if self._quiet:
            return
        grid = Table.grid(padding=(0, 3))
        for index in range(len(headings)):
            grid.add_column(justify="right" if index else "left", overflow="fold")
        if any(headings):
            grid.add_row(*(_text(heading, "dim") for heading in headings))
        for row in rows:
            grid.add_row(*map(_text, row))
        self._rich.print()
        self._print(title, "bold")
        self._rich.print(grid)
        if caption:
            self._rich.print(_text(caption, "dim"))

    def sample(self, input: str, target: str, prediction: str) -> None:
        """Print a text with its gaps, the text of the gaps, and what the model puts there."""
        if self._quiet:
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for name, text in (("input", input), ("target", target), ("model", prediction)):
            grid.add_row(name, _text(shorten(text, _SAMPLE_CHARACTERS)))
        self._rich.print()
        self._rich.print(grid)

    def _print(self, text: str, style: str) -> None:
        self._rich.print(_text(text, style), soft_wrap=True)

    @contextmanager
    def _bar(self, description: str, total: int | None, first: int = 0) -> Iterator[AdvanceTo]:
        """Show a live bar in a terminal, and yield the function that advances it. Bars may be nested."""

        def advance(count: int, description: str | None = None) -> None:
            if self._live:
                line = None if description is None else one_line(description)
                self._progress.update(task, completed=count, description=line)

        if not self._live:
            yield advance
            return
        task = self._progress.add_task(one_line(description), total=total, completed=first)
        self._progress.start()
        try:
            yield advance
        finally:
            self._progress.remove_task(task)
            if not self._progress.tasks:
                self._progress.stop()


def silent() -> Console:
    """Return a console that prints nothing, not even warnings and errors."""
    return Console(stream=io.StringIO())


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object and a newline on stdout, in ASCII, so that no terminal acts on what a text holds."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


class _Timer:
    """A clock for a display, which is due soon in a terminal and every half minute elsewhere."""

    def __init__(self, live: bool) -> None:
        self.elapsed = 0.0
        """Seconds from the start to the last time the display was due."""
        self._interval = _SECONDS_BETWEEN_REFRESHES if live else _SECONDS_BETWEEN_PLAIN_LINES
        self._started = time.monotonic()
        self._next = self._started + self._interval

    def is_due(self) -> bool:
        """Return whether the display is due, at most once per interval."""
        now = time.monotonic()
        if now < self._next:
            return False
        self.elapsed, self._next = now - self._started, now + self._interval
        return True

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._started


class TrainingDisplay:
    """The console of one run: `advance(step)` moves its bar at every step, `log` prints a line at a logged one."""

    def __init__(self, console: Console, steps: int, advance: Callable[[int], None]) -> None:
        self.advance = advance
        self._console = console
        self._steps = steps
        self._rows = 0
        self._columns: tuple[Column, ...] = ()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Print the lines of one logged step: of training, tasks and held-out text, whichever it has.

        A metric that has a column and is absent is `-`; one without a column is only in the metrics file.
        """
        step = f"{metrics.get('step', 0):.0f}/{self._steps}".rjust(2 * len(str(self._steps)) + 1)
        if metric.NEG_LOG_PERPLEXITY in metrics:
            columns = _columns(metrics)
            if self._rows % _ROWS_BETWEEN_HEADERS == 0 or columns != self._columns:
                headings = (column.heading.rjust(column.width) for column in columns)
                self._console.message("  ".join(["step".rjust(len(step)), *headings]), "bold")
                self._columns = columns
            self._rows += 1
            values = (column.write(metrics[column.key]) if column.key in metrics else "-" for column in columns)
            cells = (value.rjust(column.width) for value, column in zip(values, columns, strict=True))
            self._console.message("  ".join([step, *cells]))
        scores = {
            name.removeprefix(metric.TASK_PREFIX): x
            for name, x in metrics.items()
            if name.startswith(metric.TASK_PREFIX)
        }
        if scores:
            line = "  ".join(f"{name} {score:.1f}" for name, score in scores.items())
            self._console.message(f"{step}  {line}", "bold")
        if metric.HELD_OUT in metrics:
            self._console.message(f"{step}  held-out neg. log perplexity {metrics[metric.HELD_OUT]:.4f}", "bold")


def _columns(metrics: Mapping[str, float]) -> tuple[Column, ...]:
    columns: tuple[Column, ...] = COLUMNS
    for optional in (TEACHER_COLUMNS, SPARSE_COLUMNS):
        if any(column.key in metrics for column in optional):
            columns += optional
    return columns


def _text(text: str, style: str = "") -> Text:
    return Text(one_line(text), style)
