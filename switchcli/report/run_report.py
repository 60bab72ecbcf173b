"""A report of runs and checkpoints: its tables for a terminal, the sections of its page, its files, its JSON object."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from switchcli.metric_names import BITS_PER_BYTE, HELD_OUT, LOSS
from switchcli.report import figures, html_page, routing_section, task_results
from switchcli.report.comparison import Comparison, judged_json
from switchcli.report.html_page import Part
from switchcli.report.routing_section import Survey
from switchcli.report.runs import Run
from switchcli.report.series import SeedSpread, Series, by_seed, differences
from switchcli.report.significance import Effect, Verdict
from switchcli.report.task_results import Scores
from switchcli.terminal.metrics_file import as_mapping
from switchcli.terminal.safe_text import capitalize
from switchcli.terminal.table import Table, Value
from switchcli.terminal.units import clock, si

MAX_SAMPLES = 12
"""Texts with answers that a page shows, at most."""
_USAGE = (
    "A line of a chart is the mean over seeds, its band goes from the least to the most. A seed without a value at a "
    "step is interpolated there, but not from step 0. Charts of losses begin at a tenth of the shortest run. A click "
    "on a series in a legend shows it alone, Shift and a click add another one. Ctrl and the wheel zoom, a drag moves, "
    "a double click resets."
)
_LOAD_CAPTION = (
    "Each expert's share of its layer's tokens, as a multiple of the even share, over the first run of a series: 1 is "
    "even, dark experts are hardly used, light ones are crowded."
)
_VERDICT_CAPTIONS: Mapping[str | None, str] = {
    Verdict.NO_DIFFERENCE: "No difference seen: the interval contains 0.",
    Verdict.ONE_SEED: "With one seed nothing tells a difference from chance: train each with train.seed=1 and 2 too.",
    Verdict.OTHER_TASKS: "Other tasks: its loss is of other targets than the baseline's.",
    Verdict.NO_COMMON_STEP: "No step in common: at no step after their starts were all runs evaluated.",
}


class Report(NamedTuple):
    """Trained runs compared with each other, evaluations, and the routing of checkpoints: whichever there is."""

    comparison: Comparison | None = None
    """The runs that trained; None where there are none."""
    evaluations: Sequence[Series] = ()
    """Folders of `switchcli eval`, each a series by itself."""
    notes: Sequence[str] = ()
    routing: Survey | None = None
    """The routing of a checkpoint; None where it was not measured."""

    @property
    def trained(self) -> Sequence[Series]:
        return self.comparison.series if self.comparison else ()

    @property
    def runs_by_label(self) -> dict[str, Sequence[Run]]:
        """The runs of each series, one of each seed."""
        trained = {series.label: [*by_seed(series).values()] for series in self.trained}
        return {**trained, **{series.label: series.runs for series in self.evaluations}}


# Tables


def tables(report: Report) -> Iterator[Table]:
    """Yield the tables for a terminal: quality and speed-up, sizes and rates, then scores, then the routing."""
    if report.comparison is not None:
        yield from overview(report.comparison)
    yield from _shown_scores(report)
    if report.routing is not None:
        yield from routing_section.tables(report.routing)


def overview(comparison: Comparison) -> Iterator[Table]:
    """Yield the tables with a row per series: quality, speed-up, and size with rates."""
    yield quality_table(comparison)
    others = [row for row in comparison.rows if row.verdict != Verdict.BASELINE]
    # A series alone is compared with nothing, but for a quality that the user names.
    if comparison.quality is not None or any(any(row.speed.factors) for row in others):
        yield _speed_table(comparison)
    yield _size_table(comparison)


def quality_table(comparison: Comparison) -> Table:
    """Return the verdict on each series, its gain over the baseline, and its held-out quality."""
    baseline, metric, step = comparison.baseline.label, comparison.metric, comparison.common_step
    series_rows = comparison.rows
    columns: dict[str, Sequence[Value]] = {"series": [row.label for row in series_rows]}
    if len(series_rows) > 1:
        over = f"gain over {baseline}" if step is None else f"gain over {baseline} at step {step:,}"
        columns["verdict"] = [row.verdict for row in series_rows]
        columns[over] = [
            "" if row.verdict == Verdict.BASELINE else row.over and row.over.text("+z.4f") for row in series_rows
        ]
    columns["at the end"] = [_spread(row.final, ".4f") for row in series_rows]
    if step is not None:
        columns[f"at step {step:,}"] = [_spread(row.at_common, ".4f") for row in series_rows]
    columns["seeds"] = [
        f"{row.seeds}, {row.num_unfinished} unfinished" if row.num_unfinished else row.seeds for row in series_rows
    ]
    columns["steps"] = [_spread(row.steps, ",.0f") for row in series_rows]
    rows = [*zip(*columns.values(), strict=True)]
    return Table([*columns], rows, capitalize(metric.title), " ".join(filter(None, _quality_note(comparison))))


def _quality_note(comparison: Comparison) -> Iterator[str]:
    """Yield what the numbers of the table are, only as far as it has them."""
    rows, metric, baseline = comparison.rows, comparison.metric, comparison.baseline.label
    if metric.evaluations > 1:
        evaluations = len(comparison.window) if comparison.window else metric.evaluations
        yield f"Each value is the mean of the last {evaluations} evaluations of a run."
    if any(row.seeds > 1 for row in rows):
        yield "Values are means over seeds (least to most)."
    others = [row for row in rows if row.verdict != Verdict.BASELINE]
    if any(row.over is not None and row.over.interval is not None for row in others):
        yield (
            f"Gain over {baseline}: how much lower the {metric.title} is, with its 95 % interval, run by run of the "
            "same seed (Student) or, where fewer than two seeds match, of the means (Welch)."
        )
    for verdict in dict.fromkeys(row.verdict for row in rows):
        yield _VERDICT_CAPTIONS.get(verdict, "")


def _speed_table(comparison: Comparison) -> Table:
    """Return how many times faster than the baseline each series reaches a quality, and its steps, time and FLOPs."""
    baseline, quality = comparison.baseline.label, comparison.quality
    goal = f"what {baseline} ends with" if quality is None else f"{comparison.metric.title} {quality:g}"
    formats: tuple[Callable[[float], str], ...] = ("{:,.0f}".format, clock, si)
    rows = []
    for row in comparison.rows:
        # The baseline reaches its own final quality after one times its own cost.
        is_trivial = row.label == baseline and quality is None
        factors = ["" if is_trivial else factor and _speed_up(factor) for factor in row.speed.factors]
        costs = [cost and write(cost.mean) for cost, write in zip(row.speed.costs, formats, strict=True)]
        rows.append([row.label, *factors, f"{row.speed.reached} of {row.seeds}", *costs])
    note = (
        f"x: how many times fewer steps, seconds and FLOPs than {baseline}, run by run, against its run of the same "
        "seed where there is one; in parentheses the 95 % interval, from Student's t of the logarithms. Steps, time "
        "and FLOPs are means over the runs that reach it, interpolated on straight lines between evaluations in "
        "training; -: not reached, or reached before the first evaluation. FLOPs are forward and backward."
    )
    headings = ("series", "x steps", "x time", "x FLOPs", "reach it", "steps", "time", "FLOPs")
    return Table(headings, rows, f"Speed-up to {goal}, interpolated", note)


def _speed_up(factor: Effect) -> str:
    """Return the factor with its interval where it is more than chance, else why it says nothing."""
    if factor.verdict == Verdict.BASELINE or factor.verdict.is_difference:
        return factor.text(".2f")
    if factor.verdict == Verdict.SOME_SEEDS:  # the number would be of the fast seeds alone
        return str(factor.verdict)
    doubt = factor.interval.text(".2f") if factor.interval else f"{factor.spread.mean:.2f}"
    return f"{factor.verdict} ({doubt})"


def _size_table(comparison: Comparison) -> Table:
    rows = []
    for row in comparison.rows:
        sizes = [None if size is None else si(size) for size in row.sizes.values()]
        rows.append([row.label, _spread(row.tokens_per_second, si), _spread(row.dropped, ".1%"), *sizes])
    note = (
        "Tokens/s and dropped are means over seeds (least to most). Dropped: the share of tokens without a slot over "
        "the last tenth of the run. Active: the parameters that process a token. FLOPs are of the forward pass, by the "
        "paper's formula."
    )
    headings = ("series", "tokens/s", "dropped", "parameters", "active", "FLOPs a sequence")
    return Table(headings, rows, "Size and speed", note)


class ScoreTable(NamedTuple):
    """Scores of tasks, or metrics of held-out texts, by series."""

    name: str
    title: str
    row_kind: str
    """What a row is of: a task or a text."""
    number_format: str
    scores: Scores
    note: str

    def table(self) -> Table:
        """Return the table for people, with a row per task or text and a column per series."""
        names = dict.fromkeys(name for by_name in self.scores.values() for name in by_name)
        rows = [
            [name, *(_spread(by_name.get(name), self.number_format) for by_name in self.scores.values())]
            for name in names
        ]
        return Table((self.row_kind, *self.scores), rows, self.title, self.note)

    def to_json(self) -> dict[str, Any]:
        """Return the mean, least and most by series and by task or text."""
        return {
            label: {name: spread._asdict() for name, spread in by_name.items()}
            for label, by_name in self.scores.items()
        }

    def by_row(self) -> Table:
        """Return the table for a file, with a row per series and task or text."""
        rows = [(label, name, *spread) for label, by_name in self.scores.items() for name, spread in by_name.items()]
        return Table(("series", self.row_kind, "value", "least", "most"), rows, name=self.name)


def score_tables(report: Report) -> Iterator[ScoreTable]:
    """Yield the tables of task scores and of held-out texts that the runs have results for."""
    runs = report.runs_by_label
    if scores := task_results.tasks(runs):
        note = "Scores from 0 to 100, means over seeds (least to most)."
        yield ScoreTable("tasks", "Tasks", "task", ".2f", scores, note)
    titles = {LOSS: "Loss by text"} if task_results.by_tokens(runs) else {}
    for metric, title in {**titles, BITS_PER_BYTE: "Bits per byte by text"}.items():
        if scores := task_results.texts(runs, metric):
            note = "Held-out text of each language or corpus, means over seeds (least to most)."
            yield ScoreTable(f"texts_{metric}", title, "text", ".4f", scores, note)


def _shown_scores(report: Report) -> Iterator[Table]:
    """Yield the tables for people: scores of tasks and texts by series, and the gains of tasks over the baseline."""
    yield from (scores.table() for scores in score_tables(report))
    if report.comparison is not None and report.comparison.task_gains:
        yield _gain_table(report.comparison)


def _gain_table(comparison: Comparison) -> Table:
    """Return the gain in the score of each task over the baseline, with its verdict."""
    rows = [
        (name, label, effect.verdict, effect.text("+z.2f"))
        for label, effects in comparison.task_gains.items()
        for name, effect in effects.items()
    ]
    note = (
        "Gain: how many points more, with its 95 % interval over seeds, as for the held-out loss. It does not show the "
        "variance from the choice of examples, of which `switchcli eval` has an interval."
    )
    headings = ("task", "series", "verdict", f"gain over {comparison.baseline.label}")
    return Table(headings, rows, "Gains in tasks", note)


def _run_table(report: Report) -> Table:
    rows: list[Sequence[Value]] = []
    for run in [run for series in (*report.trained, *report.evaluations) for run in series.runs]:
        ended, final, seconds = (run.number(name) for name in ("step", HELD_OUT, "seconds"))
        step = run.step if ended is None else int(ended)
        versions = as_mapping(run.result.get("versions"))
        named_versions = [f"{name} {versions[name]}" for name in ("switchcli", "torch") if name in versions]
        rows.append(
            (
                run.name,
                run.verb or None,
                None if run.seed is None else str(run.seed),
                f"{step:,}" if run.steps in (None, step) else f"{step:,} of {run.steps:,}",
                None if final is None else f"{-final:.4f}",
                clock(float(run.seconds.values[-1]) if seconds is None else seconds),
                str(as_mapping(run.result.get("hardware")).get("device", "-")),
                ", ".join(named_versions) or None,
            )
        )
    return Table(("folder", "verb", "seed", "steps", "held-out loss", "time", "device", "versions"), rows)


def _spread(value: SeedSpread | None, write: str | Callable[[float], str]) -> str | None:
    return None if value is None else value.text(write)


# Page


def title(report: Report) -> str:
    """Return the title of the page, which counts runs, series and evaluations, and names checkpoints."""
    num_runs = sum(len(series.runs) for series in report.trained)
    counts = {"run": num_runs, "evaluation": len(report.evaluations)}
    counted = [f"{count} {noun}{'s' if count > 1 else ''}" for noun, count in counts.items() if count]
    if len(report.trained) > 1:
        counted[0] += f" in {len(report.trained)} series"
    if report.routing is not None:
        counted.append(f"routing of {routing_section.checkpoint_title(report.routing)}")
    return f"switchcli report: {', '.join(counted)}"


def parts(report: Report) -> Iterator[Part]:
    """Yield the page: notes, then a section per topic that the runs or checkpoints know something of."""
    yield html_page.paragraphs(*report.notes, kind="note")
    comparison = report.comparison
    if comparison is not None:
        yield html_page.section("Overview", *overview(comparison))
        yield html_page.paragraphs(_USAGE, kind="caption")
        if curves := figures.quality(comparison) + figures.experts(comparison):
            yield html_page.section("Quality", html_page.charts(curves))
        if curves := figures.training(comparison):
            first = html_page.charts(curves[:1] + figures.rates(comparison))
            others = html_page.collapsible("Against other measures than steps", html_page.charts(curves[1:]))
            yield html_page.section("Training", first, others)
        if curves := figures.routing(comparison):
            yield html_page.section("Routing", html_page.charts(curves))
        loads = [
            html_page.collapsible(label, html_page.charts(maps), is_open=index == 0)
            for index, (label, maps) in enumerate(figures.loads(comparison))
        ]
        if loads:
            yield html_page.section("Expert load", html_page.paragraphs(_LOAD_CAPTION), *loads)
    if scores := [*_shown_scores(report)]:
        yield html_page.section("Tasks and languages", *scores)
    if comparison is not None:
        if rows := [[key, *map(_recipe_value, values)] for key, values in differences(comparison.series).items()]:
            note = "Keys of the recipes that are the same in all series are left out."
            yield html_page.section("Recipes", Table(("key", *comparison.labels), rows, note=note))
        if samples := [*_samples(comparison)]:
            caption = "Held-out texts, their targets, and the answer of each series."
            yield html_page.section("Samples", html_page.paragraphs(caption), *samples)
    if report.routing is not None:
        yield routing_section.section(report.routing)
    if report.runs_by_label:
        yield html_page.section("Runs", _run_table(report))


def _recipe_value(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _samples(comparison: Comparison) -> Iterator[Part]:
    """Yield held-out texts with the answer of each series, given by its first run that has samples."""
    answers_to: dict[tuple[str, str], dict[str, str]] = {}
    for series in comparison.series:
        samples = (run.result["samples"] for run in series.runs if isinstance(run.result.get("samples"), list))
        for sample in map(as_mapping, next(samples, [])):
            text, target, prediction = (str(sample.get(key, "")) for key in ("input", "target", "prediction"))
            answers_to.setdefault((text, target), {})[series.label] = prediction
    for number, ((text, target), answers) in enumerate([*answers_to.items()][:MAX_SAMPLES], start=1):
        yield html_page.sample(f"Text {number}", {"input": text, "target": target, **answers})


# Files


def every_table(report: Report) -> Iterator[Table]:
    """Yield the tables that belong to no figure, for files: scores and series."""
    yield from (scores.by_row() for scores in score_tables(report))
    if (comparison := report.comparison) is not None:
        rows = [row.flat() for row in comparison.rows]
        yield Table([*rows[0]], [[*row.values()] for row in rows], name="runs")


def to_json(report: Report) -> Mapping[str, Any]:
    """Return the comparison, the rows of its tables, the notes and the routing, for scripts."""
    comparison = report.comparison
    compared: dict[str, Any] = {}
    if comparison is not None:
        compared = {
            "baseline": comparison.baseline.label,
            "measure": comparison.metric.name,
            "common_step": comparison.common_step,
            "differences": {
                # JSON holds no NaN and infinity: they become text.
                key: dict(zip(comparison.labels, json.loads(json.dumps(values), parse_constant=str), strict=True))
                for key, values in differences(comparison.series).items()
            },
        }
    return {
        **compared,
        "series": [row.to_json() for row in comparison.rows] if comparison is not None else [],
        "task_gains": {
            label: {name: {**judged_json(effect), "verdict": effect.verdict} for name, effect in effects.items()}
            for label, effects in (comparison.task_gains if comparison is not None else {}).items()
        },
        "tables": {scores.name: scores.to_json() for scores in score_tables(report)},
        "notes": [*report.notes],
        "routing": report.routing,
    }
