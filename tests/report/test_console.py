import io
import os
import pty
import re
import select
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from messages import lacking

from switchcli.terminal import console as console_module
from switchcli.terminal.console import PLAIN_WIDTH, Console
from switchcli.terminal.table import Table

DENSE = {
    "step": 250.0,
    "neg_log_perplexity": -6.54321,
    "learning_rate": 0.01,
    "gradient_norm": 0.98765,
    "tokens_per_second": 12345.0,
    "flops_per_second": 1.5e12,
    "seconds_left": 3725.0,
    "loss": 6.54321,
    "router_z": 0.1,
}
SPARSE = {
    **DENSE,
    "encoder_dropped_fraction": 0.0123,
    "decoder_dropped_fraction": 0.25,
    "max_load": 1.0213,
    "dead_experts": 2.0,
}


def plain(**options: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(stream=stream, **options), stream


class Terminal(NamedTuple):
    console: Console
    descriptor: int

    def output(self) -> str:
        """All that was written; a terminal hands it out in pieces."""
        pieces = []
        while self._is_readable_within(0.05):
            pieces.append(os.read(self.descriptor, 1 << 20))
        return b"".join(pieces).decode()

    def wait_for(self, *patterns: str) -> None:
        """Read until all patterns were shown. Bars are drawn some times a second."""
        seen = ""
        while not all(re.search(pattern, seen) for pattern in patterns):
            assert self._is_readable_within(30), seen
            seen += self.shown()

    def _is_readable_within(self, seconds: float) -> bool:
        poll = select.poll()  # select() takes no descriptor above 1023
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def shown(self) -> str:
        """Return what was printed, without what moves the cursor or colors."""
        return re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", self.output())


@pytest.fixture
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal with as many columns as the test's parameter says, or 100."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(getattr(request, "param", 100)))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(console_module, "_SECONDS_BETWEEN_REFRESHES", 0.0)
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stream:
        yield Terminal(Console(stream=stream), reader)
    os.close(reader)


def logged(*records: dict[str, float], steps: int = 1000) -> list[str]:
    console, stream = plain()
    with console.training(steps) as training:
        for record in records:
            training.advance(int(record["step"]))
            training.log(record)
    return stream.getvalue().splitlines()


def test_a_logged_step_is_one_line_of_figures_under_their_headings() -> None:
    _, heading, line = logged(SPARSE)
    assert re.split(r"\s{2,}", heading.strip()) == [
        "step", "loss", "tokens/s", "FLOP/s", "lr", "grad norm", "time left",
        "enc drop", "dec drop", "max load", "dead",
    ]  # fmt: skip
    assert line.split() == [
        "250/1000", "6.5432", "12.3k", "1.50T", "1.00e-02", "0.988", "1:02:05",
        "1.2%", "25.0%", "1.02", "2",
    ]  # fmt: skip
    assert len(heading) == len(line)
    assert "dead" not in logged(DENSE)[1]


def test_lines_fit_the_plain_width_and_stay_in_column() -> None:
    worst = {
        **dict.fromkeys(SPARSE, 1.2345e10),
        "step": 524288.0,
        "seconds_left": 3_599_999.0,
        "loss": 10.3733,
        "encoder_dropped_fraction": 1.0,
        "decoder_dropped_fraction": 1.0,
        "max_load": 128.0,
        "dead_experts": 2048.0,
    }
    lines = logged(*({**SPARSE, "step": 1.0}, worst), steps=524288)
    assert max(map(len, lines)) <= PLAIN_WIDTH
    nan = logged({key: float("nan") for key in SPARSE} | {"step": 3.0}, {"step": 4.0, "loss": 1.0})
    assert "nan" in nan[1]
    assert nan[-1].split() == ["4/1000", "1.0000", *"-----"]


def test_the_time_of_the_run_is_estimated_once_it_is_measured() -> None:
    unknown = {**DENSE, "step": 1.0, "seconds_left": float("nan")}
    lines = logged(unknown, {**DENSE, "step": 2.0}, {**DENSE, "step": 3.0})
    (estimate,) = (line for line in lines if "estimated" in line)
    assert not lacking(estimate, "1:02:05 998 steps")
    assert lines.index(estimate) == 2  # behind the heading and the step of which nothing was known
    assert not any("estimated" in line for line in logged({**DENSE, "step": 1000.0}))

    console, stream = plain()
    with console.training(1000, not_measured="answers come on top") as training:
        training.log(DENSE)
    assert not lacking(stream.getvalue().splitlines()[0], "estimated 1:02:05 750 answers come on top")


def test_a_task_with_malformed_answers_says_how_many() -> None:
    (line,) = logged({"step": 5.0, "tasks/rte": 12.34, "tasks/cb": 50.0, "malformed": {"rte": 97.4, "cb": 0.0}})  # type: ignore[dict-item]
    assert not lacking(line, "5/1000 rte 12.3 97% malformed cb 50.0")
    assert line.count("malformed") == 1


@pytest.mark.parametrize(
    ("terminal", "left_out"),
    [
        (120, []),
        (80, ["FLOP/s", "grad norm", "lr"]),
        (70, ["FLOP/s", "grad norm", "lr", "max load"]),
        (10, ["tokens/s", "time left"]),
    ],
    indirect=["terminal"],
)
def test_a_terminal_gets_the_columns_that_fit(terminal: Terminal, left_out: list[str]) -> None:
    with terminal.console.training(800) as training:
        training.log({**SPARSE, "step": 20.0})
        lines = re.split(r"[\r\n]+", terminal.shown())
    columns = int(os.environ["COLUMNS"])
    heading, line = (next(line for line in lines if re.match(start, line)) for start in (" *step ", " *20/800 "))
    assert len(line) == len(heading) <= max(columns, len(" 20/800") + 2 + 7)  # the loss is never left out
    assert "loss" in heading
    assert not [name for name in left_out if name in heading]
    assert "FLOP/s" in heading or left_out


TABLE = Table(
    ("series", "verdict", "over dense at step 20", "at the end", "loss", "steps"),
    [
        ("dense", "baseline", "", "-4.1689 (-4.1701 to -4.1677)", "4.1689", "1,000"),
        ("switch", "no difference seen", "-0.0030 (-0.0278 to +0.0218)", "-4.1719", "4.1719", "1,000"),
    ],
    "Held-out loss",
    "Values are means over seeds.",
)


@pytest.mark.parametrize("terminal", [200, 100, 40, 24], indirect=True)
def test_no_number_of_a_table_is_folded(terminal: Terminal) -> None:
    terminal.console.show(TABLE)
    lines, columns = terminal.shown().splitlines(), int(os.environ["COLUMNS"])
    assert max(map(len, lines)) <= columns
    words = [word for row in TABLE.rows for cell in row for word in cell.split()]
    assert not Counter(words) - Counter(" ".join(lines).split())
    assert any(line.split() == ["loss", "4.1719"] for line in lines) == (30 < columns < 120)
    assert sum(not lacking(line, "series verdict loss steps") for line in lines) == (columns > 120)


def test_a_held_out_figure_has_its_own_line() -> None:
    (line,) = logged({"step": 500.0, "held_out/neg_log_perplexity": -5.25, "held_out/loss": 5.25})
    assert line.split() == ["500/1000", "held-out", "loss", "5.2500"]
    assert logged({"step": 500.0, "something": 1.0}) == []


def test_quiet_leaves_warnings_and_errors() -> None:
    console, stream = plain(quiet=True)
    console.message("hidden")
    console.show(Table(("a", "b"), [("hidden", 1)]))
    console.sample("a", "b", "c")
    with console.training(10) as training:
        training.log(SPARSE)
    assert list(console.track("abc", "hidden")) == ["a", "b", "c"]
    console.warning("the router has collapsed")
    console.error("NaN at step 12")
    assert stream.getvalue() == "warning: the router has collapsed\nerror: NaN at step 12\n"


def test_text_is_never_markup_and_never_wrapped_in_a_pipe() -> None:
    console, stream = plain()
    nasty = "[bold]x[/nope] :smile: https://a.b \x1b[2J\x9b1m\u202e"
    console.message(nasty * 10)
    console.sample(nasty, nasty, nasty)
    console.show(Table(("", ""), [(nasty, nasty), ("count", 12345)], nasty, nasty))
    output = stream.getvalue()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", output)
    assert output.startswith(r"[bold]x[/nope] :smile: https://a.b \x1b[2J\x9b1m\u202e" * 10 + "\n")
    assert "12,345" in output


def test_a_sample_is_short_and_keeps_its_gaps() -> None:
    console, stream = plain()
    console.sample("Thank you\n<extra_id_0> me. " * 100, "<extra_id_0> for", "[/red]")
    lines = stream.getvalue().splitlines()
    assert len(lines) < 12
    assert "Thank you <extra_id_0> me." in lines[1]
    assert [line.split(maxsplit=1)[1] for line in lines[-2:]] == ["<extra_id_0> for", "[/red]"]  # no blanks behind it


def test_track_without_a_terminal_says_how_far_and_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 40.0, 41.0, 75.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    console, stream = plain()
    assert list(console.track("abc", "reading [/x]", 3)) == ["a", "b", "c"]
    going, done = stream.getvalue().splitlines()
    assert not lacking(going, "reading [/x] 2 3 0:00:20")
    assert not lacking(done, "reading [/x] 3 0:01:15")


def test_waiting_without_a_terminal_says_now_and_then_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "_SECONDS_BETWEEN_PLAIN_LINES", 0.01)
    console, stream = plain()
    with console.waiting("training a vocabulary [/x]"):
        while not stream.getvalue():
            time.sleep(0.01)
    assert not lacking(stream.getvalue().splitlines()[0], "training a vocabulary [/x] 0:00:00 so far")
    assert "waiting" not in {thread.name for thread in threading.enumerate()}, "nothing may print later"


def test_waiting_ends_with_its_time_unless_it_was_short_or_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    for ended, printed in ((75.0, ["a wait: 0:01:15"]), (0.9, [])):
        clock = iter([0.0, ended])
        monkeypatch.setattr(console_module.time, "monotonic", lambda: next(clock))  # noqa: B023
        console, stream = plain()
        with console.waiting("a wait"):
            pass
        assert stream.getvalue().splitlines() == printed
    monkeypatch.undo()
    console, stream = plain()
    with pytest.raises(ValueError, match="no"), console.waiting("a wait"):
        raise ValueError("no")
    assert stream.getvalue() == ""


def test_forced_colours_do_not_reach_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console, stream = plain()
    console.warning("plain")
    assert stream.getvalue() == "warning: plain\n"


def test_a_terminal_has_colours_a_bar_and_its_cursor_back(terminal: Terminal) -> None:
    console = terminal.console
    with console.training(10, first=3) as training:
        assert list(console.track("ab", "evaluating [/x]", 2)) == ["a", "b"]
        training.advance(4)
        training.log(SPARSE)
        console.warning("slow")
    output = terminal.output()
    assert "\x1b[?25l" in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert re.search(r"training .* 3/10", output)
    assert "250/10" in output
    assert "\x1b[33mwarning: slow" in output


def test_only_somebody_at_a_terminal_gets_a_line_for_watchers(terminal: Terminal) -> None:
    console = terminal.console
    with console.training(10), console.counting("evaluating", 2) as show:
        show(1)
        acknowledge = console.for_watchers("stopping [/x]")
        assert acknowledge is not None
        thread = threading.Thread(target=acknowledge)
        thread.start()
        thread.join()
    assert "stopping [/x]" in terminal.output()
    assert plain()[0].for_watchers("stopping") is None


def test_tokens_are_counted_with_their_rate_beside_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 10.0, 40.0, 50.0, 60.0])
    monkeypatch.setattr(console_module.time, "monotonic", lambda: next(times))
    console, stream = plain()
    with console.counting("tokenizing", 4) as show:
        show(0, 500_000)
        show(1, 2_000_000)
        show(4, 8_000_000)
    going, done = stream.getvalue().splitlines()
    assert not lacking(going, "tokenizing: 2.00M 50.0k tokens/s 1 4 0:02:00")
    assert not lacking(done, "tokenizing: 8.00M tokens 133k tokens/s 4 0:01:00")


def test_a_bar_is_taken_down_when_the_run_fails(terminal: Terminal) -> None:
    console = terminal.console
    with pytest.raises(ValueError, match="ours"), console.training(10):
        raise ValueError("ours")
    items = console.track("abc", "reading")
    next(items)
    items.close()
    output = terminal.output()
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


@pytest.mark.parametrize("terminal", [20], indirect=True)
def test_a_terminal_wraps_sentences_between_words_but_no_command(terminal: Terminal) -> None:
    terminal.console.message("four score and seven years ago")
    terminal.console.message("  switchcli pretrain recipe.yaml --out run")
    terminal.console.message("a name  one two three")
    terminal.console.message("a long name  one two three")
    assert terminal.shown().splitlines() == [
        *("four score and seven", "years ago", "  switchcli pretrain recipe.yaml --out run"),
        *("a name  one two", "        three", "a long name  one two", "three"),
    ]


def test_a_bar_without_a_total_counts_and_has_no_question_mark(terminal: Terminal) -> None:
    with terminal.console.waiting("a wait"):
        terminal.wait_for("a wait", "0:00:00")
    for _ in terminal.console.track("abc", "reading"):
        pass
    assert "?" not in terminal.shown()


def test_a_log_has_a_line_for_each_tenth_of_a_run() -> None:
    stream = io.StringIO()
    with Console(stream=stream).stepping("[1/2] a") as show:
        for step in range(0, 1001, 5):
            show(step, 1000, 3.25)
        show(1000, 0, None)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "[1/2] a: loss 3.2500, step 100 of 1,000"


def test_a_terminal_has_a_bar_for_each_run_of_several_threads(terminal: Terminal) -> None:
    seen = threading.Event()

    def run(number: int) -> None:
        with terminal.console.stepping(f"run {number}") as show:
            show(5, 10, 1.5)
            assert seen.wait(30)

    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(run, range(2))
        terminal.wait_for("run 0: loss 1.5000", "run 1: loss 1.5000", "5/10")
        seen.set()
        list(runs)


def test_the_heading_comes_again() -> None:
    lines = logged(*({**DENSE, "step": float(step)} for step in range(1, 42)))
    assert [index for index, line in enumerate(lines) if "grad norm" in line] == [1, 22, 43]
