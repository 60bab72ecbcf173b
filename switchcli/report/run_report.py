"""The report of runs: its tables for a terminal, the sections of its page, its files and its JSON object."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from switchcli.metric_names import BITS_PER_BYTE, HELD_OUT, NEG_LOG_PERPLEXITY
from switchcli.report import figures, html_page, task_results
from switchcli.report.charts import Figure, Table
from switchcli.report.comparison import Comparison
from switchcli.report.html_page import HtmlTable, Part
from switchcli.report.runs import Run, as_mapping
from switchcli.report.safe_text import capitalize
from switchcli.report.series import SeedSpread, Series, differences
from switchcli.report.task_results import Scores
from switchcli.report.units import clock, si

MAX_SAMPLES = 12
"""Texts with answers that a page shows, at most."""
_USAGE = (
    "Click a series to hide it in all charts. In a chart, Ctrl and the wheel zoom, a drag moves, a double click resets."
)


class Report(NamedTuple):
    """What the folders hold: trained runs compared with each other, and evaluations."""

    comparison: Comparison | None
    """The runs that trained; None where there are evaluations alone."""
    evaluations: Sequence[Series]
    """Folders of `switchcli eval`, each a series by itself."""
    notes: Sequence[str]

    @property
    def trained(self) -> Sequence[Series]:
        return self.comparison.series if self.comparison else ()

    @property
    def runs_by_label(self) -> dict[str, Sequence[Run]]:
        return {series.label: series.runs for series in (*self.trained, *self.evaluations)}


# Tables


def tables(report: Report) -> Iterator[HtmlTable]:
    """Yield the tables for a terminal: quality and speed-up, sizes and rates, then scores."""
    if report.comparison is not None:
        yield from overview(report.comparison)
    yield from (table.to_html() for table in score_tables(report))


def overview(comparison: Comparison) -> list[HtmlTable]:
    """Return the tables with a row per series: quality, speed-up, and size with rates."""
    return [quality_table(comparison), _speed_table(comparison), _size_table(comparison)]


def quality_table(comparison: Comparison) -> HtmlTable:
    """Return the held-out quality of each series, and how much better it is than the baseline."""
    baseline, metric = comparison.baseline.label, comparison.metric
    at_common = [] if comparison.common_step is None else [f"at step {comparison.common_step:,}"]
    rows = []
    for row in comparison.rows:
        unfinished = f", {row.num_unfinished} going on" if row.num_unfinished else ""
        cells = [row.label, f"{row.seeds}{unfinished}", _spread(row.steps, ",.0f"), _spread(row.final, ".4f")]
        cells += [_spread(row.at_common, ".4f") for _ in at_common]
        rows.append([*cells, "" if row.label == baseline else _spread(row.over, "+.4f")])
    smoothed = f", each the mean of the last {metric.evaluations} evaluations" if metric.evaluations > 1 else ""
    caption = (
        f"The mean over seeds (least to most){smoothed}. Over {baseline}: run by run, against its run of the same seed "
        "where there is one."
    )
    over = " ".join([f"over {baseline}", *at_common])
    return HtmlTable(
        capitalize(metric.title), ("series", "seeds", "steps", "at the end", *at_common, over), rows, caption
    )


def _speed_table(comparison: Comparison) -> HtmlTable:
    """Return how many times faster than the baseline each series reaches a quality, and its steps, time and FLOPs."""
    baseline, quality = comparison.baseline.label, comparison.quality
    goal = f"what {baseline} ends with" if quality is None else f"{comparison.metric.title} {quality:g}"
    formats: tuple[Callable[[float], str], ...] = ("{:,.0f}".format, clock, si)
    rows = []
    for row in comparison.rows:
        # The baseline reaches its own final quality after one times its own cost.
        is_trivial = row.label == baseline and quality is None
        factors = ["" if is_trivial else _spread(factor, ".2f") for factor in row.speed.factors]
        costs = [
            "-" if cost is None else write(cost.mean) for cost, write in zip(row.speed.costs, formats, strict=True)
        ]
        rows.append([row.label, f"{row.speed.reached} of {row.seeds}", *factors, *costs])
    caption = (
        f"x: how many times fewer steps, seconds and FLOPs than {baseline}, run by run, against its run of the same "
        "seed where there is one; then the series' own. Means over the seeds that reach the quality (least to most); - "
        "where none does. A run reaches it where the straight line between two evaluations first does. A mean of "
        "evaluations counts at the mean of their steps. FLOPs are those of training, forward and backward."
    )
    headings = ("series", "reach it", "x steps", "x time", "x FLOPs", "steps", "time", "FLOPs")
    return HtmlTable(f"Speed-up to {goal}", headings, rows, caption)


def _size_table(comparison: Comparison) -> HtmlTable:
    rows = []
    for row in comparison.rows:
        sizes = ["-" if size is None else si(size) for size in row.sizes.values()]
        rows.append([row.label, *sizes, _spread(row.tokens_per_second, si), _spread(row.dropped, ".1%")])
    caption = (
        "Active parameters are those that process a token. FLOPs are of the forward pass, by the paper's formula. "
        "Dropped is the share of tokens without a slot over the last tenth of the run."
    )
    headings = ("series", "parameters", "active", "FLOPs a sequence", "tokens/s", "dropped")
    return HtmlTable("Size and speed", headings, rows, caption)


class ScoreTable(NamedTuple):
    """Scores of tasks, or metrics of held-out texts, by series."""

    name: str
    title: str
    row_kind: str
    """`task` or `text`: the heading of the first column."""
    number_format: str
    scores: Scores
    caption: str

    def to_html(self) -> HtmlTable:
        """Return the table with a row per task or text and a column per series."""
        names = dict.fromkeys(name for by_name in self.scores.values() for name in by_name)
        rows = [
            [name, *(_spread(by_name.get(name), self.number_format) for by_name in self.scores.values())]
            for name in names
        ]
        return HtmlTable(self.title, (self.row_kind, *self.scores), rows, self.caption)

    def to_json(self) -> dict[str, Any]:
        """Return the mean, least and most by series and by task or text."""
        return {
            label: {name: spread._asdict() for name, spread in by_name.items()}
            for label, by_name in self.scores.items()
        }

    def to_table(self) -> Table:
        """Return the table for a file, with a row per series and task or text."""
        rows = [(label, name, *spread) for label, by_name in self.scores.items() for name, spread in by_name.items()]
        return Table(self.name, ("series", self.row_kind, "value", "least", "most"), rows)


def score_tables(report: Report) -> Iterator[ScoreTable]:
    """Yield the tables of task scores and of held-out texts that the runs have results for."""
    runs = report.runs_by_label
    if scores := task_results.tasks(runs):
        caption = "Scores from 0 to 100, the mean over seeds (least to most)."
        yield ScoreTable("tasks", "Tasks", "task", ".2f", scores, caption)
    titles = {NEG_LOG_PERPLEXITY: "Neg. log perplexity by text"} if task_results.by_tokens(runs) else {}
    for metric, title in {**titles, BITS_PER_BYTE: "Bits a byte by text"}.items():
        if scores := task_results.texts(runs, metric):
            caption = "Held-out text of each language or corpus."
            yield ScoreTable(f"texts_{metric}", title, "text", ".4f", scores, caption)


def _difference_table(comparison: Comparison) -> HtmlTable | None:
    rows = [[key, *map(_recipe_value, values)] for key, values in differences(comparison.series).items()]
    if not rows:
        return None
    headings = ("key", *(series.label for series in comparison.series))
    return HtmlTable("", headings, rows, "Keys of the recipes that are the same in all series are left out.")


def _recipe_value(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _run_table(report: Report) -> HtmlTable:
    rows = []
    for run in [run for series in (*report.trained, *report.evaluations) for run in series.runs]:
        ended, final, seconds = (run.number(name) for name in ("step", HELD_OUT, "seconds"))
        step = run.step if ended is None else int(ended)
        rows.append(
            [
                run.name,
                run.verb or "-",
                "-" if run.seed is None else str(run.seed),
                f"{step:,}" if run.steps in (None, step) else f"{step:,} of {run.steps:,}",
                "-" if final is None else f"{final:.4f}",
                clock(float(run.seconds.values[-1]) if seconds is None else seconds),
            ]
        )
    return HtmlTable("", ("folder", "verb", "seed", "steps", "held-out neg. log perplexity", "time"), rows)


def _spread(value: SeedSpread | None, write: str | Callable[[float], str]) -> str:
    return "-" if value is None else value.text(write)


# Page


def title(report: Report) -> str:
    """Return the title of the page, which counts runs, series and evaluations."""
    num_runs = sum(len(series.runs) for series in report.trained)
    counts = {"run": num_runs, "evaluation": len(report.evaluations)}
    counted = [f"{count} {noun}{'s' if count > 1 else ''}" for noun, count in counts.items() if count]
    if len(report.trained) > 1:
        counted[0] += f" in {len(report.trained)} series"
    return f"switchcli report: {', '.join(counted)}"


def parts(report: Report) -> Iterator[Part]:
    """Yield the page: notes, highlights and a legend, then a section per topic that the runs know something of."""
    yield html_page.paragraphs(*report.notes, kind="note")
    comparison = report.comparison
    if comparison is not None:
        yield html_page.highlights(highlights(comparison))
        yield html_page.section("Overview", *overview(comparison))
        yield html_page.legend([series.label for series in comparison.series])
        yield html_page.paragraphs(_USAGE, kind="caption")
        if curves := figures.quality(comparison):
            yield html_page.section("Quality", html_page.charts(curves))
        if curves := figures.training(comparison):
            first = html_page.charts(curves[:1] + figures.rates(comparison))
            others = html_page.collapsible("Against tokens, wall time and FLOPs", html_page.charts(curves[1:]))
            yield html_page.section("Training", first, others)
        if curves := figures.routing(comparison):
            yield html_page.section("Routing", html_page.charts(curves))
        if loads := _expert_loads(comparison):
            yield html_page.section("Expert load", *loads)
    if scores := [table.to_html() for table in score_tables(report)]:
        yield html_page.section("Tasks and languages", *scores)
    if comparison is not None:
        if (table := _difference_table(comparison)) is not None:
            yield html_page.section("Recipes", table)
        if samples := [*_samples(comparison)]:
            caption = "Held-out texts, their targets, and the answer of each series."
            yield html_page.section("Samples", html_page.paragraphs(caption), *samples)
    yield html_page.section("Runs", _run_table(report))


def highlights(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the best series, where all runs have come to, and the fastest over the baseline, as (value, caption)."""
    metric, baseline, step = comparison.metric, comparison.baseline.label, comparison.common_step
    values = {row.label: row.final if step is None else row.at_common for row in comparison.rows}
    means = {label: value.mean for label, value in values.items() if value is not None}
    if not means:
        return [(str(len(comparison.rows)), "series, none of them evaluated yet")]
    ranked = sorted(means, key=lambda label: -metric.sign * means[label])
    best = [label for label in ranked if means[label] == means[ranked[0]]]
    where = "at the end" if step is None else f"at step {step:,}"
    verb, pronoun = ("are", "their") if len(best) > 1 else ("is", "its")
    highlights = [
        (", ".join(best), f"{verb} best {where}{_doubt(comparison, ranked, len(best))}"),
        (f"{means[best[0]]:.4f}", f"{pronoun} {metric.title}"),
    ]
    # A speed-up of some seeds alone is no headline.
    others = [row for row in comparison.rows if row.label != baseline and row.speed.reached == row.seeds]
    for index, unit in enumerate(("steps", "time")):
        factors = [(factor.mean, row.label) for row in others if (factor := row.speed.factors[index]) is not None]
        if factors:
            fastest, label = max(factors)
            highlights.append((f"{fastest:.2f} x", f"speed-up of {label} over {baseline}, in {unit}"))
    return highlights


def _doubt(comparison: Comparison, ranked: Sequence[str], num_best: int) -> str:
    """Return a remark where the best series is not better than the next best one with every seed."""
    if num_best == len(ranked):
        return ""
    series = {one.label: one for one in comparison.series}
    gain = comparison.gain(series[ranked[0]], series[ranked[num_best]])
    return ", not with every seed" if gain is not None and gain.least <= 0 else ""


def _expert_loads(comparison: Comparison) -> list[Part]:
    """Return the heat maps of the first series, and those of the others folded."""
    caption = (
        "Each expert's share of its layer's tokens, as a multiple of the even share, over the run of the first seed: 1 "
        "is even, dark experts are hardly used, light ones are crowded."
    )
    parts: list[Part] = []
    for label, maps in figures.loads(comparison):
        if parts:
            parts.append(html_page.collapsible(label, html_page.charts(maps)))
        else:
            parts += [html_page.paragraphs(caption), html_page.paragraphs(label), html_page.charts(maps)]
    return parts


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


def every_figure(report: Report) -> Iterator[Figure]:
    """Yield the figures of the page, for files."""
    if report.comparison is None:
        return
    for charts_of in (figures.quality, figures.training, figures.routing, figures.rates):
        yield from charts_of(report.comparison)
    for label, maps in figures.loads(report.comparison):
        yield from (figure._replace(title=f"{label}: {figure.title}") for figure in maps)


def every_table(report: Report) -> Iterator[Table]:
    """Yield the tables that belong to no figure, for files: scores, all series, and what their recipes differ in."""
    yield from (table.to_table() for table in score_tables(report))
    if (comparison := report.comparison) is not None:
        rows = [row.flat() for row in comparison.rows]
        yield Table("runs", [*rows[0]], [[*row.values()] for row in rows])
        yield Table("recipes", ("key", "series", "value"), [*_difference_rows(comparison)])


def _difference_rows(comparison: Comparison) -> Iterator[tuple[str, str, str | float | None]]:
    """Yield a row per key and series, with None where the recipe has no such key."""
    for key, values in differences(comparison.series).items():
        for series, value in zip(comparison.series, values, strict=True):
            plain = value is None or type(value) in (int, float)
            yield key, series.label, value if plain else _recipe_value(value)


def to_json(report: Report) -> Mapping[str, Any]:
    """Return the comparison, the rows of its tables and the notes, for scripts."""
    comparison = report.comparison
    compared: dict[str, Any] = {}
    if comparison is not None:
        labels = [series.label for series in comparison.series]
        compared = {
            "baseline": comparison.baseline.label,
            "measure": comparison.metric.name,
            "common_step": comparison.common_step,
            "differences": {
                key: dict(zip(labels, _finite(values), strict=True))
                for key, values in differences(comparison.series).items()
            },
        }
    return {
        **compared,
        "series": [row.to_json() for row in comparison.rows] if comparison is not None else [],
        "tables": {table.name: table.to_json() for table in score_tables(report)},
        "notes": [*report.notes],
    }


def _finite(values: Sequence[Any]) -> Any:
    """Return the values as JSON can hold them: a number that is not finite becomes text."""
    return json.loads(json.dumps(values), parse_constant=str)
