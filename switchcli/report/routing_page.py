"""A routing atlas as a page, and its figures as files: what goes to each expert, as heat maps, and its tokens."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from switchcli.report import charts
from switchcli.report.charts import Axis, Figure, Table, Value
from switchcli.report.figures import even_scale, shown_layer
from switchcli.report.html_page import Charts, Collapsible, HtmlTable, Paragraphs, Part, Section
from switchcli.report.routing_tables import (
    EXPERT_HEADINGS,
    EXPERTS,
    bins,
    drift,
    expert_figures,
    limited,
    most_used,
    share,
    shown,
    summary,
)

EXPERTS_SHOWN = 64
"""Of a layer, those with the most tokens; --json has all."""
_EXPERT = Axis("expert", "expert", kind="ordinal")
_SPACE = "\N{NO-BREAK SPACE}"
_TIMES = "tokens, times the even share"


def parts(survey: Mapping[str, Any]) -> Iterator[Part]:
    """The page."""
    if survey["drift"] is not None:
        layers = survey["drift"]
        maps = [*_confusions(survey)]
        yield Section("Drift", [drift(layers), *([Charts(maps)] if maps else [])])
    several = len(survey["atlases"]) > 1
    for place, atlas in enumerate(survey["atlases"]):
        which = f"{('First', 'Second')[place]} checkpoint" if several else "Experts"
        layers = atlas["layers"].items()
        each = [
            Collapsible(
                _headline(name, layer), [Charts([*_maps(place, name, layer, survey["rare"])]), *_layer_tables(layer)]
            )
            for name, layer in layers
        ]
        yield Section(
            which, [summary(atlas, survey["sequences"]), Charts([*_overview(place, atlas)]), Paragraphs([_MAPS]), *each]
        )


_MAPS = (
    "In the maps of a layer a cell is a share of the tokens of its column, times the even share of an expert: 1 is "
    "even, what is dark goes elsewhere. A decoder reads its targets one later, after (start)."
)


def every_figure(survey: Mapping[str, Any]) -> Iterator[Figure]:
    """All of the page, for files."""
    for place, atlas in enumerate(survey["atlases"]):
        yield from _overview(place, atlas)
        for name, layer in atlas["layers"].items():
            for figure in _maps(place, name, layer, survey["rare"]):
                yield figure._replace(title=f"{shown_layer(name)}: {figure.title}")
    if survey["drift"] is not None:
        yield from _confusions(survey)


def token_tables(survey: Mapping[str, Any]) -> Iterator[Table]:
    """For files: of each checkpoint the tokens that are named of each expert, by lift or by count, each once."""
    for place, atlas in enumerate(survey["atlases"]):
        rows = [
            (shown_layer(name), expert, one["piece"], one["count"], one["lift"])
            for name, layer in atlas["layers"].items()
            for expert, found in enumerate(layer["experts"])
            for one in {one["id"]: one for one in (*found["by_lift"], *found["by_count"])}.values()
        ]
        yield _table(f"tokens_{place}", ("layer", "expert", "piece", "count", "lift"), rows)


def title(survey: Mapping[str, Any]) -> str:
    """Of the page."""
    paths = [(Path(atlas["checkpoint"]).resolve(), atlas["step"]) for atlas in survey["atlases"]]
    runs = ((path.parents[1] if path.parent.name == "checkpoints" else path, step) for path, step in paths)
    return "Routing of " + " and of ".join(f"{run.name}, step {step:,}" for run, step in runs)


def _headline(name: str, layer: Mapping[str, Any]) -> str:
    told = ", ".join(f"by {what} {share(one['share'])}" for what, one in layer["told_by"].items())
    return f"{shown_layer(name)}: {told}"


def _overview(place: int, atlas: Mapping[str, Any]) -> Iterator[Figure]:
    """What decides the expert, and how full the experts are, by layer."""
    layers = {shown_layer(name): layer for name, layer in atlas["layers"].items()}
    told = [
        (label, what, max(0.0, one["share"]))
        for label, layer in layers.items()
        for what, one in layer["told_by"].items()
        if one["share"] is not None
    ]
    y = Axis("layer", "", kind="ordinal")
    x = Axis("by", "", kind="ordinal")
    colour = Axis("share", "of the choice of an expert", ".0%", precise=".1%", domain=(0.0, 1.0))
    caption = "How much of the choice a value decides, beyond chance."
    name = f"told_{place}"
    yield charts.heat_map(
        name, "What decides the expert", caption, _table(name, ("layer", "by", "share"), told), x, y, colour
    )
    shares = {label: [expert["share"] for expert in layer["experts"]] for label, layer in layers.items()}
    num = atlas["num_experts"]
    experts = most_used([*map(sum, zip(*shares.values(), strict=True))], EXPERTS_SHOWN)
    loads = [(label, expert, share[expert] * num) for label, share in shares.items() for expert in experts]
    name, colour = (
        f"load_{place}",
        Axis("share", _TIMES, ".1f", precise=".2f", domain=even_scale([one[2] for one in loads])),
    )
    table = _table(name, ("layer", "expert", "share"), loads)
    yield charts.heat_map(name, f"Load of the experts{limited(num, EXPERTS_SHOWN)}", "", table, _EXPERT, y, colour)


def _maps(place: int, name: str, layer: Mapping[str, Any], rare: int) -> Iterator[Figure]:
    """A layer's experts by position, by sentinel (of those that were read `rare` times at least) and by text."""
    columns = {
        "position": bins(layer),
        "sentinel": {piece: load for piece, load in layer["sentinels"].items() if sum(load) >= rare},
        "text": layer["texts"] if len(layer["texts"]) > 1 else {},
    }
    for what, loads in columns.items():
        if not loads:
            continue
        key = re.sub(r"\W+", "_", f"{what}_{place}_{name}")
        rows = [
            (label, expert, load[expert] / max(1, sum(load)) * len(load))
            for expert in most_used(layer["load"], EXPERTS_SHOWN)
            for label, load in loads.items()
        ]
        table = _table(key, (what, "expert", "share"), rows)
        colour = Axis("share", _TIMES, ".1f", precise=".2f", domain=even_scale([one[2] for one in rows]))
        heading = f"By {what}{limited(len(layer['load']), EXPERTS_SHOWN)}"
        yield charts.heat_map(key, heading, "", table, Axis(what, what, kind="ordinal"), _EXPERT, colour)


def _layer_tables(layer: Mapping[str, Any]) -> Iterator[HtmlTable]:
    experts = most_used(layer["load"], EXPERTS_SHOWN)
    rows = [(str(expert), f"{layer['load'][expert]:,}", *expert_figures(layer, expert)) for expert in experts]
    heading = f"Experts{limited(len(layer['load']), EXPERTS_SHOWN)}"
    yield HtmlTable(heading, ("expert", "choices", *EXPERT_HEADINGS), rows, EXPERTS)
    lift = "How many times more often the expert reads a token than all together do; of those that are not rare."
    for heading, listed, caption in (("Tokens by lift", "by_lift", lift), ("Most frequent tokens", "by_count", "")):
        found = {expert: layer["experts"][expert][listed] for expert in experts}
        most = max(map(len, found.values()))
        if most:
            rows = [
                (str(expert), *(_token(one, listed) for one in named), *[""] * (most - len(named)))
                for expert, named in found.items()
            ]
            yield HtmlTable(heading, ("expert", *(str(number) for number in range(1, most + 1))), rows, caption)


def _token(one: Mapping[str, Any], listed: str) -> str:
    figure = f"{one['lift']:.1f}x" if listed == "by_lift" else f"{one['count']:,}"
    return f"{shown(one['piece'])}{_SPACE}{figure}"


def _confusions(survey: Mapping[str, Any]) -> Iterator[Figure]:
    """Of each layer: where the tokens of the first's experts are in the second, in the order of the matching."""
    for name, layer in survey["drift"].items():
        if layer["together"] is None:
            continue
        first = most_used(survey["atlases"][0]["layers"][name]["load"], EXPERTS_SHOWN)
        second = [layer["matched"]["experts"][expert] for expert in first]
        rows = [
            (other, expert, layer["together"][expert][other] / max(1, sum(layer["together"][expert])))
            for expert in first
            for other in second
        ]
        key = re.sub(r"\W+", "_", f"drift_{name}")
        x, y = (
            Axis("second", "expert of the second", kind="ordinal"),
            Axis("first", "expert of the first", kind="ordinal"),
        )
        colour = Axis("share", "of the first's tokens", ".0%", precise=".1%", domain=(0.0, 1.0))
        table = _table(key, ("second", "first", "share"), rows)
        heading = f"{shown_layer(name)}{limited(len(layer['together']), EXPERTS_SHOWN)}"
        yield charts.heat_map(key, heading, "", table, x, y, colour)


def _table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> Table:
    return Table(name, {column: [row[place] for row in rows] for place, column in enumerate(columns)})
