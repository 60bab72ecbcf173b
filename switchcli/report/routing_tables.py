"""The tables of a routing atlas: all layers at a glance, each layer's experts, the drift between two checkpoints."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from switchcli.metric_names import DROPPED_FRACTION
from switchcli.report.figures import shown_layer
from switchcli.report.html_page import HtmlTable
from switchcli.report.safe_text import one_line
from switchcli.report.units import si

ROWS = 16
"""Experts of a layer that a terminal is shown, those with the most tokens; --json has all."""
_PIECES = 50
"""Characters of an expert's tokens in a terminal."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark for one."""
_TEXT_EXPERTS = 6
"""That are named of a text."""


def tables(survey: Mapping[str, Any]) -> Iterator[HtmlTable]:
    """For a terminal."""
    for atlas in survey["atlases"]:
        yield summary(atlas, survey["sequences"])
        for name, layer in atlas["layers"].items():
            yield _experts_and_tokens(name, layer)
            if len(layer["texts"]) > 1:
                yield _texts(name, layer)
    if survey["drift"] is not None:
        yield drift(survey["drift"])


def summary(atlas: Mapping[str, Any], sequences: Mapping[str, int]) -> HtmlTable:
    """The layers of a checkpoint, over so many sequences of each text."""
    layers = atlas["layers"]
    by = next(iter(layers.values()))["told_by"]
    headings = ("layer", "tokens", "dropped", "unused", "sure", "entropy", *(f"by {what}" for what in by))
    rows = [
        (
            shown_layer(name),
            si(layer["tokens"]),
            percent(layer[DROPPED_FRACTION]),
            str(layer["load"].count(0)),
            f"{layer['confidence']:.2f}",
            f"{layer['entropy']:.2f}",
            *(share(told["share"]) for told in layer["told_by"].values()),
        )
        for name, layer in layers.items()
    ]
    caption = (
        "Unused: experts. Sure: the mean of the highest probability. Entropy: of all probabilities, in nats. By "
        f"{', '.join(by)}: how much of the choice of an expert it decides: 0 no more than chance would, 1 all."
    )
    measured = ", ".join(f"{number:,} of {text}" for text, number in sequences.items())
    title = f"{atlas['checkpoint']}, capacity {atlas['capacity']}; held-out sequences: {measured}"
    return HtmlTable(title, headings, rows, caption)


EXPERT_HEADINGS = ("share", "no slot", "sure", "positions", "of sentinels")
EXPERTS = (
    "No slot: of those that chose it. Sure: the mean of its probability where it is chosen. Positions: where "
    "it takes most against its share. Of sentinels: the share of all that it takes."
)


def expert_figures(layer: Mapping[str, Any], expert: int) -> tuple[str, ...]:
    """Under `EXPERT_HEADINGS`."""
    found = layer["experts"][expert]
    if not layer["load"][expert]:
        return (percent(found["share"]), *["-"] * 4)
    sentinels = sum(map(sum, layer["sentinels"].values()))
    mine = sum(load[expert] for load in layer["sentinels"].values())
    return (
        percent(found["share"]),
        percent(found["turned_away_fraction"]),
        f"{found['confidence']:.2f}",
        _where(layer, expert),
        percent(mine / sentinels) if sentinels else "-",
    )


def most_used(load: Sequence[float], most: int) -> list[int]:
    """The experts with the most tokens, by their numbers."""
    return sorted(sorted(range(len(load)), key=lambda expert: -load[expert])[:most])


def limited(num: int, most: int) -> str:
    """What to say where not all experts are shown."""
    return "" if num <= most else f": the {most} of {num} experts with most tokens, --json has all"


def _experts_and_tokens(name: str, layer: Mapping[str, Any]) -> HtmlTable:
    rows = []
    for expert in most_used(layer["load"], ROWS):
        found = layer["experts"][expert]
        pieces = _pieces(found["by_lift"] or found["by_count"]) if layer["load"][expert] else "no token"
        rows.append((f"{expert:<4} {pieces}", *expert_figures(layer, expert)))
    title = f"{shown_layer(name)}{limited(len(layer['load']), ROWS)}"
    return HtmlTable(title, ("expert, tokens by lift", *EXPERT_HEADINGS), rows)


def bins(layer: Mapping[str, Any]) -> dict[str, list[int]]:
    """What each bin of positions has of each expert, by its first and last."""
    firsts, last, load = layer["positions"].values()
    ends = [*(first - 1 for first in firsts[1:]), last]
    return {
        str(first) if first == end else f"{first}-{end}": row
        for first, end, row in zip(firsts, ends, load, strict=True)
    }


def _where(layer: Mapping[str, Any], expert: int) -> str:
    even = layer["load"][expert] / sum(layer["load"])
    lifts = {label: load[expert] / max(1, sum(load)) / even for label, load in bins(layer).items()}
    best = max(lifts, key=lifts.__getitem__)
    return f"{best}: {lifts[best]:.1f}x"


def _texts(name: str, layer: Mapping[str, Any]) -> HtmlTable:
    rows = []
    for text, load in layer["texts"].items():
        first = sorted(range(len(load)), key=lambda expert: -load[expert])[:_TEXT_EXPERTS]
        rows.append((text, "  ".join(f"{expert} ({load[expert] / max(1, sum(load)):.0%})" for expert in first)))
    return HtmlTable(f"{shown_layer(name)}: where most of a text's tokens go", ("", "experts, and their share"), rows)


def drift(layers: Mapping[str, Any]) -> HtmlTable:
    """From the one checkpoint to the other."""
    headings = ("layer", "tokens", "changed", "agreement", "matched changed", "agreement", "told")
    rows = [
        (
            shown_layer(name),
            f"{layer['tokens']:,}",
            percent(layer["changed"]),
            share(layer["beyond_chance"]),
            percent(layer["matched"]["changed"]),
            share(layer["matched"]["beyond_chance"]),
            share(layer["told_by_the_other"]["share"]),
        )
        for name, layer in layers.items()
    ]
    exact = all(layer["matched"]["exact"] for layer in layers.values())
    caption = (
        f"Tokens that change expert: as experts are numbered, and by the {'best' if exact else 'greedy'} matching of "
        "one's with the other's. Agreement beyond chance (Cohen's kappa; beyond what a matching finds by chance), and "
        "told: how much one's expert tells of the other's whatever their numbers: 0 no more than chance would, 1 all. "
        "Where a token has several experts one of them seldom tells all."
    )
    return HtmlTable("From the first to the second", headings, rows, caption)


def _pieces(listed: Sequence[Mapping[str, Any]]) -> str:
    """As many as there is room for."""
    said = ""
    for one in listed:
        longer = f"{said} {shown(one['piece'])}".strip()
        if len(longer) > _PIECES:
            break
        said = longer
    return said


def shown(piece: str) -> str:
    """A piece of a vocabulary on one line, many spaces as their number."""
    line = one_line(piece).replace("<pad>", "(start)")
    return re.sub(f"{SPACE}{{4,}}", lambda found: f"{SPACE}\N{MULTIPLICATION SIGN}{len(found[0])}", line)


def percent(fraction: float) -> str:
    return f"{fraction:.1%}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
