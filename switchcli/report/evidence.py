"""A report of runs, put in words: the tables for a terminal, and the parts of the page."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from switchcli.metric_names import BITS_PER_BYTE, HELD_OUT, NEG_LOG_PERPLEXITY
from switchcli.report import figures, task_results
from switchcli.report.charts import Figure, Table, Value
from switchcli.report.comparison import Comparison
from switchcli.report.html_page import (
    Charts,
    Collapsible,
    HtmlTable,
    KeyFigures,
    Legend,
    Paragraphs,
    Part,
    Sample,
    Section,
)
from switchcli.report.runs import Run, as_mapping
from switchcli.report.safe_text import capitalize
from switchcli.report.series import SeedSpread, Series, differences
from switchcli.report.task_results import Figures
from switchcli.report.units import clock, si

SAMPLES = 12
"""Texts that a page shows, at most."""
HINT = (
    "A click on a series hides it, in all charts. In a chart Ctrl and the wheel zoom, a drag moves, two clicks go back."
)


class Report(NamedTuple):
    """What was found in the folders."""

    comparison: Comparison | None
    """Of the runs that trained; None where there are evaluations alone."""
    evaluations: Sequence[Series]
    """Folders of `switchcli eval`, each by itself."""
    notes: Sequence[str]

    @property
    def trained(self) -> list[Run]:
        return [run for one in self.comparison.series for run in one.runs] if self.comparison else []

    @property
    def holders(self) -> dict[str, Sequence[Run]]:
        """All runs by their labels."""
        return {
            one.label: one.runs for one in [*(self.comparison.series if self.comparison else ()), *self.evaluations]
        }


def tables(report: Report) -> Iterator[HtmlTable]:
    """For a terminal: quality and speed-up, then sizes and rates, then scores."""
    if report.comparison is not None:
        yield quality_table(report.comparison)
        yield speed_table(report.comparison)
        yield size_table(report.comparison)
    yield from (one.shown() for one in score_tables(report))


def quality_table(found: Comparison) -> HtmlTable:
    base = found.baseline.label
    at = "" if found.common_step is None else f"at step {found.common_step:,}"
    common = (at,) if at else ()
    rows = [
        [
            row.label,
            f"{row.seeds}" + (f", {row.going_on} going on" if row.going_on else ""),
            _said(row.steps, ",.0f"),
            _said(row.final, ".4f"),
            *([_said(row.at_common, ".4f")] if common else []),
            "" if row.label == base else _said(row.over, "+.4f"),
        ]
        for row in found.rows
    ]
    several = (
        f", each the mean of the last {found.measure.evaluations} evaluations" if found.measure.evaluations > 1 else ""
    )
    caption = (
        f"The mean over seeds (least to most){several}; over {base}: run by run, of the same seed where there is one."
    )
    headings = ("series", "seeds", "steps", "at the end", *common, f"over {base} {at}".strip())
    return HtmlTable(capitalize(found.measure.title), headings, rows, caption)


def speed_table(found: Comparison) -> HtmlTable:
    """How many times faster than the baseline, and what it takes."""
    base = found.baseline.label
    goal = f"{found.measure.title} {found.quality:g}" if found.quality is not None else f"what {base} ends with"
    rows = []
    for row in found.rows:
        steps, seconds, flops = row.speed.costs
        own = row.label == base and found.quality is None
        times = ["" if own else _said(one, ".2f") for one in row.speed.times]
        costs = [
            "-" if cost is None else write(cost.mean)
            for cost, write in ((steps, "{:,.0f}".format), (seconds, clock), (flops, si))
        ]
        rows.append([row.label, f"{row.speed.reached} of {row.seeds}", *times, *costs])
    caption = (
        f"x: how many times fewer steps, seconds and FLOPs than {base}, run by run, of the same seed where there is "
        "one; then the series' own. Means over the seeds that reach it (least to most): where the straight line "
        "between two evaluations first is as good, in both runs alike; - where it never is. A mean of evaluations "
        "stands at the mean of their steps. FLOPs are those of training, forward and backward."
    )
    headings = ("series", "reach it", "x steps", "x time", "x FLOPs", "steps", "time", "FLOPs")
    return HtmlTable(f"Speed-up to {goal}", headings, rows, caption)


def size_table(found: Comparison) -> HtmlTable:
    rows = []
    for row in found.rows:
        sizes = ["-" if size is None else si(size) for size in row.sizes.values()]
        rows.append([row.label, *sizes, _between(row.tokens_per_second, si), _said(row.dropped, ".1%")])
    caption = (
        "Active parameters are those that a token meets; FLOPs are forward, by the formula of the paper; dropped is "
        "the share of the tokens over the last tenth of the run."
    )
    headings = ("series", "parameters", "active", "FLOPs a sequence", "tokens/s", "dropped")
    return HtmlTable("Size and speed", headings, rows, caption)


class ScoreTable(NamedTuple):
    """Scores of tasks, or figures of languages or corpora."""

    name: str
    """Of its file."""
    title: str
    what: str
    """Of a row: task or text."""
    form: str
    figures: Figures
    caption: str

    def shown(self) -> HtmlTable:
        """A row a task or text, a column a series."""
        names = dict.fromkeys(name for values in self.figures.values() for name in values)
        rows = [[name, *(_said(values.get(name), self.form) for values in self.figures.values())] for name in names]
        return HtmlTable(self.title, (self.what, *self.figures), rows, self.caption)

    def to_json(self) -> dict[str, Any]:
        """For scripts: by series and by row."""
        return {label: {name: one._asdict() for name, one in values.items()} for label, values in self.figures.items()}

    def table(self) -> Table:
        """For a file: a row a figure."""
        each = [(label, name, one) for label, values in self.figures.items() for name, one in values.items()]
        columns: dict[str, list[Value]] = {"series": [label for label, _, _ in each]}
        columns[self.what] = [name for _, name, _ in each]
        for key, place in {"value": 0, "least": 1, "most": 2}.items():
            columns[key] = [one[place] for _, _, one in each]
        return Table(self.name, columns)


def score_tables(report: Report) -> Iterator[ScoreTable]:
    """All that there is."""
    holders = report.holders
    if found := task_results.tasks(holders):
        said = "Scores from 0 to 100, the mean over seeds (least to most)."
        yield ScoreTable("tasks", "Tasks", "task", ".2f", found, said)
    titles = {NEG_LOG_PERPLEXITY: "Neg. log perplexity by text"} if task_results.by_tokens(holders) else {}
    for figure, title in {**titles, BITS_PER_BYTE: "Bits a byte by text"}.items():
        if found := task_results.texts(holders, figure):
            said = "Held-out text of each language or corpus."
            yield ScoreTable(f"texts_{figure}", title, "text", ".4f", found, said)


def difference_table(found: Comparison) -> HtmlTable | None:
    differing = differences(found.series)
    rows = [[key, *(_written(value) for value in values)] for key, values in differing.items()]
    if not rows:
        return None
    return HtmlTable(
        "",
        ("key", *(one.label for one in found.series)),
        rows,
        "Keys of the recipes that are the same in all series are left out.",
    )


def difference_file(found: Comparison) -> Table:
    """The same for a file: a row a value, empty where the recipe has no such key."""
    each = [
        (key, one.label, value)
        for key, values in differences(found.series).items()
        for one, value in zip(found.series, values, strict=True)
    ]
    plain = [value if value is None or type(value) in (int, float) else _written(value) for _, _, value in each]
    return Table(
        "recipes", {"key": [key for key, _, _ in each], "series": [label for _, label, _ in each], "value": plain}
    )


def _written(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parts(report: Report) -> Iterator[Part]:
    """The page."""
    yield Paragraphs(tuple(report.notes), "note")
    found = report.comparison
    if found is not None:
        yield KeyFigures(_facts(found))
        yield Section("Overview", [quality_table(found), speed_table(found), size_table(found)])
        yield Legend([one.label for one in found.series])
        yield Paragraphs([HINT], "caption")
        if curves := figures.quality(found):
            yield Section("Quality", [Charts(curves)])
        if curves := figures.training(found):
            yield Section(
                "Training",
                [
                    Charts(curves[:1] + figures.rates(found)),
                    Collapsible("Against tokens, wall time and FLOPs", [Charts(curves[1:])]),
                ],
            )
        if curves := figures.routing(found):
            yield Section("Routing", [Charts(curves)])
        if maps := [*figures.loads(found)]:
            yield Section("Expert load", [*_maps(maps)])
    if shown := [one.shown() for one in score_tables(report)]:
        yield Section("Tasks and languages", shown)
    if found is not None:
        if (table := difference_table(found)) is not None:
            yield Section("Recipes", [table])
        if samples := [*_samples(found)]:
            yield Section(
                "Samples",
                [
                    Paragraphs(["Held-out texts, what is asked for, and what each series answers."]),
                    *samples,
                ],
            )
    yield Section("Runs", [_run_table(report)])


def _maps(maps: Sequence[tuple[str, Sequence[Figure]]]) -> Iterator[Part]:
    yield Paragraphs(
        [
            "Each expert's share of its layer's tokens, times the even share, over the run of the first seed: 1 is "
            "even, dark experts are hardly used, light ones are crowded."
        ]
    )
    for place, (label, drawn) in enumerate(maps):
        if place == 0:
            yield Paragraphs([label])
            yield Charts(drawn)
        else:
            yield Collapsible(label, [Charts(drawn)])


def every_figure(report: Report) -> Iterator[Figure]:
    """All of the page, for files."""
    if (found := report.comparison) is not None:
        for some in (figures.quality, figures.training, figures.routing, figures.rates):
            yield from some(found)
        for label, maps in figures.loads(found):
            yield from (one._replace(title=f"{label}: {one.title}") for one in maps)


def every_table(report: Report) -> Iterator[Table]:
    """Yield the tables that belong to no figure, for files: scores, all series, and what their recipes differ in."""
    yield from (one.table() for one in score_tables(report))
    if (found := report.comparison) is not None:
        rows = [row.flat() for row in found.rows]
        yield Table("runs", {key: [row[key] for row in rows] for key in rows[0]})
        yield difference_file(found)


def title(report: Report) -> str:
    """Return the title of the page: how many runs, series and evaluations it is of."""
    counts = {"run": len(report.trained), "evaluation": len(report.evaluations)}
    counted = [f"{count} {what}{'s' if count > 1 else ''}" for what, count in counts.items() if count]
    if report.comparison is not None and len(report.comparison.series) > 1:
        counted[0] += f" in {len(report.comparison.series)} series"
    return f"switchcli report: {', '.join(counted)}"


def to_json(report: Report) -> dict[str, Any]:
    """Return the comparison, the rows of its tables and the notes, for scripts."""
    comparison = report.comparison
    rows = [] if comparison is None else [row.to_json() for row in comparison.rows]
    by_name = {one.name: one.to_json() for one in score_tables(report)}
    compared: dict[str, Any] = {}
    if comparison is not None:
        compared = {
            "baseline": comparison.baseline.label,
            "measure": comparison.measure.figure,
            "common_step": comparison.common_step,
            "differences": {
                key: dict(zip([one.label for one in comparison.series], _finite(values), strict=True))
                for key, values in differences(comparison.series).items()
            },
        }
    return {**compared, "series": rows, "tables": by_name, "notes": [*report.notes]}


def _finite(values: Sequence[Any]) -> Any:
    """Return the values as JSON holds them: a number that is not finite becomes text."""
    return json.loads(json.dumps(values), parse_constant=str)


def _facts(found: Comparison) -> list[tuple[str, str]]:
    """The best series, where all have come to, and the fastest over the baseline."""
    measure, base = found.measure, found.baseline.label
    where = "at the end" if found.common_step is None else f"at step {found.common_step:,}"
    ends = {row.label: row.final if found.common_step is None else row.at_common for row in found.rows}
    known = {label: end for label, end in ends.items() if end is not None}
    if not known:
        return [(str(len(found.rows)), "series, none of them evaluated yet")]
    ranked = sorted(known, key=lambda label: -measure.sign * known[label].mean)
    best = [label for label in ranked if known[label].mean == known[ranked[0]].mean]
    series, rest = {one.label: one for one in found.series}, ranked[len(best) :]
    over = found.gain_over(series[best[0]], series[rest[0]]) if rest else None
    doubt = ", not with every seed" if over is not None and over.least <= 0 else ""
    are, their = ("are", "their") if len(best) > 1 else ("is", "its")
    facts = [(", ".join(best), f"{are} best {where}{doubt}")]
    facts.append((f"{known[best[0]].mean:.4f}", f"{their} {measure.title}"))
    others = [row for row in found.rows if row.label != base and row.speed.reached == row.seeds]
    for place, what in enumerate(("steps", "time")):
        some = [(times.mean, row.label) for row in others if (times := row.speed.times[place]) is not None]
        if some:
            factor, label = max(some)
            facts.append((f"{factor:.2f} x", f"speed-up of {label} over {base}, in {what}"))
    return facts


def _samples(found: Comparison) -> Iterator[Part]:
    """A text with what each series makes of it, by its first run that has some."""
    texts: dict[tuple[str, str], dict[str, str]] = {}
    for one in found.series:
        each = [run.result["samples"] for run in one.runs if isinstance(run.result.get("samples"), list)]
        for sample in next(iter(each), ()):
            said = {key: str(as_mapping(sample).get(key, "")) for key in ("input", "target", "prediction")}
            texts.setdefault((said["input"], said["target"]), {})[one.label] = said["prediction"]
    for place, ((asked, target), answers) in enumerate([*texts.items()][:SAMPLES], start=1):
        yield Sample(f"Text {place}", {"input": asked, "target": target, **answers})


def _run_table(report: Report) -> HtmlTable:
    rows = []
    for run in [*report.trained, *(run for one in report.evaluations for run in one.runs)]:
        step, final, seconds = (run.number(name) for name in ("step", HELD_OUT, "seconds"))
        step = run.step if step is None else int(step)
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


def _said(value: SeedSpread | None, form: str) -> str:
    return "-" if value is None else value.text(form)


def _between(value: SeedSpread | None, write: Callable[[float], str]) -> str:
    if value is None:
        return "-"
    if value.least == value.most:
        return write(value.mean)
    return f"{write(value.mean)} ({write(value.least)} to {write(value.most)})"
