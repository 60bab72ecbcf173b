"""The part of a report on routing: the tokens of each expert, where they go, and the drift between two checkpoints."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from switchcli.metric_names import DROPPED_FRACTION, LOAD_ENTROPY, MAX_LOAD
from switchcli.report import html_page
from switchcli.report.charts import Figure, load_map
from switchcli.report.figures import even_scale, file_name, shown_layer
from switchcli.report.html_page import Part
from switchcli.report.safe_text import one_line
from switchcli.report.table import Table, Value
from switchcli.report.units import percent, si

Survey = Mapping[str, Any]
"""The routing of one or two checkpoints, as `runs.routing_survey` measures it and `--json` has it."""
TERMINAL_EXPERTS, PAGE_EXPERTS = 16, 64
"""Experts of a layer that a terminal and a page show, those with the most tokens; --json has all."""
_TOKEN_CHARACTERS = 50
"""Characters of an expert's tokens in a terminal."""
_TEXT_EXPERTS = 6
"""Experts that are listed for a text."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark for a space."""
_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
_EXPERT_HEADINGS = ("share", "no slot", "sure", "positions", "of sentinels")
_EXPERT_NOTE = (
    "No slot: the share of the tokens that chose it. Sure: the mean of its probability where it is chosen. Positions: "
    "where it takes most tokens against its share of all. Of sentinels: its share of them."
)
_LIFT_NOTE = "Lift: how many times more often the expert gets a token than all experts together; without rare tokens."
_MAP_NOTE = (
    "In a map a cell is an expert's share of the tokens of its row, as a multiple of the even share: 1 is even, and "
    "where it is dark the tokens go elsewhere. A decoder reads its targets one position later, after (start)."
)


def tables(survey: Survey) -> Iterator[Table]:
    """Yield the tables for a terminal."""
    for model in survey["models"]:
        yield _summary(model, survey["sequences"])
        yield _balance_table(model["layers"])
        for name, layer in model["layers"].items():
            yield _expert_table(shown_layer(name), layer, TERMINAL_EXPERTS, with_tokens=True)
            if len(layer["texts"]) > 1:
                yield _text_table(name, layer)
    if survey["drift"] is not None:
        yield _drift_table(survey["drift"])


def section(survey: Survey) -> Part:
    """Return the section of a page: the drift between two checkpoints, and the maps and tables of each."""
    elements: list[Part | Table] = [] if survey["drift"] is None else [_drift_table(survey["drift"])]
    elements.append(html_page.paragraphs(_MAP_NOTE))
    for index, model in enumerate(survey["models"]):
        elements += [_summary(model, survey["sequences"]), _balance_table(model["layers"])]
        elements.append(html_page.charts([_load_map(index, model)]))
        for name, layer in model["layers"].items():
            maps = html_page.charts([*_layer_maps(index, name, layer, survey["rare"])])
            experts = _expert_table("Experts", layer, PAGE_EXPERTS, with_tokens=False, note=_EXPERT_NOTE)
            lifts = _token_table(layer, "by_lift", "Tokens by lift", "{lift:.1f}x", _LIFT_NOTE)
            counts = _token_table(layer, "by_count", "Most frequent tokens", "{count:,}")
            listed = [table for table in (lifts, counts) if len(table.columns) > 1]
            elements.append(html_page.collapsible(shown_layer(name), maps, experts, *listed))
    return html_page.section("Experts", *elements)


def names(survey: Survey) -> str:
    """Return the folder of each run and the step of its checkpoint, for a title."""
    named = []
    for model in survey["models"]:
        path = Path(model["checkpoint"]).resolve()
        run = path.parents[1] if path.parent.name == "checkpoints" else path
        named.append(f"{run.name}, step {model['step']:,}")
    return " and of ".join(named)


# Tables


def _summary(model: Mapping[str, Any], sequences: Mapping[str, int]) -> Table:
    """Return a row per layer of a checkpoint, measured over so many sequences of each text."""
    layers = model["layers"]
    deciders = [name for name in next(iter(layers.values()))["explained_by"] if name != "kind"]
    headings = ("layer", "tokens", "dropped", "unused", "sure", "entropy", *(f"by {kind}" for kind in deciders))
    rows = [
        (
            shown_layer(name),
            si(layer["tokens"]),
            percent(layer[DROPPED_FRACTION]),
            layer["load"].count(0),
            _two_decimals(layer["confidence"]),
            _two_decimals(layer["entropy"]),
            *(_two_decimals(layer["explained_by"][name]["share"]) for name in deciders),
        )
        for name, layer in layers.items()
    ]
    note = (
        "Unused: experts without a token. Sure: the mean of the highest probability. Entropy: of all probabilities, in "
        f"nats. By {', '.join(deciders)}: how much of the choice of an expert it decides, from 0, no more than chance, "
        "to 1, all."
    )
    measured = ", ".join(f"{number:,} of {text}" for text, number in sequences.items())
    title = f"{model['checkpoint']}, capacity {model['capacity']}; held-out sequences: {measured}"
    return Table(headings, rows, title, note)


def _balance_table(layers: Mapping[str, Any]) -> Table:
    """Return how even the loads of each layer are, and what an expert tells about the domain of a token."""
    # The tokens that one stack reads may all be without a kind.
    explained = dict.fromkeys(name for layer in layers.values() for name in layer["explained_by"])
    domains = [name for name in explained if name in ("text", "kind")]
    rows = []
    for name, layer in layers.items():
        told = [_told(layer["explained_by"].get(domain)) for domain in domains]
        rows.append((shown_layer(name), f"{layer[MAX_LOAD]:.2f}", f"{layer[LOAD_ENTROPY]:.2f}", *told))
    note = (
        "Max load: the largest over the mean. Load entropy: in nats, at most the logarithm of the number of experts. "
        "About the text or the kind: its mutual information with a token's expert, in nats above chance, and as a "
        "share of its entropy: 100 % if the expert gives it away."
    )
    headings = ("layer", "max load", "load entropy", *(f"about the {domain}" for domain in domains))
    return Table(headings, rows, "Balance, and what an expert tells", note)


def _told(info: Mapping[str, Any] | None) -> str | None:
    """Return what an expert tells about a domain, in nats above chance, and its share of the domain's entropy."""
    if info is None:
        return None
    share = info["share_of_values"]
    return f"{info['nats'] - info['by_chance']:.3f} ({'-' if share is None else percent(share)})"


def _expert_table(title: str, layer: Mapping[str, Any], count: int, with_tokens: bool, note: str = "") -> Table:
    """Return a row per expert, which begins with the tokens that it gets more often than others do `with_tokens`."""
    rows = []
    for expert in _most_used(layer, count):
        name = f"{expert:<4} {_first_tokens(layer, expert)}" if with_tokens else str(expert)
        rows.append((name, *_expert_cells(layer, expert)))
    headings = ("expert, tokens by lift" if with_tokens else "expert", *_EXPERT_HEADINGS)
    return Table(headings, rows, f"{title}{_limited(layer, count)}", note)


def _expert_cells(layer: Mapping[str, Any], expert: int) -> tuple[Value, ...]:
    """Return an expert's cells under `_EXPERT_HEADINGS`."""
    info = layer["experts"][expert]
    if not layer["load"][expert]:
        return (percent(info["share"]), *[None] * (len(_EXPERT_HEADINGS) - 1))
    all_sentinels = sum(map(sum, layer["sentinels"].values()))
    sentinels = sum(load[expert] for load in layer["sentinels"].values())
    return (
        percent(info["share"]),
        percent(info["turned_away_fraction"]),
        _two_decimals(info["confidence"]),
        _favorite_positions(layer, expert),
        percent(sentinels / all_sentinels) if all_sentinels else None,
    )


def _first_tokens(layer: Mapping[str, Any], expert: int) -> str:
    """Return the first tokens of an expert, as many as fit a terminal."""
    info = layer["experts"][expert]
    if not layer["load"][expert]:
        return "no token"
    pieces = [shown(token["piece"]) for token in info["by_lift"] or info["by_count"]]
    while len(" ".join(pieces)) > _TOKEN_CHARACTERS:
        pieces.pop()
    return " ".join(pieces)


def _token_table(layer: Mapping[str, Any], order: str, title: str, amount: str, note: str = "") -> Table:
    """Return a row per expert with the tokens that are listed for it `by_lift` or `by_count`, each with its amount."""
    tokens = {expert: layer["experts"][expert][order] for expert in _most_used(layer, PAGE_EXPERTS)}
    columns = max(map(len, tokens.values()))
    rows = []
    for expert, listed in tokens.items():
        cells = [f"{shown(token['piece'])}{_NO_BREAK_SPACE}{amount.format_map(token)}" for token in listed]
        rows.append((str(expert), *cells))
    return Table(("expert", *map(str, range(1, columns + 1))), rows, title, note)


def _favorite_positions(layer: Mapping[str, Any], expert: int) -> str:
    """Return the range of positions of which the expert takes most, against its share of all tokens."""
    overall = layer["load"][expert] / sum(layer["load"])
    lifts = {label: load[expert] / max(1, sum(load)) / overall for label, load in _loads_by_position(layer).items()}
    best = max(lifts, key=lifts.__getitem__)
    return f"{best}: {lifts[best]:.1f}x"


def _text_table(name: str, layer: Mapping[str, Any]) -> Table:
    rows = []
    for text, load in layer["texts"].items():
        experts = _by_load(load)[:_TEXT_EXPERTS]
        rows.append((text, "  ".join(f"{expert} ({load[expert] / max(1, sum(load)):.0%})" for expert in experts)))
    return Table(("", "experts, and their share"), rows, f"{shown_layer(name)}: where most of a text's tokens go")


def _drift_table(layers: Mapping[str, Any]) -> Table:
    """Return how many tokens of each layer change their expert from the first checkpoint to the second."""
    headings = ("layer", "tokens", "changed", "shared information")
    rows = []
    for name, layer in layers.items():
        shared = _two_decimals(layer["shared_information"]["share"])
        rows.append((shown_layer(name), f"{layer['tokens']:,}", percent(layer["changed"]), shared))
    note = (
        "Changed: tokens that change their expert, by the numbers of the experts. Shared information: how well one "
        "checkpoint's expert predicts the other's, whatever their numbers: 0 = chance, 1 = fully. It stays below 1 if "
        "tokens have several experts."
    )
    return Table(headings, rows, "From the first to the second", note)


def _most_used(layer: Mapping[str, Any], count: int) -> list[int]:
    """Return the experts with the most tokens, in the order of their numbers."""
    return sorted(_by_load(layer["load"])[:count])


def _by_load(load: Sequence[int]) -> list[int]:
    return sorted(range(len(load)), key=lambda expert: -load[expert])


def _limited(layer: Mapping[str, Any], count: int) -> str:
    """Return a remark for a title where not all experts are shown."""
    num_experts = len(layer["load"])
    return "" if num_experts <= count else f": the {count} of {num_experts} experts with most tokens, --json has all"


def shown(piece: str) -> str:
    """Return a piece of a vocabulary on one line, with four spaces or more as their number."""
    line = one_line(piece).replace("<pad>", "(start)")
    return re.sub(f"{_SPACE}{{4,}}", lambda match: f"{_SPACE}\N{MULTIPLICATION SIGN}{len(match[0])}", line)


def _two_decimals(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


# Maps


def _load_map(index: int, model: Mapping[str, Any]) -> Figure:
    """Return the load of the experts by layer."""
    loads = {shown_layer(name): layer["load"] for name, layer in model["layers"].items()}
    total = {"load": [*map(sum, zip(*loads.values(), strict=True))]}
    return _map(f"experts_{index}", "Load of the experts", "layer", total, loads)


def _layer_maps(index: int, name: str, layer: Mapping[str, Any], rare: int) -> Iterator[Figure]:
    """Yield a layer's load by position, by sentinel (those read `rare` times at least), by kind and by text."""
    sentinels = {piece: load for piece, load in layer["sentinels"].items() if sum(load) >= rare}
    texts = layer["texts"] if len(layer["texts"]) > 1 else {}
    loads_by = {"position": _loads_by_position(layer), "sentinel": sentinels, "kind": layer["kinds"], "text": texts}
    for kind, loads in loads_by.items():
        if loads:
            yield _map(f"{kind}_{index}_{name}", f"By {kind}", kind, layer, loads, shown_layer(name))


def _map(
    name: str, title: str, kind: str, layer: Mapping[str, Any], loads: Mapping[str, Sequence[int]], subject: str = ""
) -> Figure:
    """Return a map of the experts with the most tokens of a layer, and of the labels of `loads`, tokens [E] each.

    A cell is the expert's share of the tokens of its label, times the number of experts: 1 is even.
    """
    rows = [
        (label, expert, load[expert] / max(1, sum(load)) * len(load))
        for expert in _most_used(layer, PAGE_EXPERTS)
        for label, load in loads.items()
    ]
    table = Table((kind, "expert", "share"), rows, name=file_name(name))
    scale = even_scale([relative for _, _, relative in rows])
    return load_map(f"{title}{_limited(layer, PAGE_EXPERTS)}", table, scale, subject)


def _loads_by_position(layer: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the tokens [E] that each expert gets in each range of positions, keyed by `first-last`."""
    firsts, last, loads = layer["positions"].values()
    # A range ends before the next one begins.
    ends = [*(first - 1 for first in firsts[1:]), last]
    return {
        str(first) if first == end else f"{first}-{end}": load
        for first, end, load in zip(firsts, ends, loads, strict=True)
    }
