"""The console: messages, progress and results for people on stderr, and JSON for scripts on stdout.

A terminal gets colors and a live bar, any other stream plain lines only. The console takes numbers and text, never
tensors, and keeps nothing: that is the metrics file's job (`switchcli.terminal.metrics_file`). All text goes through
`terminal_text`, never through markup.
"""

import io
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TextIO, TypeVar

from rich import console as rich_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from switchcli import metric_names as metric
from switchcli.system.startup import is_main_rank
from switchcli.terminal.metrics_file import to_json
from switchcli.terminal.safe_text import one_line, shorten
from switchcli.terminal.table import Table, terminal_text
from switchcli.terminal.units import clock, percent, si

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
    rank: int
    """Its importance: where the line is wider than the terminal, columns with the highest ranks are left out."""


COLUMNS = (
    Column(metric.LOSS, "loss", 7, "{:.4f}".format, 0),
    Column(metric.TOKENS_PER_SECOND, "tokens/s", 8, si, 2),
    Column(metric.FLOPS_PER_SECOND, "FLOP/s", 6, si, 11),
    Column(metric.LEARNING_RATE, "lr", 8, "{:.2e}".format, 9),
    Column(metric.GRADIENT_NORM, "grad norm", 9, "{:.3g}".format, 10),
    Column("seconds_left", "time left", 9, clock, 1),
)
TEACHER_COLUMNS = (Column(metric.TEACHER_DIVERGENCE, "to teacher", 10, "{:.4f}".format, 4),)
SPARSE_COLUMNS = (
    Column("encoder_dropped_fraction", "enc drop", 8, percent, 5),
    Column("decoder_dropped_fraction", "dec drop", 8, percent, 6),
    Column(metric.MAX_LOAD, "max load", 8, "{:.2f}".format, 8),
    Column(metric.DEAD_EXPERTS, "dead", 4, "{:.0f}".format, 7),
)
_COLUMN_GAP = 2


class Bar(NamedTuple):
    """A bar of a terminal; without one, or over nothing, it shows nothing."""

    progress: Progress
    task: TaskID | None

    def advance(
        self, count: int, description: str | None = None, seconds_left: float | None = None, total: int | None = None
    ) -> None:
        """Move to a count, and set the description, the time left and the total if they are given."""
        if self.task is not None:
            line = None if description is None else one_line(description)
            self.progress.update(self.task, completed=count, description=line, total=total)
            if seconds_left is not None:
                self.progress.update(self.task, end=time.monotonic() + seconds_left)


class ShowCount(Protocol):
    """Shows how much is done, and how many tokens that made so far, if it makes tokens."""

    def __call__(self, count: int, tokens: int = 0, /) -> None: ...


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
        self._bars_lock = threading.Lock()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            _Count(),
            _TimeLeft(),
            console=self._rich,
            refresh_per_second=4,
            transient=True,
            expand=True,
            redirect_stdout=False,  # results go to stdout while the bar is on stderr
        )

    def message(self, text: str = "", style: str = "", wrap: bool = True) -> None:
        """Print one line of plain text; line breaks in it are printed as escapes.

        In a terminal it is wrapped between words if `wrap`. An indented line, such as a command to paste, never is.
        """
        if not self._quiet:
            self._print(text, style, wrap and not text.startswith("  "))

    def warning(self, text: str) -> None:
        """Print a warning, even when quiet."""
        self._print(f"warning: {text}", "yellow", wrap=True)

    def error(self, *lines: str) -> None:
        """Print why the run ends, even when quiet."""
        for index, line in enumerate(lines):
            self._print(line if index else f"error: {line}", "bold red", wrap=True)

    def for_watchers(self, text: str) -> Callable[[], None] | None:
        """Return a function, for any thread, that prints a line; None if quiet, or if nobody watches a terminal."""
        if self._quiet or not self._rich.is_terminal:
            return None
        return lambda: self.message(text, "bold")

    def track(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items and show how many have passed: a bar, or a line every half minute.

        One line with their number and the time remains, unless they took less than a second.
        """
        with self.counting(description, total) as show:
            for count, item in enumerate(iterable, start=1):
                yield item
                show(count)

    @contextmanager
    def counting(self, description: str, total: int | None = None) -> Iterator[ShowCount]:
        """Yield a function to call with how much is done: it shows a bar, or a line every half minute.

        One line with the number and the time remains, unless it took less than a second or did not come to an end.
        Tokens are shown with their rate.
        """
        timer = _Timer(self._live)
        last = last_tokens = 0

        def described(seconds: float) -> str:
            rate = f"{si(last_tokens)} tokens, {si(last_tokens / seconds)} tokens/s, " if last_tokens else ""
            return f"{description}: {rate}"

        with self._bar(description, total) as bar:

            def show(count: int, tokens: int = 0) -> None:
                nonlocal last, last_tokens
                last, last_tokens = count, tokens
                if not timer.is_due():
                    return
                line = described(timer.elapsed)
                bar.advance(count, line.rstrip(":, "))
                if not self._live:
                    left = ""
                    if total and count:
                        left = f" of {total:,}, time left {clock((total - count) * timer.elapsed / count)}"
                    self.message(f"{line}{count:,}{left}")

            yield show
        seconds = timer.seconds()
        if seconds >= 1:
            self.message(f"{described(seconds)}{last:,} in {clock(seconds)}")

    @contextmanager
    def waiting(self, description: str) -> Iterator[None]:
        """Show that work goes on which tells no progress: a bar without an end, or a line every half minute.

        One line with the time remains, unless it took less than a second or did not come to an end.
        """
        timer = _Timer(self._live)
        ended = threading.Event()

        def tell() -> None:
            while not ended.wait(_SECONDS_BETWEEN_PLAIN_LINES):
                self.message(f"{description}: {clock(timer.seconds())} so far")

        thread = threading.Thread(target=tell, name="waiting", daemon=True)
        with self._bar(description, None):
            if not self._live:
                thread.start()
            try:
                yield
            finally:
                ended.set()
                if not self._live:
                    thread.join()
        seconds = timer.seconds()
        if seconds >= 1:
            self.message(f"{description}: {clock(seconds)}")

    @contextmanager
    def stepping(self, description: str) -> Iterator[Callable[[int, int, float | None], None]]:
        """Yield a function to call with the step of a run, its steps and its loss: a bar, or ten lines. For any thread.

        The number of steps is 0 where it is not known.
        """
        tenth = 0
        with self._bar(description, None) as bar:

            def show(step: int, steps: int, loss: float | None) -> None:
                nonlocal tenth
                line = description if loss is None else f"{description}: loss {loss:.4f}"
                bar.advance(step, line, total=steps or None)
                if not self._live and steps and 10 * step // steps > tenth:
                    tenth = 10 * step // steps
                    self.message(f"{line}, step {step:,} of {steps:,}")

            yield show

    @contextmanager
    def training(self, steps: int, first: int = 0, not_measured: str = "") -> Iterator["TrainingDisplay"]:
        """Yield the display of a run of `steps` steps, of which `first` are done already.

        `not_measured` says what the first estimate of the run's time does not include, if there is anything.
        """
        with self._bar("training", steps, first) as bar:
            yield TrainingDisplay(self, steps, bar, not_measured)

    def show(self, table: Table) -> None:
        """Print a table below an empty line."""
        if not self._quiet:
            self._rich.print()
            table.print(self._rich)

    def sample(self, input: str, target: str, prediction: str) -> None:
        """Print a text with its gaps, the text of the gaps, and what the model puts there."""
        texts = {"input": input, "target": target, "model": prediction}
        rows = [(name, shorten(text, _SAMPLE_CHARACTERS)) for name, text in texts.items()]
        self.show(Table(("", ""), rows, align="left"))

    def columns_that_fit(self, columns: Sequence[Column], used: int) -> tuple[Column, ...]:
        """Return the most important columns that fit beside `used` characters, in their order; at least one."""
        if not self._rich.is_terminal:  # lines may have any length
            return tuple(columns)
        fitting: list[Column] = []
        left = self._rich.width - used
        for column in sorted(columns, key=lambda column: column.rank):
            left -= _COLUMN_GAP + column.width
            if left < 0 and fitting:
                break
            fitting.append(column)
        return tuple(column for column in columns if column in fitting)

    def _print(self, text: str, style: str, wrap: bool = False) -> None:
        line = terminal_text(text, style)
        # In `NAME  VALUE`, further lines begin below VALUE, unless that leaves too little room.
        begin = line.plain.rfind("  ") + 2
        if wrap and self._rich.is_terminal and 2 <= begin <= self._rich.width // 2:
            rows = line[begin:].wrap(self._rich, self._rich.width - begin)
            for row in rows:
                row.rstrip()
            line = line[:begin] + Text("\n" + " " * begin).join(rows)
        self._rich.print(line, soft_wrap=not (wrap and self._rich.is_terminal))

    @contextmanager
    def _bar(self, description: str, total: int | None, first: int = 0) -> Iterator[Bar]:
        """Show a live bar in a terminal, unless it is over nothing. Bars may be nested, or of threads."""
        if not self._live or total == 0:
            yield Bar(self._progress, None)
            return
        with self._bars_lock:
            task = self._progress.add_task(one_line(description), total=total, completed=first)
            self._progress.start()
        try:
            yield Bar(self._progress, task)
        finally:
            with self._bars_lock:
                self._progress.remove_task(task)
                if not self._progress.tasks:
                    self._progress.stop()


def main_console() -> Console:
    """Return the console for messages before the ranks meet. Only the main rank prints."""
    return Console() if is_main_rank() else silent()


def silent() -> Console:
    """Return a console that prints nothing, not even warnings and errors."""
    return Console(stream=io.StringIO())


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object and a newline on stdout, in ASCII, so that no terminal acts on what a text holds."""
    sys.stdout.write(to_json(value) + "\n")


class _Count(MofNCompleteColumn):
    """How much is done of a bar's total; without a total, what is done, if it is counted."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(f"{task.completed:,.0f}" if task.completed else "", "progress.download")
        return super().render(task)


class _TimeLeft(TimeRemainingColumn):
    """The time left of a bar: up to the `end` its owner has estimated, else by the bar's own speed. Time so far, if
    the total is not known."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(clock(task.elapsed or 0.0), "progress.elapsed")
        if "end" in task.fields:
            return Text(clock(max(0.0, task.fields["end"] - time.monotonic())), "progress.remaining")
        return super().render(task)


class _Timer:
    """A clock for a display, which is due soon in a terminal and every half minute elsewhere."""

    def __init__(self, live: bool) -> None:
        self.elapsed = 0.0
        """Seconds from the start to the last time the display was due."""
        self._interval = _SECONDS_BETWEEN_REFRESHES if live else _SECONDS_BETWEEN_PLAIN_LINES
        self._started = time.monotonic()
        self._next = self._started + self._interval

    def is_due(self) -> bool:
        """Return whether an interval has passed since the start, or since this last returned True."""
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

    def __init__(self, console: Console, steps: int, bar: Bar, not_measured: str = "") -> None:
        self._bar = bar
        self._not_measured = not_measured
        self._console = console
        self._steps = steps
        self._rows = 0
        self._columns: tuple[Column, ...] = ()
        self._is_estimated = False

    def advance(self, step: int) -> None:
        """Move the bar to a step."""
        self._bar.advance(step)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Print the lines of one logged step: of training, tasks and held-out text, whichever it has.

        A metric that has a column and is absent is `-`; one without a column is only in the metrics file, as is one
        whose column does not fit the terminal. Before the first line comes the estimated time of the whole run.
        """
        number = int(metrics.get("step", 0))
        step = f"{number}/{self._steps}".rjust(2 * len(str(self._steps)) + 1)
        if metric.LOSS in metrics:
            self._estimate(number, metrics.get("seconds_left", math.nan))
            columns = self._console.columns_that_fit(_columns(metrics), len(step))
            if self._rows % _ROWS_BETWEEN_HEADERS == 0 or columns != self._columns:
                headings = (column.heading.rjust(column.width) for column in columns)
                self._console.message("  ".join(["step".rjust(len(step)), *headings]), "bold", wrap=False)
                self._columns = columns
            self._rows += 1
            values = (column.write(metrics[column.key]) if column.key in metrics else "-" for column in columns)
            cells = (value.rjust(column.width) for value, column in zip(values, columns, strict=True))
            self._console.message("  ".join([step, *cells]), wrap=False)
        malformed: Mapping[str, float] = metrics.get(metric.MALFORMED, {})
        scores = []
        for name, score in metrics.items():
            if name.startswith(metric.TASK_PREFIX):
                task = name.removeprefix(metric.TASK_PREFIX)
                note = f" ({malformed[task]:.0f}% malformed)" if malformed.get(task) else ""
                scores.append(f"{task} {score:.1f}{note}")
        if scores:
            self._console.message(f"{step}  {'  '.join(scores)}", "bold")
        if metric.HELD_OUT_LOSS in metrics:
            self._console.message(f"{step}  held-out loss {metrics[metric.HELD_OUT_LOSS]:.4f}", "bold")

    def _estimate(self, step: int, seconds_left: float) -> None:
        """Show the time left in the bar and, the first time that it is known, in a line."""
        if not math.isfinite(seconds_left):
            return
        self._bar.advance(step, seconds_left=seconds_left)
        if not self._is_estimated and step < self._steps:
            self._is_estimated = True
            included = f"; {self._not_measured}" if self._not_measured else ", evaluations included"
            self._console.message(
                f"estimated time: {clock(seconds_left)} for the other {self._steps - step:,} steps{included}"
            )


def _columns(metrics: Mapping[str, float]) -> tuple[Column, ...]:
    columns: tuple[Column, ...] = COLUMNS
    for optional in (TEACHER_COLUMNS, SPARSE_COLUMNS):
        if any(column.key in metrics for column in optional):
            columns += optional
    return columns
