"""The charts of compared runs: curves of all series, and the load of experts in each sparse layer."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from switchcli.metric_names import DROPPED_FRACTION, LOSS, MAX_LOAD, TOKENS_PER_SECOND, layer_title
from switchcli.report import charts
from switchcli.report.charts import Axis, Figure
from switchcli.report.comparison import Comparison
from switchcli.report.runs import Curve, Floats, Loads, Run
from switchcli.report.series import SeedSpread, Series, band, by_seed, downsample
from switchcli.terminal.metrics_file import as_mapping
from switchcli.terminal.safe_text import capitalize
from switchcli.terminal.table import Table
from switchcli.terminal.units import si

MAX_POINTS = 360
"""Points of a curve, at most."""
MAX_CELLS = 120_000
"""Cells of all heat maps of a report together, about."""
WINDOW_START = 0.1
"""Where a chart of a long training begins, as a fraction of its shortest run: before, curves fall too steeply."""
MIN_COLUMNS, MAX_COLUMNS = 12, 60
"""Columns of a heat map, at least and at most."""
CurveOf = Callable[[Run], Curve | None]
"""Returns the curve of one metric, or None for a run without it."""
Line = Mapping[str, Floats]
"""The points of a series as a chart draws them: values by column, [P] for P points."""
_STEP = Axis("step", "steps", precise=",")


def quality(comparison: Comparison) -> list[Figure]:
    """Return charts of the quality metric against steps, tokens, wall time and FLOPs."""
    metric = comparison.metric
    caption = f"Each point is the mean of {metric.evaluations} evaluations." if metric.evaluations > 1 else ""
    return _against(comparison, "held_out", metric.title, caption, metric.curve)


def experts(comparison: Comparison) -> list[Figure]:
    """Return a chart of the last quality against the number of experts (Figures 1 and 4 of the paper).

    A line has the series of equal FLOPs, steps and routers, the best one of each number of experts. Series with another
    verb, start, text or batch than the baseline are in none. There is no chart unless two of a line differ in that
    number.
    """
    lines: dict[str, dict[int, SeedSpread]] = {}
    for series, row in zip(comparison.series, comparison.rows, strict=True):
        if _setting(series) != _setting(comparison.baseline):
            continue
        model, flops = as_mapping(series.runs[0].recipe.get("model")), row.sizes["flops_per_sequence"]
        number, router = model.get("num_experts"), as_mapping(model.get("router"))
        if not isinstance(number, int) or flops is None or row.steps is None or row.final is None:
            continue
        k = f" with k {router['k']}" if "k" in router else ""
        line = lines.setdefault(f"{si(flops)} FLOPs, {row.steps.mean:,.0f} steps, {router.get('kind')}{k}", {})
        line[number] = min(row.final, line.get(number, row.final))  # by the mean, which is first
    if all(len(line) == 1 for line in lines.values()):
        return []
    rows = [
        (label, number, final.mean, final.least, final.most)
        for label, line in lines.items()
        for number, final in sorted(line.items())
    ]
    title = comparison.metric.title
    table = Table(("series", "experts", "value", "least", "most"), rows, name="experts")
    caption = (
        "The last value of each run, the mean over seeds between the least and the most. A line has equal FLOPs for "
        "each sequence; of several series at one number of experts the best is shown. 1 is the dense model. Runs with "
        "another verb, start, text or batch than the baseline are left out."
    )
    numbers = [number for line in lines.values() for number in line]
    domain = (min(numbers) / 1.2, max(numbers) * 1.2)  # room for the markers of the outermost points
    x = Axis("experts", "experts", "d", precise="d", domain=domain, doubles=True)
    y = Axis("value", title, ".3~f", precise=".4f")
    heading = f"{capitalize(title)} against the number of experts"
    return [charts.lines("experts", heading, caption, table, x, y, [*lines], spread="bars")]


def _setting(series: Series) -> tuple[object, ...]:
    """Return what a run learns from: the verb, the start, the data, and the tokens in a step."""
    recipe = series.runs[0].recipe
    parts = (recipe.get(name) for name in ("verb", "start", "data", "tasks"))
    return (*parts, as_mapping(recipe.get("train")).get("batch_tokens"))


def training(comparison: Comparison) -> list[Figure]:
    """Return the same charts for training batches, or none where runs have different tokenizers."""
    if comparison.num_tokenizers > 1:
        return []
    caption = "The mean over the training batches since the previous logged step."
    return _against(comparison, "training", "training loss", caption, _metric(LOSS))


def routing(comparison: Comparison) -> list[Figure]:
    """Return charts by step: dropped tokens, the largest load and router entropy."""
    dropped = "Tokens that found no slot in their expert, over all sparse layers: only the residual carries them."
    max_load = "Of an expert, over the mean load of its layer, in the layer where this ratio is largest: 1 is even."
    entropy = (
        "Of the routers' probabilities, as a share of its maximum (the logarithm of the number of experts), the mean "
        "over layers: at 0 a router is certain, at 100 % all experts are equally likely."
    )
    return [
        *_by_step(comparison, "dropped", "dropped tokens", dropped, _metric(DROPPED_FRACTION), "~%"),
        *_by_step(comparison, MAX_LOAD, "largest load", max_load, _metric(MAX_LOAD), "~g"),
        *_by_step(comparison, "entropy", "router entropy", entropy, _mean_entropy, "~%"),
    ]


def rates(comparison: Comparison) -> list[Figure]:
    """Return a chart of tokens per second by step."""
    caption = "Encoder input tokens per second of training, without the time of evaluations and saves."
    return _by_step(comparison, TOKENS_PER_SECOND, "tokens/s", caption, _metric(TOKENS_PER_SECOND), "~s")


def loads(comparison: Comparison) -> Iterator[tuple[str, list[Figure]]]:
    """Yield the label of each series with the expert load of its first run: a heat map per sparse layer.

    All maps have one color scale.
    """
    layers_of = {series.label: series.runs[0].loads for series in comparison.series if series.runs[0].loads}
    map_rows = sum(load.tokens.shape[1] for layers in layers_of.values() for load in layers.values())
    columns = int(np.clip(MAX_CELLS // max(map_rows, 1), MIN_COLUMNS, MAX_COLUMNS))
    maps = {
        label: {layer: _relative_load(load, columns) for layer, load in layers.items()}
        for label, layers in layers_of.items()
    }
    if not maps:
        return
    scale = even_scale(np.concatenate([load.ravel() for layers in maps.values() for _, load in layers.values()]))
    for index, (label, layers) in enumerate(maps.items()):
        figures = []
        for layer, (steps, load) in layers.items():
            # [C, E] transposed: all steps of expert 0 come first, and experts keep their order on the y axis.
            rows = [
                (expert, int(step), value)
                for expert, values in enumerate(load.T.tolist())
                for step, value in zip(steps, values, strict=True)
            ]
            table = Table(("expert", "step", "share"), rows, name=file_name(f"load_{index}_{layer}"))
            figures.append(charts.load_map(shown_layer(layer), table, scale, label))
        yield label, figures


def _lines(comparison: Comparison, curve_of: CurveOf) -> Mapping[str, Line]:
    """Return a line of few points for each series, by its label, over those of its runs that have the metric."""
    unit, unit_seconds = _time_unit(comparison)
    lines = {}
    for series in comparison.compared.values():
        curves = [(run, curve) for run in by_seed(series).values() if (curve := curve_of(run)) is not None]
        values = band([curve for _, curve in curves])
        # Both bands are over the same curves' steps, so the points of one index the other.
        seconds = band([Curve(curve.steps, run.seconds_at(curve.steps)) for run, curve in curves])
        if values is None or seconds is None:
            continue
        points, first_run = downsample(values.mean, MAX_POINTS), curves[0][0]
        steps = values.steps[points]
        lines[series.label] = {
            "step": steps,
            "tokens": first_run.input_tokens_at(steps),
            unit: seconds.mean[points] / unit_seconds,
            "flops": first_run.flops_at(steps),
            "value": values.mean[points],
            "least": values.low[points],
            "most": values.high[points],
        }
    return lines


def _table(name: str, lines: Mapping[str, Line], columns: Sequence[str]) -> Table:
    """Return a table with a row per point and the label of its series in the first column."""
    rows = []
    for label, line in lines.items():
        points = np.stack([line[column] for column in columns], axis=1)  # [P, columns]
        for point in points.tolist():
            rows.append((label, *(value if math.isfinite(value) else None for value in point)))
    return Table(("series", *columns), rows, name=name)


def _against(comparison: Comparison, name: str, title: str, caption: str, curve_of: CurveOf) -> list[Figure]:
    """Return a chart of one table for each measure of how far a run is: steps, tokens, wall time and FLOPs."""
    lines = _lines(comparison, curve_of)
    if not lines:
        return []
    unit, _ = _time_unit(comparison)
    axes = {
        "steps": _STEP,
        "tokens": Axis("tokens", "input tokens"),
        "wall_time": Axis(unit, f"{unit} of training", "~g", precise=".3~f"),
        "flops": Axis("flops", "FLOPs"),
    }
    # A chart that would show the same curves as that of steps is left out, and the axis of steps has its unit.
    per_step: dict[str, float] = {}
    for key in ("tokens", "flops"):
        ratios = np.concatenate([line[key][1:] / line["step"][1:] for line in lines.values()])
        if len(ratios) and np.allclose(ratios, ratios[0], rtol=1e-6, atol=0):
            per_step[key] = float(ratios[0])
    known = any(np.isfinite(line["flops"]).any() for line in lines.values())
    if per_step:
        units = [f"{si(ratio)} {axes[key].title}" for key, ratio in per_step.items()]
        axes["steps"] = _STEP._replace(title=f"steps (of {' and '.join(units)})")
    axes = {key: axis for key, axis in axes.items() if key not in per_step and (key != "flops" or known)}
    table = _table(name, lines, [*next(iter(lines.values()))])
    figures = []
    for key, axis in axes.items():
        x, y = _window(lines, axis, Axis("value", title, ".3~f", precise=".4f"), WINDOW_START)
        heading = f"{capitalize(title)} against {axis.title.partition(' (')[0]}"
        figures.append(charts.lines(f"{name}_{key}", heading, caption, table, x, y, comparison.labels))
    return figures


def _by_step(
    comparison: Comparison, name: str, title: str, caption: str, curve_of: CurveOf, tick_format: str
) -> list[Figure]:
    """Return one chart, against steps."""
    lines = _lines(comparison, curve_of)
    if not lines:
        return []
    table = _table(name, lines, ["step", "value", "least", "most"])
    precise = ".1%" if tick_format == "~%" else ".4~s"
    x, y = _window(lines, _STEP, Axis("value", title, tick_format, precise), 0)
    return [charts.lines(name, capitalize(title), caption, table, x, y, comparison.labels)]


def _metric(name: str) -> CurveOf:
    return lambda run: run.curves.get(name)


def _mean_entropy(run: Run) -> Curve | None:
    layers = band([curve for name, curve in run.curves.items() if name.endswith("/entropy")])
    return None if layers is None else Curve(layers.steps, layers.mean)


def _window(lines: Mapping[str, Line], x: Axis, y: Axis, first: float) -> tuple[Axis, Axis]:
    """Return the axes with the ranges shown before the reader zooms, with room for the markers of the outermost points.

    They hold all points from a fraction `first` of the shortest line on.
    """
    places, least, most = (
        np.concatenate([line[name] for line in lines.values()]) for name in (x.field, "least", "most")
    )
    if np.isnan(places).all():
        return x, y
    shortest = np.nanmin([np.fmax.reduce(line[x.field]) for line in lines.values()])  # NaN where a line has no x
    shown = places >= first * shortest
    begin, end = places[shown].min(), places[shown].max()
    x_margin = 0.02 * (end - begin) or 1.0
    low, high = least[shown].min(), most[shown].max()
    y_margin = 0.04 * (high - low) or 0.1 * abs(low) or 0.1
    x_range = (float(begin - x_margin), float(end + x_margin))
    return x._replace(domain=x_range), y._replace(domain=(float(low - y_margin), float(high + y_margin)))


def _time_unit(comparison: Comparison) -> tuple[str, float]:
    """Return the unit of wall time that suits the longest run, and its seconds."""
    longest = max(float(run.seconds.values[-1]) for series in comparison.series for run in series.runs)
    if longest > 7200:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)


def _relative_load(load: Loads, columns: int) -> tuple[Floats, Floats]:
    """Return the load over at most so many stretches of a run, [C] and [C, E] for C stretches and E experts.

    The first array holds the last step of each stretch, the second each expert's share of the tokens times E: 1 is
    even.
    """
    stretches = np.array_split(np.arange(len(load.steps)), min(columns, len(load.steps)))
    tokens = np.stack([load.tokens[stretch].sum(axis=0) for stretch in stretches])
    total = np.maximum(tokens.sum(axis=1, keepdims=True), 1)
    return load.steps[[stretch[-1] for stretch in stretches]], tokens / total * tokens.shape[1]


def even_scale(relative_loads: Floats | Sequence[float]) -> tuple[float, float]:
    """Return a color scale from 0 to the 99th percentile, at least 2; 1 is an even load."""
    return 0.0, float(np.ceil(max(2.0, np.quantile(relative_loads, 0.99))))


def file_name(name: str) -> str:
    """Return the name of a figure's files, of letters, digits and underscores."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", name)


def shown_layer(layer: str) -> str:
    """Return the name of a layer as a title: `Encoder block 1` for `encoder.blocks.1.feed_forward`."""
    return capitalize(layer_title(layer))
