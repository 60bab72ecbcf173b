"""A routing report as the tables and the page get it, of two layers that are alike."""

from typing import Any

LAYERS = ("encoder.blocks.11.feed_forward", "decoder.blocks.11.self_attention")


def a_layer(experts: int, pieces: list[str]) -> dict[str, Any]:
    """Expert e has 10 e of the choices; expert 0 has none."""
    load = [10 * expert for expert in range(experts)]
    named = [{"id": place, "piece": piece, "count": 1234, "lift": 2.0} for place, piece in enumerate(pieces)]
    found = {"turned_away_fraction": 0.125, "confidence": 0.5, "by_lift": named, "by_count": named}
    nothing = {"turned_away_fraction": None, "confidence": None, "by_lift": [], "by_count": []}
    return {
        "tokens": sum(load),
        "dropped_fraction": 0.25,
        "confidence": 0.5,
        "entropy": 1.0,
        "load": load,
        "max_load": 1.75,
        "load_entropy": 0.625,
        "experts": [{"share": one / sum(load), **(found if one else nothing)} for one in load],
        "sentinels": {"<extra_id_0>": load, "<extra_id_1>": [1] + [0] * (experts - 1)},
        "texts": {"en": load, "de": load[::-1]},
    }


def a_survey(experts: int = 4, pieces: list[str] | None = None) -> dict[str, Any]:
    """Return the routing report of a checkpoint."""
    return {
        "checkpoint": "runs/one/checkpoints/step-00000010",
        "step": 10,
        "capacity": "paper",
        "num_experts": experts,
        "sequences": {"en": 8, "de": 8},
        "rare": 10,
        "layers": dict.fromkeys(LAYERS, a_layer(experts, ["the"] if pieces is None else pieces)),
    }
