"""The tables of a routing atlas: they fit a terminal, and no piece of a vocabulary does anything to it."""

import io
from typing import Any

from switchcli.report.console import PLAIN_WIDTH, Console
from switchcli.report.routing import ROWS, short, shown, tables


def a_layer(experts: int, pieces: list[str]) -> dict[str, Any]:
    """Expert e takes e tokens of ten each; the first none."""
    load = [10 * expert for expert in range(experts)]
    named = [{"id": 1, "piece": piece, "count": 10, "lift": 2.0} for piece in pieces]
    found = {"held": 1, "turned_away_fraction": 0.125, "confidence": 0.5, "by_lift": named, "by_count": named}
    nothing = {"held": 0, "turned_away_fraction": None, "confidence": None, "by_lift": [], "by_count": []}
    return {
        "tokens": sum(load),
        "dropped_fraction": 0.25,
        "confidence": 0.5,
        "entropy": 1.0,
        "load": load,
        "told_by": {what: {"share": 0.5} for what in ("token", "position", "text")} | {"position": {"share": None}},
        "experts": [{"share": one / sum(load), **(found if one else nothing)} for one in load],
        "positions": {"firsts": [0, 256], "last": 511, "load": {0: [0] * experts, 1: load}},
        "sentinels": {"<extra_id_0>": load},
        "texts": {"en": load, "de": load[::-1]},
    }


def a_survey(experts: int = 4, pieces: list[str] | None = None) -> dict[str, Any]:
    layer = a_layer(experts, ["the"] if pieces is None else pieces)
    names = ("encoder.blocks.11.feed_forward.layer", "decoder.blocks.11.self_attention.attention")
    atlas = {"checkpoint": "runs/one/checkpoints/step-00000010", "step": 10, "capacity": "paper"}
    matched: dict[str, Any] = {"changed": 0.125, "beyond_chance": 0.75, "exact": True}
    drift: dict[str, Any] = {"tokens": 60, "changed": 0.5, "beyond_chance": None, "matched": matched}
    drift["told_by_the_other"] = {"share": 0.25}
    layers, drifts = (dict(zip(names, (each, each), strict=True)) for each in (layer, drift))
    return {"atlases": [{**atlas, "layers": layers}], "drift": drifts}


def printed(survey: dict[str, Any]) -> str:
    stream = io.StringIO()
    for table in tables(survey):
        Console(stream=stream).rows(*table)
    return stream.getvalue()


def test_all_is_there_and_fits_a_terminal() -> None:
    said = printed(a_survey(experts=2 * ROWS, pieces=["antidisestablishment"] * 10))
    assert max(map(len, said.splitlines())) <= PLAIN_WIDTH
    rows = [line.split() for line in said.splitlines()]
    assert ["encoder", "11", "4,960", "25.0%", "1", "0.50", "1.00", "0.50", "-", "0.50"] in rows
    assert ["31", *["antidisestablishment"] * 2, "6.2%", "12.5%", "0.50", "256-511:", "1.0x", "6.2%"] in rows
    assert f"encoder.blocks.11.feed_forward.layer: the {ROWS} of {2 * ROWS} with most tokens" in said
    assert [row[0] for row in rows if "antidisestablishment" in row] == [*map(str, range(16, 32))] * 2
    assert ["decoder", "11", "attention", "60", "50.0%", "-", "12.5%", "0.75", "0.25"] in rows
    assert ["en", "31", "(6%)", "30", "(6%)", "29", "(6%)", "28", "(6%)", "27", "(5%)", "26", "(5%)"] in rows


def test_an_expert_without_a_token_is_shown_as_such() -> None:
    (line,) = {line.strip() for line in printed(a_survey()).splitlines() if "no token" in line}
    assert line.split() == ["0", "no", "token", "0.0%", "-", "-", "-", "-"]


def test_pieces_are_harmless_and_on_one_line() -> None:
    hostile = ["\x1b[2Jgone", "\n\n", "\t", "[bold]", "\u202eright", "<pad>"]
    said = printed(a_survey(pieces=hostile))
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert r"\x1b[2Jgone \n\n \t [bold] \u202eright" in said
    assert shown("<pad>") == "(start)"


def test_layers_have_short_names() -> None:
    assert short("decoder.blocks.3.self_attention.attention") == "decoder 3 attention"
    assert short("encoder.blocks.0.feed_forward.layer") == "encoder 0"
