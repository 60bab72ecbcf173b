"""The tables of a routing atlas: all layers at a glance, each layer's experts, the drift between two checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from switchcli.report.text import safe_text

ROWS = 16
"""Experts of a layer that people are shown, those with the most tokens; --json has all."""
_PIECES = 48
"""Characters of an expert's tokens."""


class Table(NamedTuple):
    """A title, and rows under their headings."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(survey: Mapping[str, Any]) -> Iterator[Table]:
    """All that people are shown of it."""
    for atlas in survey["atlases"]:
        yield _summary(atlas)
        for name, layer in atlas["layers"].items():
            yield _experts(name, layer)
            if len(layer["texts"]) > 1:
                yield _texts(name, layer)
    if survey["drift"] is not None:
        yield _drift(survey["drift"])


def _summary(atlas: Mapping[str, Any]) -> Table:
    layers = atlas["layers"]
    by = next(iter(layers.values()))["told_by"]
    headings = ("layer", "tokens", "dropped", "unused", "sure", "entropy", *(f"by {what}" for what in by))
    rows = [
        (
            short(name),
            f"{layer['tokens']:,}",
            _percent(layer["dropped_fraction"]),
            str(layer["load"].count(0)),
            f"{layer['confidence']:.2f}",
            f"{layer['entropy']:.2f}",
            *(_share(told["share"]) for told in layer["told_by"].values()),
        )
        for name, layer in layers.items()
    ]
    where = f"{atlas['checkpoint']}, step {atlas['step']}, capacity {atlas['capacity']}"
    return Table(f"{where}\nby a token, ...: how much it decides the expert; 0 is chance, 1 all", headings, rows)


def _experts(name: str, layer: Mapping[str, Any]) -> Table:
    most = sorted(range(len(layer["load"])), key=lambda expert: -layer["load"][expert])[:ROWS]
    title = name if len(most) == len(layer["load"]) else f"{name}: the {ROWS} of {len(layer['load'])} with most tokens"
    headings = ("expert, tokens by lift", "share", "no slot", "sure", "positions", "of sentinels")
    total = sum(map(sum, layer["sentinels"].values()))
    rows = []
    for expert in sorted(most):
        found = layer["experts"][expert]
        sentinels = sum(load[expert] for load in layer["sentinels"].values())
        unused = layer["load"][expert] == 0
        pieces = "no token" if unused else _pieces(found["by_lift"] or found["by_count"])
        rows.append(
            (
                f"{expert:<4} {pieces}",
                _percent(found["share"]),
                *(("-", "-", "-") if unused else _numbers(layer, expert)),
                "-" if unused or not total else _percent(sentinels / total),
            )
        )
    return Table(title, headings, rows)


def _numbers(layer: Mapping[str, Any], expert: int) -> tuple[str, str, str]:
    found = layer["experts"][expert]
    return _percent(found["turned_away_fraction"]), f"{found['confidence']:.2f}", _where(layer, expert)


def _where(layer: Mapping[str, Any], expert: int) -> str:
    """The positions that it takes most of all, against its share of the layer."""
    bins, all_of_it = layer["positions"], max(1, sum(layer["load"]))
    share = layer["load"][expert] / all_of_it
    lifts = [load[expert] / max(1, sum(load)) / share for load in bins["load"].values()]
    best = lifts.index(max(lifts))
    number = [*bins["load"]][best]
    ends = [first - 1 for first in bins["firsts"][1:]] + [bins["last"]]
    return f"{bins['firsts'][number]}-{ends[number]}: {lifts[best]:.1f}x"


def _texts(name: str, layer: Mapping[str, Any]) -> Table:
    """Which part of each text its favourite experts take."""
    rows = []
    for text, load in layer["texts"].items():
        first = sorted(range(len(load)), key=lambda expert: -load[expert])[:6]
        rows.append((text, "  ".join(f"{expert} ({load[expert] / max(1, sum(load)):.0%})" for expert in first)))
    return Table(f"{name}: the experts that most of a text's tokens go to", ("", "experts, and their share"), rows)


def _drift(layers: Mapping[str, Any]) -> Table:
    headings = ("layer", "tokens", "changed", "beyond chance", "changed, matched", "beyond chance", "told by the other")
    rows = [
        (
            short(name),
            f"{layer['tokens']:,}",
            _percent(layer["changed"]),
            _share(layer["beyond_chance"]),
            _percent(layer["matched"]["changed"]),
            _share(layer["matched"]["beyond_chance"]),
            _share(layer["told_by_the_other"]["share"]),
        )
        for name, layer in layers.items()
    ]
    exact = all(layer["matched"]["exact"] for layer in layers.values())
    how = "the best matching" if exact else "a greedy matching"
    return Table(
        f"From the first to the second: tokens that change expert, as numbered and after {how}", headings, rows
    )


def short(layer: str) -> str:
    """`encoder 1`, or `encoder 1 attention`, of a layer's full name."""
    stack, _, block, *part = layer.split(".")
    return f"{stack} {block}" + (" attention" if "attention" in part else "")


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
    """A piece of a vocabulary on one line."""
    return safe_text(piece).replace("\n", "\\n").replace("\t", "\\t").replace("<pad>", "(start)")


def _percent(fraction: float) -> str:
    return f"{fraction:.1%}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}"
