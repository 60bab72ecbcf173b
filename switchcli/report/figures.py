"""The figures of a report: curves of all series, and the experts' load a sparse layer."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from switchcli.metric_names import DROPPED_FRACTION, NEG_LOG_PERPLEXITY, TOKENS_PER_SECOND
from switchcli.report import charts
from switchcli.report.charts import Axis, Figure, Table, Value
from switchcli.report.comparison import Comparison
from switchcli.report.runs import Curve, Floats, Loads, Run
from switchcli.report.safe_text import capitalize
from switchcli.report.series import Band, band, downsample

POINTS = 360
"""Of a curve, at most."""
CELLS = 120_000
"""Of all heat maps together, about."""
COLUMNS = (12, 60)
"""Of a heat map, at least and at most."""
Get = Callable[[Run], Curve | None]


class Unit(NamedTuple):
    """Of time, by the longest run."""

    name: str
    seconds: float


def quality(found: Comparison) -> list[Figure]:
    """The measure of the report against steps, tokens, wall time and FLOPs."""
    measure = found.measure
    said = "The mean over seeds, in a band from least to most."
    if measure.evaluations > 1:
        said += f" Each point is the mean of {measure.evaluations} evaluations."
    return _against(found, "held_out", measure.title, said, measure.curve)


def training(found: Comparison) -> list[Figure]:
    """The same of training batches, where all runs read by one tokenizer."""
    if found.tokenizers > 1:
        return []
    said = "Of the batches learned from, since the logged step before."
    return _against(found, "training", "training neg. log perplexity", said, _of(NEG_LOG_PERPLEXITY))


def routing(found: Comparison) -> list[Figure]:
    """Dropped tokens and router entropy, by step."""
    dropped = "Tokens that found no slot in their expert, of all sparse layers: the residual alone carries them."
    entropy = (
        "Of the routers' probabilities, as a share of the most there can be (the logarithm of the number of experts), "
        "the mean over layers: at 0 a router is sure, at 100 % it knows nothing."
    )
    return [
        *_by_step(found, "dropped", "dropped tokens", dropped, _of(DROPPED_FRACTION), "~%"),
        *_by_step(found, "entropy", "router entropy", entropy, _entropy, "~%"),
    ]


def rates(found: Comparison) -> list[Figure]:
    """Tokens a second, by step."""
    said = "Encoder input tokens a second of training, the time of evaluations and saves left out."
    return _by_step(found, TOKENS_PER_SECOND, "tokens/s", said, _of(TOKENS_PER_SECOND), "~s")


def loads(found: Comparison) -> Iterator[tuple[str, list[Figure]]]:
    """By series, for its first run: a heat map a sparse layer. All have one scale of colours."""
    some = {one.label: one.runs[0].loads for one in found.series if one.runs[0].loads}
    rows = sum(load.tokens.shape[1] for layers in some.values() for load in layers.values())
    columns = int(np.clip(CELLS // max(rows, 1), *COLUMNS))
    shares = {
        label: {layer: _shares(load, columns) for layer, load in layers.items()} for label, layers in some.items()
    }
    every = [share for layers in shares.values() for _, share in layers.values()]
    scale = even_scale(np.concatenate([share.ravel() for share in every])) if every else (0.0, 0.0)
    for place, (label, layers) in enumerate(shares.items()):
        yield (
            label,
            [_heat_map(f"load_{place}_{layer}", layer, *share, scale) for layer, share in layers.items()],
        )


class _Drawn(NamedTuple):
    """A series as it is drawn: few points, of those of its runs that have the figure."""

    label: str
    runs: list[Run]
    band: Band
    seconds: Floats
    """Of training, at the band's steps, of the runs that have come so far."""


def _drawn(found: Comparison, get: Get) -> list[_Drawn]:
    drawn = []
    for one in found.series:
        curves = [(run, curve) for run in one.runs if (curve := get(run)) is not None]
        whole = band([curve for _, curve in curves])
        spent = band([Curve(curve.steps, run.seconds_at(curve.steps)) for run, curve in curves])
        if whole is not None and spent is not None:
            kept = downsample(whole.mean, POINTS)
            runs, shown = [run for run, _ in curves], Band(*(part[kept] for part in whole))
            drawn.append(_Drawn(one.label, runs, shown, spent.mean[kept]))
    return drawn


def _table(name: str, drawn: Sequence[_Drawn], more: Mapping[str, Callable[[_Drawn], Floats]]) -> Table:
    """A row a point: the series, its step, what else tells how far it is, the mean, the least and the most."""
    columns: dict[str, list[Value]] = {"series": [one.label for one in drawn for _ in one.band.steps]}
    parts: dict[str, Callable[[_Drawn], Floats]] = {
        "step": lambda one: one.band.steps,
        **more,
        "value": lambda one: one.band.mean,
        "least": lambda one: one.band.low,
        "most": lambda one: one.band.high,
    }
    for key, part in parts.items():
        columns[key] = [value if math.isfinite(value) else None for one in drawn for value in part(one).tolist()]
    return Table(name, columns)


def _against(found: Comparison, name: str, title: str, caption: str, get: Get) -> list[Figure]:
    """One table, and a figure by each of its columns that tell how far a run is."""
    if not (drawn := _drawn(found, get)):
        return []
    unit = _unit(found)
    more: dict[str, Callable[[_Drawn], Floats]] = {
        "tokens": lambda one: one.band.steps * one.runs[0].batch_tokens,
        unit.name: lambda one: one.seconds / unit.seconds,
        "flops": lambda one: one.band.steps * one.runs[0].flops_per_step,
    }
    table = _table(name, drawn, more)
    y = Axis("value", title, ".3~f", precise=".4f", domain=_seen([one.band for one in drawn]))
    axes = {
        "steps": Axis("step", "steps", precise=","),
        "tokens": Axis("tokens", "input tokens"),
        "wall_time": Axis(unit.name, f"{unit.name} of training", "~g", precise=".3~f"),
        "flops": Axis("flops", "FLOPs"),
    }
    labels = [one.label for one in found.series]
    return [
        charts.lines(f"{name}_{key}", f"{capitalize(title)} against {axis.title}", caption, table, axis, y, labels)
        for key, axis in axes.items()
    ]


def _by_step(found: Comparison, name: str, title: str, caption: str, get: Get, form: str) -> list[Figure]:
    if not (drawn := _drawn(found, get)):
        return []
    y = Axis("value", title, form, precise=".1%" if form == "~%" else ".4~s")
    x, labels = Axis("step", "steps", precise=","), [one.label for one in found.series]
    return [charts.lines(name, capitalize(title), caption, _table(name, drawn, {}), x, y, labels)]


def _of(name: str) -> Get:
    return lambda run: run.curves.get(name)


def _entropy(run: Run) -> Curve | None:
    whole = band([curve for name, curve in run.curves.items() if name.endswith("/entropy")])
    return None if whole is None else Curve(whole.steps, whole.mean)


def _seen(bands: Sequence[Band]) -> tuple[float, float]:
    """What is worth to be seen first: where the curves are after a tenth of their steps."""
    late = [one.steps >= one.steps[-1] / 10 for one in bands]
    low = min(float(one.low[there].min()) for one, there in zip(bands, late, strict=True))
    high = max(float(one.high[there].max()) for one, there in zip(bands, late, strict=True))
    room = 0.04 * (high - low) or 0.1
    return low - room, high + room


def _unit(found: Comparison) -> Unit:
    longest = max(float(run.seconds.values[-1]) for one in found.series for run in one.runs)
    return Unit("hours", 3600.0) if longest > 7200 else Unit("minutes", 60.0) if longest > 120 else Unit("seconds", 1.0)


def _shares(load: Loads, columns: int) -> tuple[Floats, Floats]:
    """Steps [C] where stretches of the run end, and the experts' shares [C, E] of their tokens, times the even one."""
    stretches = np.array_split(np.arange(len(load.steps)), min(columns, len(load.steps)))
    tokens = np.stack([load.tokens[stretch].sum(axis=0) for stretch in stretches])
    total = np.maximum(tokens.sum(axis=1, keepdims=True), 1)
    return load.steps[[stretch[-1] for stretch in stretches]], tokens / total * tokens.shape[1]


def _heat_map(name: str, layer: str, steps: Floats, shares: Floats, scale: tuple[float, float]) -> Figure:
    experts, name = shares.shape[1], re.sub(r"[^A-Za-z0-9_]+", "_", name)
    columns: dict[str, Sequence[Value]] = {
        "expert": [expert for expert in range(experts) for _ in steps],
        "step": [int(step) for _ in range(experts) for step in steps],
        "share": [float(share) for share in shares.T.ravel()],
    }
    return charts.heat_map(
        name,
        shown_layer(layer),
        "",
        Table(name, columns),
        Axis("step", "steps", kind="ordinal"),
        Axis("expert", "expert", kind="ordinal"),
        Axis("share", "tokens, times the even share", ".1f", domain=scale, precise=".2f"),
    )


def even_scale(shares: Floats | Sequence[float]) -> tuple[float, float]:
    """Of colours for shares, times the even one: up to what all but one in a hundred stay below, and 2 at least."""
    return 0.0, float(np.ceil(max(2.0, np.quantile(shares, 0.99))))


def shown_layer(layer: str) -> str:
    """`encoder block 2` for `encoder.blocks.1.feed_forward.layer`; other parts of a block are named after it."""
    found = re.fullmatch(r"(\w+)\.blocks\.(\d+)\.(.*?)(?:\.layer|\.attention)?", layer)
    if found is None:
        return layer
    part = "" if found[3] == "feed_forward" else f", {found[3].replace('_', ' ').replace('.', ' ')}"
    return f"{capitalize(found[1])} block {int(found[2]) + 1}{part}"
