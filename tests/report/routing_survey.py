"""A routing report as the tables and the page get it, of two layers that are alike."""

from typing import Any

LAYERS = ("encoder.blocks.11.feed_forward", "decoder.blocks.11.self_attention")


def a_layer(experts: int, pieces: list[str]) -> dict[str, Any]:
    """Expert e has 10 e of the choices, all behind position 255; expert 0 has none."""
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
        "explained_by": {
            "token": {"share": 0.5},
            "position": {"share": None},
            "text": {"share": -0.25, "nats": 0.25, "by_chance": 0.125, "share_of_values": 0.5},
            "kind": {"share": 0.75, "nats": 0.0, "by_chance": 0.0, "share_of_values": None},
        },
        "kinds": {"keyword": load, "name": load[::-1]},
        "experts": [{"share": one / sum(load), **(found if one else nothing)} for one in load],
        "positions": {"firsts": [0, 256], "last": 511, "load": [[0] * experts, load]},
        "sentinels": {"<extra_id_0>": load, "<extra_id_1>": [1] + [0] * (experts - 1)},
        "texts": {"en": load, "de": load[::-1]},
    }


def a_survey(experts: int = 4, pieces: list[str] | None = None) -> dict[str, Any]:
    """Return the routing report of two checkpoints; the experts of the second are numbered the other way round."""
    layer = a_layer(experts, ["the"] if pieces is None else pieces)
    drift: dict[str, Any] = {
        "tokens": 60,
        "changed": 0.5,
        "shared_information": {"share": 0.25},
    }
    layers, drifts = (dict(zip(LAYERS, (each, each), strict=True)) for each in (layer, drift))
    models = [
        {
            "checkpoint": f"runs/{name}/checkpoints/step-00000010",
            "step": 10,
            "capacity": "paper",
            "num_experts": experts,
            "layers": layers,
        }
        for name in ("one", "two")
    ]
    return {"sequences": {"en": 8, "de": 8}, "rare": 10, "models": models, "drift": drifts}
