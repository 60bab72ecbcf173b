"""The tables of a routing report: all layers at a glance, each layer's experts, the drift between two checkpoints."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from switchcli.metric_names import DROPPED_FRACTION
from switchcli.report.figures import shown_layer
from switchcli.report.html_page import HtmlTable
from switchcli.report.safe_text import one_line
from switchcli.report.units import percent, si

TERMINAL_EXPERTS = 16
"""Experts of a layer that a terminal shows, those with the most tokens; --json has all."""
_TOKEN_CHARACTERS = 50
"""Characters of an expert's tokens in a terminal."""
_TEXT_EXPERTS = 6
"""Experts that are listed for a text."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark for a space."""

EXPERT_HEADINGS = ("share", "no slot", "sure", "positions", "of sentinels")
EXPERT_CAPTION = (
    "No slot: the share of the tokens that chose it. Sure: the mean of its probability where it is chosen. Positions: "
    "where it takes most tokens against its share of all. Of sentinels: its share of them."
)


def tables(survey: Mapping[str, Any]) -> Iterator[HtmlTable]:
    """Yield the tables for a terminal."""
    for atlas in survey["models"]:
        yield summary(atlas, survey["sequences"])
        for name, layer in atlas["layers"].items():
            yield _expert_table(name, layer)
            if len(layer["texts"]) > 1:
                yield _text_table(name, layer)
    if survey["drift"] is not None:
        yield drift_table(survey["drift"])


def summary(atlas: Mapping[str, Any], sequences: Mapping[str, int]) -> HtmlTable:
    """Return a row per layer of a checkpoint, measured over so many sequences of each text."""
    layers = atlas["layers"]
    deciders = next(iter(layers.values()))["explained_by"]
    headings = ("layer", "tokens", "dropped", "unused", "sure", "entropy", *(f"by {kind}" for kind in deciders))
    rows = [
        (
            shown_layer(name),
            si(layer["tokens"]),
            percent(layer[DROPPED_FRACTION]),
            str(layer["load"].count(0)),
            f"{layer['confidence']:.2f}",
            f"{layer['entropy']:.2f}",
            *(share(info["share"]) for info in layer["explained_by"].values()),
        )
        for name, layer in layers.items()
    ]
    caption = (
        "Unused: experts without a token. Sure: the mean of the highest probability. Entropy: of all probabilities, in "
        f"nats. By {', '.join(deciders)}: how much of the choice of an expert it decides, from 0, no more than chance, "
        "to 1, all."
    )
    measured = ", ".join(f"{number:,} of {text}" for text, number in sequences.items())
    title = f"{atlas['checkpoint']}, capacity {atlas['capacity']}; held-out sequences: {measured}"
    return HtmlTable(title, headings, rows, caption)


def expert_cells(layer: Mapping[str, Any], expert: int) -> tuple[str, ...]:
    """Return an expert's cells under `EXPERT_HEADINGS`."""
    info = layer["experts"][expert]
    if not layer["load"][expert]:
        return (percent(info["share"]), *["-"] * (len(EXPERT_HEADINGS) - 1))
    all_sentinels = sum(map(sum, layer["sentinels"].values()))
    sentinels = sum(load[expert] for load in layer["sentinels"].values())
    return (
        percent(info["share"]),
        percent(info["turned_away_fraction"]),
        f"{info['confidence']:.2f}",
        _favorite_positions(layer, expert),
        percent(sentinels / all_sentinels) if all_sentinels else "-",
    )


def most_used(load: Sequence[float], count: int) -> list[int]:
    """Return the experts with the most tokens, in the order of their numbers."""
    return sorted(_by_load(load)[:count])


def _by_load(load: Sequence[float]) -> list[int]:
    return sorted(range(len(load)), key=lambda expert: -load[expert])


def limited(num_experts: int, shown_experts: int) -> str:
    """Return a remark for a title where not all experts are shown."""
    if num_experts <= shown_experts:
        return ""
    return f": the {shown_experts} of {num_experts} experts with most tokens, --json has all"


def _expert_table(name: str, layer: Mapping[str, Any]) -> HtmlTable:
    rows = []
    for expert in most_used(layer["load"], TERMINAL_EXPERTS):
        info = layer["experts"][expert]
        tokens = _token_list(info["by_lift"] or info["by_count"]) if layer["load"][expert] else "no token"
        rows.append((f"{expert:<4} {tokens}", *expert_cells(layer, expert)))
    title = f"{shown_layer(name)}{limited(len(layer['load']), TERMINAL_EXPERTS)}"
    return HtmlTable(title, ("expert, tokens by lift", *EXPERT_HEADINGS), rows)


def loads_by_position(layer: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the tokens [E] that each expert gets in each range of positions, keyed by `first-last`."""
    firsts, last, loads = layer["positions"].values()
    # A range ends before the next one begins.
    ends = [*(first - 1 for first in firsts[1:]), last]
    return {
        str(first) if first == end else f"{first}-{end}": load
        for first, end, load in zip(firsts, ends, loads, strict=True)
    }


def _favorite_positions(layer: Mapping[str, Any], expert: int) -> str:
    """Return the range of positions of which the expert takes most, against its share of all tokens."""
    overall = layer["load"][expert] / sum(layer["load"])
    lifts = {label: load[expert] / max(1, sum(load)) / overall for label, load in loads_by_position(layer).items()}
    best = max(lifts, key=lifts.__getitem__)
    return f"{best}: {lifts[best]:.1f}x"


def _text_table(name: str, layer: Mapping[str, Any]) -> HtmlTable:
    rows = []
    for text, load in layer["texts"].items():
        experts = _by_load(load)[:_TEXT_EXPERTS]
        rows.append((text, "  ".join(f"{expert} ({load[expert] / max(1, sum(load)):.0%})" for expert in experts)))
    return HtmlTable(f"{shown_layer(name)}: where most of a text's tokens go", ("", "experts, and their share"), rows)


def drift_table(layers: Mapping[str, Any]) -> HtmlTable:
    """Return how many tokens of each layer change their expert from the first checkpoint to the second."""
    headings = ("layer", "tokens", "changed", "shared information")
    rows = [
        (
            shown_layer(name),
            f"{layer['tokens']:,}",
            percent(layer["changed"]),
            share(layer["shared_information"]["share"]),
        )
        for name, layer in layers.items()
    ]
    caption = (
        "Changed: tokens that change their expert, by the numbers of the experts. Shared information: how well one "
        "checkpoint's expert predicts the other's, whatever their numbers: 0 = chance, 1 = fully. It stays below 1 if "
        "tokens have several experts."
    )
    return HtmlTable("From the first to the second", headings, rows, caption)


def _token_list(tokens: Sequence[Mapping[str, Any]]) -> str:
    """Return the first tokens, as many as fit the column."""
    line = ""
    for token in tokens:
        longer = f"{line} {shown(token['piece'])}".strip()
        if len(longer) > _TOKEN_CHARACTERS:
            break
        line = longer
    return line


def shown(piece: str) -> str:
    """Return a piece of a vocabulary on one line, with four spaces or more as their number."""
    line = one_line(piece).replace("<pad>", "(start)")
    return re.sub(f"{SPACE}{{4,}}", lambda match: f"{SPACE}\N{MULTIPLICATION SIGN}{len(match[0])}", line)


def share(value: float | None) -> str:
    """Return a share with two decimals, or `-` where it is not known."""
    return "-" if value is None else f"{value:.2f}"
