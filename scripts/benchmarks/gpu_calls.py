"""The calls of scripts/gpu in their order, the most important first.

It imports no torch, so that the list is printed at once.
"""

from typing import Any, NamedTuple

MODELS = ("t5-v1_1-base", "switch-base-64", "switch-base-8", "switch-base-128", "switch-base-32")
DENSE = MODELS[0]
EXPERTS = (64, 8, 128, 32)
WHO = {
    "eager": "ours eager",
    "compiled": "ours compiled, with flex_attention",
    "compiled-sdpa": "ours compiled, with torch's other attention kernels",
    "transformers": "transformers",
}
"""How the steps of a model are computed, in the order of the table."""
LIMIT_SECONDS = 580
"""A call that takes longer is stopped: shared machines cut commands off at ten minutes."""


class Call(NamedTuple):
    """One process: a benchmark job, or a run of pytest."""

    name: str
    minutes: float
    """Estimated for one H100; nobody has run this on a GPU yet."""
    what: str
    job: dict[str, Any]


def calls() -> list[Call]:
    """Return all calls, the most important first."""
    found = [
        tests("tests-layer", 2, "the sparse layer of every router against the CPU", ["tests/model/test_gpu_layer.py"]),
        Call("waits", 5, "where a step waits for the device, against the trace's prediction", {"kind": "waits"}),
        step(MODELS[0], "eager", 2),
        step(MODELS[1], "eager", 3),
        tests("tests-model", 4, "loss, gradients, flex_attention, answers", ["tests/model/test_gpu_model.py"]),
        step(MODELS[0], "compiled", 5),
        step(MODELS[1], "compiled", 6),
        step(MODELS[0], "transformers", 4),
        layer(EXPERTS[0]),
        layer(EXPERTS[1]),
        step(MODELS[2], "eager", 2),
        step(MODELS[3], "eager", 4),
        step(MODELS[4], "eager", 3),
        step(MODELS[0], "compiled-sdpa", 5),
        step(MODELS[1], "transformers", 5),
        verbs("tests-verbs", 5, "fine-tuning, distillation, scores, answers, kills", "not pretraining"),
        verbs("tests-compiled", 6, "compiled pre-training", "compiled"),
        layer(EXPERTS[2]),
        layer(EXPERTS[3]),
        verbs("tests-float32", 4, "pre-training in float32", "pretraining and float32 and not compiled"),
        verbs("tests-bfloat16", 6, "pre-training in bfloat16", "pretraining and not float32 and not compiled"),
        *(step(model, "compiled", 6) for model in MODELS[2:]),
        step(MODELS[1], "compiled-sdpa", 6),
        *(step(model, "transformers", 5) for model in MODELS[2:]),
    ]
    assert all(60 * call.minutes < LIMIT_SECONDS for call in found)
    return found


def step(model: str, who: str, minutes: float) -> Call:
    what = f"training steps of {model}, {WHO[who]}"
    return Call(f"step-{model}-{who}", minutes, what, {"kind": "step", "model": model, "who": who})


def layer(experts: int) -> Call:
    what = f"one sparse layer of {experts} experts and other ways to compute it"
    return Call(f"layer-{experts}", 3, what, {"kind": "layer", "experts": experts})


def tests(name: str, minutes: float, what: str, arguments: list[str]) -> Call:
    return Call(name, minutes, f"tests: {what}", {"kind": "tests", "arguments": arguments})


def verbs(name: str, minutes: float, what: str, chosen: str) -> Call:
    return tests(name, minutes, what, ["tests/commands/test_gpu.py", "-k", chosen])
