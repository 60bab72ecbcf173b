"""A report of runs, put in words: the tables for a terminal, and the parts of the page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from switchcli.report import figures
from switchcli.report.charts import Figure
from switchcli.report.compare import Comparison, Row
from switchcli.report.html import Charts, Facts, Folded, HtmlTable, Legend, Part, Sample, Section, Words
from switchcli.report.runs import Run
from switchcli.report.series import Spread, differences, spread
from switchcli.report.units import clock, si

SAMPLES = 12
"""Texts that a page shows, at most."""


class Report(NamedTuple):
    """What was found in the folders."""

    comparison: Comparison | None
    """Of the runs that trained; None where there are evaluations alone."""
    evaluations: Sequence[Run]
    """Folders of `switchcli eval`."""
    notes: Sequence[str]

    @property
    def trained(self) -> list[Run]:
        return [run for one in self.comparison.series for run in one.runs] if self.comparison else []


def tables(report: Report) -> Iterator[HtmlTable]:
    """For a terminal: quality and speed-up, then sizes and rates, then scores."""
    if report.comparison is not None:
        yield quality_table(report.comparison)
        yield size_table(report.comparison)
    yield from task_tables(report)


def quality_table(found: Comparison) -> HtmlTable:
    measure, base = found.measure, found.baseline.label
    common = () if found.common_step is None else (f"at step {found.common_step:,}",)
    headings = ("series", "seeds", "steps", "at the end", *common, f"over {base}", "x steps", "x time", "x FLOPs")
    goal = f"the quality {found.quality:g}" if found.quality is not None else f"what {base} ends with, of the same seed"
    caption = (
        f"{_capital(measure.title)}: the mean over seeds (least to most). x: how many times fewer steps, seconds and "
        f"FLOPs than {base} it took to {goal}, first reached on a straight line between two evaluations"
        + (f", each the mean of {measure.evaluations}" if measure.evaluations > 1 else "")
        + "; - where it is never reached."
    )
    rows = [
        [
            row.label,
            f"{row.seeds}" + (f", {row.going_on} going on" if row.going_on else ""),
            _said(row.steps, ",.0f"),
            _said(row.final, ".4f"),
            *([_said(row.at_common, ".4f")] if common else []),
            "" if row.label == base else _said(row.over, "+.4f"),
            *("" if row.label == base and found.quality is None else _times(row, one) for one in row.speed.times),
        ]
        for row in found.rows
    ]
    return HtmlTable("Quality", headings, rows, caption)


def _times(row: Row, one: Spread | None) -> str:
    few = f", {row.speed.reached} of {row.seeds} seeds" if 0 < row.speed.reached < row.seeds else ""
    return _said(one, ".2f") + few


def cost_table(found: Comparison) -> HtmlTable:
    """Steps and time to the quality."""
    goal = (
        f"to {found.measure.title} {found.quality:g}"
        if found.quality is not None
        else f"to what {found.baseline.label} ends with"
    )
    rows = []
    for row in found.rows:
        steps, seconds, flops = row.speed.costs
        time = "-" if seconds is None else _between(seconds, clock)
        rows.append(
            [
                row.label,
                f"{row.speed.reached} of {row.seeds}",
                _said(steps, ",.0f"),
                time,
                "-" if flops is None else _between(flops, si),
            ]
        )
    return HtmlTable(f"Cost {goal}", ("series", "seeds that reach it", "steps", "time", "FLOPs"), rows)


def size_table(found: Comparison) -> HtmlTable:
    headings = ("series", "parameters", "a token meets", "FLOPs a sequence", "tokens/s", "dropped")
    rows = []
    for row in found.rows:
        sizes = ["-" if size is None else si(size) for size in row.sizes.values()]
        rate = "-" if row.tokens_per_second is None else _between(row.tokens_per_second, si)
        rows.append([row.label, *sizes, rate, _said(row.dropped, ".1%")])
    caption = (
        "FLOPs are forward, by the formula of the paper; dropped is the share of tokens over the last tenth of the run."
    )
    return HtmlTable("Size and speed", headings, rows, caption)


def task_tables(report: Report) -> Iterator[HtmlTable]:
    """Scores of tasks, and figures of languages or corpora: a row each, a column a series."""
    tasks = _by_holder(report, _scores)
    if tasks:
        yield _crossed("Tasks", "task", tasks, ".2f", "Scores from 0 to 100, the mean over seeds (least to most).")
    texts = {
        figure: _by_holder(report, lambda run, figure=figure: _texts(run, figure))
        for figure in ("neg_log_perplexity", "bits_per_byte")
    }
    said = {"neg_log_perplexity": "Neg. log perplexity by text", "bits_per_byte": "Bits a byte by text"}
    for figure, found in texts.items():
        if found and (figure == "bits_per_byte" or report.comparison is None or report.comparison.tokenizers < 2):
            yield _crossed(said[figure], "text", found, ".4f", "Held-out text of each language or corpus.")


def _scores(run: Run) -> dict[str, float]:
    """By task; of an evaluation under several capacities, by task and capacity."""
    passes = run.result.get("passes") or [run.result]
    found = {}
    for one in passes:
        capacity = f", capacity {one['capacity'].get('tasks')}" if len(passes) > 1 else ""
        for name, task in (one.get("tasks") or {}).items():
            score = (
                (task.get("score") or {}).get("value") if isinstance(task.get("score"), Mapping) else task.get("score")
            )
            if isinstance(score, int | float):
                found[f"{name}{capacity}"] = float(score)
        average = (one.get("average") or {}).get("score")
        if isinstance(average, int | float) and len(one.get("tasks") or {}) > 1:
            found[f"average{capacity}"] = float(average)
    return found


def _texts(run: Run, figure: str) -> dict[str, float]:
    passes = run.result.get("passes")
    texts = passes[0].get("texts") or {} if passes else run.result.get("texts") or run.texts
    return {name: figures[figure] for name, figures in texts.items() if figure in figures}


def _by_holder(report: Report, get: Any) -> dict[str, dict[str, Spread]]:
    """What `get` finds, over the seeds of each series and in each evaluation."""
    holders = {one.label: list(one.runs) for one in report.comparison.series} if report.comparison else {}
    holders |= {run.name: [run] for run in report.evaluations}
    found = {}
    for label, runs in holders.items():
        each = [values for run in runs if (values := get(run))]
        names = dict.fromkeys(name for values in each for name in values)
        spreads = {name: spread(values.get(name) for values in each) for name in names}
        if spreads:
            found[label] = {name: one for name, one in spreads.items() if one is not None}
    return found


def _crossed(title: str, what: str, found: Mapping[str, Mapping[str, Spread]], form: str, caption: str) -> HtmlTable:
    names = dict.fromkeys(name for values in found.values() for name in values)
    rows = [[name, *(_said(values.get(name), form) for values in found.values())] for name in names]
    return HtmlTable(title, (what, *found), rows, caption)


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


def _written(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parts(report: Report) -> Iterator[Part]:
    """The page."""
    yield Words(tuple(report.notes), "note")
    found = report.comparison
    if found is not None:
        yield Facts(_facts(found))
        yield Section("Overview", [quality_table(found), cost_table(found), size_table(found)])
        yield Legend([one.label for one in found.series])
        if curves := figures.quality(found):
            yield Section("Quality", [Charts(curves)])
        if curves := figures.training(found):
            yield Section(
                "Training",
                [
                    Charts(curves[:1] + figures.rates(found)),
                    Folded("Against tokens, wall time and FLOPs", [Charts(curves[1:])]),
                ],
            )
        if curves := figures.routing(found):
            yield Section("Routing", [Charts(curves)])
        if maps := [*figures.loads(found)]:
            yield Section("Expert load", [*_maps(maps)])
    if scores := [*task_tables(report)]:
        yield Section("Tasks and languages", scores)
    if found is not None:
        if (table := difference_table(found)) is not None:
            yield Section("Recipes", [table])
        if samples := [*_samples(report.trained)]:
            yield Section(
                "Samples",
                [
                    Words(
                        ["Held-out texts with their gaps, what was taken out of them, and what the model puts there."]
                    ),
                    *samples,
                ],
            )
    yield Section("Runs", [_run_table(report)])


def _maps(maps: Sequence[tuple[str, Sequence[Figure]]]) -> Iterator[Part]:
    yield Words(
        [
            "Each expert's share of its layer's tokens, times the even share, over the run of the first seed: 1 is "
            "even, dark experts are hardly used, light ones are crowded."
        ]
    )
    for place, (label, drawn) in enumerate(maps):
        if place == 0:
            yield Words([label])
            yield Charts(drawn)
        else:
            yield Folded(label, [Charts(drawn)])


def every_figure(report: Report) -> Iterator[Figure]:
    """All of the page, for files."""
    if (found := report.comparison) is not None:
        for some in (figures.quality, figures.training, figures.routing, figures.rates):
            yield from some(found)
        for label, maps in figures.loads(found):
            yield from (one._replace(title=f"{label}: {one.title}") for one in maps)


def _facts(found: Comparison) -> list[tuple[str, str]]:
    measure, base = found.measure, found.baseline.label
    known = [row for row in found.rows if row.final is not None]
    if not known:
        return [(f"{len(found.rows)}", "series, none evaluated yet")]
    best = max(known, key=lambda row: measure.sign * (row.final.mean if row.final else 0))
    facts = [(best.label, f"ends best: {measure.title} {_said(best.final, '.4f')}")]
    if best.label != base:
        facts.append((_said(best.over, "+.4f"), f"over {base}"))
    faster = [row for row in found.rows if row.label != base and row.speed.times[0] is not None]
    for place, what in enumerate(("fewer steps", "less time")):
        some = [(times.mean, row.label) for row in faster if (times := row.speed.times[place]) is not None]
        if some:
            factor, label = max(some)
            facts.append((f"{factor:.2f} x", f"{label}: {what} than {base} to its quality"))
    return facts


def _samples(runs: Sequence[Run]) -> Iterator[Part]:
    shown = 0
    for run in runs:
        for sample in run.result.get("samples") or ():
            if shown < SAMPLES:
                shown += 1
                texts = {
                    name: str(sample.get(key, ""))
                    for name, key in (("input", "input"), ("target", "target"), ("model", "prediction"))
                }
                yield Sample(run.name, texts)


def _run_table(report: Report) -> HtmlTable:
    rows = []
    for run in [*report.trained, *report.evaluations]:
        step = run.result.get("step", run.step)
        final = run.result.get("held_out/neg_log_perplexity")
        seed = run.seed
        rows.append(
            [
                run.name,
                run.verb or "-",
                "-" if seed is None else str(seed),
                f"{step:,}" if run.steps in (None, step) else f"{step:,} of {run.steps:,}",
                f"{final:.4f}" if isinstance(final, int | float) else "-",
                clock(float(run.result.get("seconds", run.seconds.values[-1]))),
            ]
        )
    return HtmlTable("", ("folder", "verb", "seed", "steps", "held-out neg. log perplexity", "time"), rows)


def _said(value: Spread | None, form: str) -> str:
    return "-" if value is None else value.said(form)


def _between(value: Spread, write: Any) -> str:
    if value.least == value.most:
        return str(write(value.mean))
    return f"{write(value.mean)} ({write(value.least)} to {write(value.most)})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
