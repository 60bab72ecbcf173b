"""`switchcli report` on many long runs: seconds of the command in a process of its own, and bytes of its page."""

import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import Job, Result

from switchcli.recipe import yaml_nodes

RUNS, SEEDS, LINES, EVALUATE_EVERY = 50, 3, 10_000, 100
"""Runs, of so many seeds a recipe, with so many logged steps; an evaluation in every so many of them."""
EXPERTS = 8
LAYERS = [f"{stack}.blocks.{block}.feed_forward" for stack in ("encoder", "decoder") for block in range(2)]
TOKENS = 8192


def report(job: Job) -> Result:
    """The table alone, then the page too, in turn."""
    seconds: dict[str, list[float]] = {"table": [], "table and page": []}
    with tempfile.TemporaryDirectory() as folder:
        page, runs = Path(folder, "page.html"), [Path(folder, f"e{run // SEEDS}-{run % SEEDS}") for run in range(RUNS)]
        for place, run in enumerate(runs):
            write(run, place)
        for _ in range(job["rounds"]):
            for (name, found), more in zip(seconds.items(), ([], ["--html", str(page)]), strict=True):
                began = time.perf_counter()
                command = [sys.executable, "-m", "switchcli", "report", *map(str, runs), *more]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                found.append(time.perf_counter() - began)
                print(f"{name}: {found[-1]:.1f} s", file=sys.stderr, flush=True)
        read = sum(file.stat().st_size for run in runs for file in run.iterdir())
        return {"seconds": seconds, "page_bytes": page.stat().st_size, "bytes": read}


def write(run: Path, place: int) -> None:
    """A run's folder with figures as a training's, made up."""
    run.mkdir()
    kind, seed, draw = place // SEEDS, place % SEEDS, random.Random(place)
    recipe = {"verb": "pretrain", "model": {"num_experts": EXPERTS, "router": {"jitter": kind / 1000}}}
    recipe["train"] = {"steps": LINES, "batch_tokens": TOKENS, "seed": seed}
    (run / "recipe.yaml").write_text(yaml_nodes.write(recipe), encoding="utf-8")
    (run / "tokenizer.json").write_text("{}", encoding="utf-8")
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, LINES + 1):
            quality = -6 + 4 * (1 - math.exp(-step / (1500 + 50 * kind))) + draw.gauss(0, 0.05)
            file.write(json.dumps(logged(step, quality, draw)) + "\n")
            if step % EVALUATE_EVERY == 0:
                line = {"step": step, "held_out/neg_log_perplexity": quality, "held_out/dropped_fraction": 0.1}
                file.write(json.dumps(line) + "\n")
    result = {"verb": "pretrain", "step": LINES, "parameters": 10**6, "tokens_per_second": 7e4}
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")


def logged(step: int, quality: float, draw: random.Random) -> dict[str, object]:
    figures = ("balance", "confidence", "dropped_fraction", "entropy", "z")
    layers = {
        layer: {**{name: draw.random() for name in figures}, "load": [draw.randrange(10**5) for _ in range(EXPERTS)]}
        for layer in LAYERS
    }
    beside = ("auxiliary_loss", "dropped_fraction", "gradient_norm", "learning_rate", "data_wait_fraction", "balance")
    return {
        "step": step,
        "neg_log_perplexity": quality,
        **{name: draw.random() for name in beside},
        "layers": layers,
        "targets_seen": step * 1900,
        "seconds": step * 0.12,
        "tokens_per_second": 7e4 * draw.random(),
        "flops_per_second": 1.5e10,
        "seconds_left": (LINES - step) * 0.12,
    }
