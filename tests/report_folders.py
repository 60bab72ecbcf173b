"""Folders of runs, made up: what a report reads, without a training."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

STEPS, EVERY, TOKENS, FLOPS = 100, 10, 1000, 5000
LAYERS = ("encoder.blocks.1.feed_forward", "decoder.blocks.0.feed_forward")
Quality = Callable[[int], float]
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "<svg onload=window.hacked=1>",
    "javascript:window.hacked=1",
    "'); window.hacked = 1; ('",
    "<!--<script>",
    "\u2028window.hacked = 1\u2029",
    "]]></style><script>window.hacked = 1</script>",
)
"""Text that a browser would act on if it were not escaped."""


def a_run(
    folder: Path,
    quality: Quality = lambda step: step / 50 - 5,
    *,
    steps: int = STEPS,
    of: int | None = None,
    seed: int = 0,
    experts: int = 0,
    seconds: float = 0.5,
    tokenizer: str = "{}",
    model: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
) -> Path:
    """A run with `quality` after each tenth step, `seconds` each; it goes on when it has done fewer steps than `of`."""
    folder.mkdir(parents=True)
    recipe = {"verb": "pretrain", "description": str(folder), "model": {"num_experts": experts or 1, **(model or {})}}
    recipe["train"] = {"steps": of or steps, "batch_tokens": TOKENS, "seed": seed}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(0, steps + 1, EVERY):
            if step:
                file.write(json.dumps(logged(step, quality(step), experts, seconds)) + "\n")
            held_out = {"held_out/neg_log_perplexity": quality(step), "held_out/bits_per_byte": -quality(step) / 2}
            file.write(json.dumps({"step": step, **held_out}) + "\n")
    if of is None or of == steps:
        facts = {"verb": "pretrain", "step": steps, "seconds": seconds * steps, "parameters": 10**6 + experts}
        facts |= {"held_out/neg_log_perplexity": quality(steps), "tokens_per_second": TOKENS / seconds}
        (folder / "result.json").write_text(json.dumps({**facts, **(result or {})}))
    return folder


def logged(step: int, quality: float, experts: int, seconds: float) -> dict[str, Any]:
    """A line. Expert e gets e + 1 of so many parts of the tokens; the entropy of the routers is 1 nat."""
    record: dict[str, Any] = {"step": step, "neg_log_perplexity": quality}
    if experts:
        figures = {"entropy": 1.0, "load": [100 * (expert + 1) for expert in range(experts)]}
        record |= {"dropped_fraction": 0.25, "layers": dict.fromkeys(LAYERS, figures)}
    rates = {"tokens_per_second": TOKENS / seconds, "flops_per_second": FLOPS / seconds}
    record["input_tokens"] = step * TOKENS
    return {**record, "seconds": step * seconds, **rates, "seconds_left": 0.0}
