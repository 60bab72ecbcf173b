"""The page and the files of a routing report: what each expert takes, as heat maps and tables of its tokens."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from switchcli.report import html_page
from switchcli.report.charts import Axis, Figure, Table, Value, heat_map
from switchcli.report.figures import even_scale, file_name, load_axis, shown_layer
from switchcli.report.html_page import HtmlTable, Part
from switchcli.report.routing_tables import (
    EXPERT_CAPTION,
    EXPERT_HEADINGS,
    drift_table,
    expert_cells,
    limited,
    loads_by_position,
    most_used,
    share,
    shown,
    summary,
)

PAGE_EXPERTS = 64
"""Experts of a layer that the page shows, those with the most tokens; --json has all."""
_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"


def parts(survey: Mapping[str, Any]) -> Iterator[Part]:
    """Yield a section with the drift between two checkpoints, if there are two, and one per checkpoint."""
    if survey["drift"] is not None:
        yield html_page.section("Drift", drift_table(survey["drift"]))
    titles = ("Experts",) if len(survey["models"]) == 1 else ("First checkpoint", "Second checkpoint")
    caption = (
        "In the maps of a layer a cell is an expert's share of the tokens of its column, as a multiple of the even "
        "share: 1 is even, and where it is dark the tokens go elsewhere. A decoder reads its targets one position "
        "later, after (start)."
    )
    for index, (section, atlas) in enumerate(zip(titles, survey["models"], strict=True)):
        overview = html_page.charts([*_overview(index, atlas)])
        layers = []
        for name, layer in atlas["layers"].items():
            deciders = ", ".join(f"by {kind} {share(info['share'])}" for kind, info in layer["explained_by"].items())
            charts = html_page.charts([*_layer_maps(index, name, layer, survey["rare"])])
            layers.append(html_page.collapsible(f"{shown_layer(name)}: {deciders}", charts, *_layer_tables(layer)))
        top = summary(atlas, survey["sequences"])
        yield html_page.section(section, top, overview, html_page.paragraphs(caption), *layers)


def title(survey: Mapping[str, Any]) -> str:
    """Return the title of the page: the folder of each run and the step of its checkpoint."""
    names = []
    for atlas in survey["models"]:
        path = Path(atlas["checkpoint"]).resolve()
        run = path.parents[1] if path.parent.name == "checkpoints" else path
        names.append(f"{run.name}, step {atlas['step']:,}")
    return "Routing of " + " and of ".join(names)


def every_figure(survey: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures of the page, for files."""
    for index, atlas in enumerate(survey["models"]):
        yield from _overview(index, atlas)
        for name, layer in atlas["layers"].items():
            for figure in _layer_maps(index, name, layer, survey["rare"]):
                yield figure._replace(title=f"{shown_layer(name)}: {figure.title}")


def token_tables(survey: Mapping[str, Any]) -> Iterator[Table]:
    """Yield a table per checkpoint, for files: the tokens listed for each expert, by lift or by count, each once."""
    for index, atlas in enumerate(survey["models"]):
        rows = []
        for name, layer in atlas["layers"].items():
            for expert, info in enumerate(layer["experts"]):
                tokens = {token["id"]: token for token in (*info["by_lift"], *info["by_count"])}
                for token in tokens.values():
                    rows.append((shown_layer(name), expert, token["piece"], token["count"], token["lift"]))
        yield Table(f"tokens_{index}", ("layer", "expert", "piece", "count", "lift"), rows)


def _overview(index: int, atlas: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield how well token, position and text predict the expert, and expert loads, by layer."""
    deciders: list[tuple[Value, ...]] = []
    loads: list[tuple[Value, ...]] = []
    num_experts = atlas["num_experts"]
    shares = {name: [expert["share"] for expert in layer["experts"]] for name, layer in atlas["layers"].items()}
    experts = most_used([*map(sum, zip(*shares.values(), strict=True))], PAGE_EXPERTS)
    for name, layer in atlas["layers"].items():
        for kind, info in layer["explained_by"].items():
            if info["share"] is not None:
                deciders.append((shown_layer(name), kind, max(0.0, info["share"])))
        loads += [(shown_layer(name), expert, shares[name][expert] * num_experts) for expert in experts]
    by, layers, expert = _ordinal("by", ""), _ordinal("layer", ""), _ordinal("expert")
    table = Table(f"told_{index}", ("layer", "by", "share"), deciders)
    caption = "How much of the choice of an expert a property of the token decides, beyond chance."
    color = _percentage("of the choice of an expert")
    yield heat_map("What decides the expert", caption, table, by, layers, color)
    heading = f"Load of the experts{limited(num_experts, PAGE_EXPERTS)}"
    table = Table(f"load_{index}", ("layer", "expert", "share"), loads)
    yield heat_map(heading, "", table, expert, layers, _load_axis(table))


def _layer_maps(index: int, name: str, layer: Mapping[str, Any], rare: int) -> Iterator[Figure]:
    """Yield a layer's load by position, by sentinel (those read `rare` times at least) and by text."""
    sentinels = {piece: load for piece, load in layer["sentinels"].items() if sum(load) >= rare}
    texts = layer["texts"] if len(layer["texts"]) > 1 else {}
    experts = most_used(layer["load"], PAGE_EXPERTS)
    for kind, loads in (("position", loads_by_position(layer)), ("sentinel", sentinels), ("text", texts)):
        if not loads:
            continue
        # A cell is the expert's share of the tokens of its column, times the number of experts: 1 is even.
        rows = [
            (label, expert, load[expert] / max(1, sum(load)) * len(load))
            for expert in experts
            for label, load in loads.items()
        ]
        table = Table(file_name(f"{kind}_{index}_{name}"), (kind, "expert", "share"), rows)
        heading = f"By {kind}{limited(len(layer['load']), PAGE_EXPERTS)}"
        yield heat_map(heading, "", table, _ordinal(kind), _ordinal("expert"), _load_axis(table))


def _layer_tables(layer: Mapping[str, Any]) -> Iterator[HtmlTable]:
    experts = most_used(layer["load"], PAGE_EXPERTS)
    rows = [(str(expert), f"{layer['load'][expert]:,}", *expert_cells(layer, expert)) for expert in experts]
    heading = f"Experts{limited(len(layer['load']), PAGE_EXPERTS)}"
    yield HtmlTable(heading, ("expert", "choices", *EXPERT_HEADINGS), rows, EXPERT_CAPTION)
    lift = "How many times more often the expert gets a token than all experts together; without rare tokens."
    for heading, order, caption in (("Tokens by lift", "by_lift", lift), ("Most frequent tokens", "by_count", "")):
        tokens = {expert: [_token(token, order) for token in layer["experts"][expert][order]] for expert in experts}
        columns = max(map(len, tokens.values()))
        if columns:
            padded = [(str(expert), *listed, *[""] * (columns - len(listed))) for expert, listed in tokens.items()]
            yield HtmlTable(heading, ("expert", *map(str, range(1, columns + 1))), padded, caption)


def _token(token: Mapping[str, Any], order: str) -> str:
    amount = f"{token['lift']:.1f}x" if order == "by_lift" else f"{token['count']:,}"
    return f"{shown(token['piece'])}{_NO_BREAK_SPACE}{amount}"


def _ordinal(field: str, title: str | None = None) -> Axis:
    return Axis(field, field if title is None else title, kind="ordinal")


def _percentage(title: str) -> Axis:
    return Axis("share", title, ".0%", precise=".1%", domain=(0.0, 1.0))


def _load_axis(table: Table) -> Axis:
    return load_axis(even_scale([float(value or 0) for value in table.column("share")]))
