"""The part of a report on routing: the load of each expert, and the tokens that it takes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from switchcli.metric_names import DROPPED_FRACTION, LOAD_ENTROPY, MAX_LOAD
from switchcli.report import html_page
from switchcli.report.charts import Figure, load_map
from switchcli.report.figures import even_scale, file_name, shown_layer
from switchcli.report.html_page import Part
from switchcli.terminal.safe_text import one_line
from switchcli.terminal.table import Table, Value
from switchcli.terminal.units import percent, si

Survey = Mapping[str, Any]
"""The routing of a checkpoint, as `runs.evaluate.routing_survey` measures it and `--json` has it."""
TERMINAL_EXPERTS, PAGE_EXPERTS = 16, 64
"""Experts of a layer that a terminal and a page show, those with the most tokens; --json has all."""
_TOKEN_CHARACTERS = 50
"""Characters of an expert's tokens in a terminal."""
_TEXT_EXPERTS = 6
"""Experts that are listed for a text."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark for a space."""
_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
_EXPERT_HEADINGS = ("share", "no slot", "sure", "of sentinels")
_EXPERT_NOTE = (
    "No slot: the share of the tokens that chose it. Sure: the mean of its probability where it is chosen. Of "
    "sentinels: its share of them."
)
_LIFT_NOTE = "Lift: how many times more often the expert gets a token than all experts together; without rare tokens."
_MAP_NOTE = (
    "In a map a cell is an expert's share of the tokens of its row, as a multiple of the even share: 1 is even, and "
    "where it is dark the tokens go elsewhere. A decoder reads its targets one position later, after (start)."
)


def tables(survey: Survey) -> Iterator[Table]:
    """Yield the tables for a terminal."""
    yield _summary(survey)
    for name, layer in survey["layers"].items():
        yield _expert_table(shown_layer(name), layer, TERMINAL_EXPERTS, with_tokens=True)
        if len(layer["texts"]) > 1:
            rows = []
            for text, load in layer["texts"].items():
                experts = _by_load(load)[:_TEXT_EXPERTS]
                shares = (f"{expert} ({load[expert] / max(1, sum(load)):.0%})" for expert in experts)
                rows.append((text, "  ".join(shares)))
            title = f"{shown_layer(name)}: where most of a text's tokens go"
            yield Table(("", "experts, and their share"), rows, title)


def section(survey: Survey) -> Part:
    """Return the section of a page: the summary, and the maps and tables of each layer."""
    layers = survey["layers"]
    loads = {shown_layer(name): layer["load"] for name, layer in layers.items()}
    total = {"load": [*map(sum, zip(*loads.values(), strict=True))]}
    elements: list[Part | Table] = [html_page.paragraphs(_MAP_NOTE), _summary(survey)]
    elements.append(html_page.charts([_map("experts", "Load of the experts", "layer", total, loads)]))
    for name, layer in layers.items():
        sentinels = {piece: load for piece, load in layer["sentinels"].items() if sum(load) >= survey["rare"]}
        texts = layer["texts"] if len(layer["texts"]) > 1 else {}
        maps = html_page.charts(
            [
                _map(f"{kind}_{name}", f"By {kind}", kind, layer, loads_of_kind, shown_layer(name))
                for kind, loads_of_kind in (("sentinel", sentinels), ("text", texts))
                if loads_of_kind
            ]
        )
        experts = _expert_table("Experts", layer, PAGE_EXPERTS, with_tokens=False, note=_EXPERT_NOTE)
        lifts = _token_table(layer, "by_lift", "Tokens by lift", "{lift:.1f}x", _LIFT_NOTE)
        counts = _token_table(layer, "by_count", "Most frequent tokens", "{count:,}")
        listed = [table for table in (lifts, counts) if len(table.columns) > 1]
        elements.append(html_page.collapsible(shown_layer(name), maps, experts, *listed))
    return html_page.section("Experts", *elements)


def checkpoint_title(survey: Survey) -> str:
    """Return the folder of the run and the step of its checkpoint."""
    path = Path(survey["checkpoint"]).resolve()
    run = path.parents[1] if path.parent.name == "checkpoints" else path
    return f"{run.name}, step {survey['step']:,}"


# Tables


def _summary(survey: Survey) -> Table:
    """Return a row per layer."""
    headings = ("layer", "tokens", "dropped", "unused", "max load", "load entropy", "sure", "entropy")
    rows = [
        (
            shown_layer(name),
            si(layer["tokens"]),
            percent(layer[DROPPED_FRACTION]),
            layer["load"].count(0),
            f"{layer[MAX_LOAD]:.2f}",
            f"{layer[LOAD_ENTROPY]:.2f}",
            f"{layer['confidence']:.2f}",
            f"{layer['entropy']:.2f}",
        )
        for name, layer in survey["layers"].items()
    ]
    note = (
        "Unused: experts without a token. Max load: the largest over the mean. Load entropy: in nats, at most the "
        "logarithm of the number of experts. Sure: the mean of the highest probability. Entropy: of all probabilities, "
        "in nats."
    )
    measured = ", ".join(f"{number:,} of {text}" for text, number in survey["sequences"].items())
    title = f"{survey['checkpoint']}, capacity {survey['capacity']}; held-out sequences: {measured}"
    return Table(headings, rows, title, note)


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
        f"{info['confidence']:.2f}",
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


# Maps


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
