"""A text, tiny recipes that train on it, and how a command ended: what tests of commands and of the API share."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

WORDS = ["the", "a", "of", "red", "green", "blue", "walk", "run", "is", "not", "alpha", "beta", "gamma", "delta"]
RECIPE = """\
model:
  {size: tiny, vocab_size: 512, num_experts: 4, d_model: 32, d_ff: 64, d_kv: 8, dropout: 0.1, router: {jitter: 0.01}}
data:
  corpora: [{kind: files, paths: [text.txt], sample_by: line}]
  tokenizer: {kind: train, vocab_size: 512}
  objective: {inputs_length: 32}
  held_out_fraction: 0.1
train: {steps: 2, batch_tokens: 256, microbatch_tokens: 128, device: cpu}
log: {every_steps: 3}
eval: {every_steps: 5, sequences: 8}
checkpoint: {save_every_steps: 4}
"""


def write_text(path: Path) -> None:
    draw = random.Random(0)
    path.write_text("".join(" ".join(draw.choices(WORDS, k=40)) + "\n" for _ in range(300)))


TUNING = """\
model: {dropout: 0.1, expert_dropout: 0.3}
tasks:
  - {kind: files, name: colour, train: [colour.train.jsonl], validation: [colour.validation.jsonl],
     input: "which colour: {text}", target: label, labels: [red, green, blue], metrics: [accuracy, macro_f1]}
  - {kind: files, name: last, train: [last.train.jsonl], validation: [last.validation.jsonl],
     input: "last word: {text}", target: word, metrics: [exact_match]}
data: {inputs_length: 64, targets_length: 32, mixture: {kind: equal}}
train: {steps: 4, batch_tokens: 256, microbatch_tokens: 128, device: cpu}
schedule: {kind: constant, learning_rate: 0.01}
log: {every_steps: 3}
eval: {every_steps: 4, sequences: 8}
scoring: {batch_examples: 4, decoding: {max_tokens: 6}}
checkpoint: {save_every_steps: 2}
"""


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


SwitchCLI = Callable[..., Done]


def lay_out_tuning(folder: Path) -> str:
    """Rows that a model can learn to answer, and a recipe that reads them from the current folder."""
    draw = random.Random(1)
    for split, count in (("train", 60), ("validation", 14)):
        rows = [draw.choices(WORDS, k=draw.randint(2, 12)) for _ in range(count)]
        colours = [draw.randrange(3) for _ in rows]
        lines = [
            {"text": " ".join([*row, ["red", "green", "blue"][colour]]), "label": colour, "word": row[-1]}
            for row, colour in zip(rows, colours, strict=True)
        ]
        for task in ("colour", "last"):
            (folder / f"{task}.{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tune.yaml").write_text(TUNING)
    return "tune.yaml"


def lay_out(folder: Path, text: Path) -> str:
    """The text and a recipe that reads it from the current folder: the path as written says what is held out."""
    (folder / "text.txt").symlink_to(text)
    (folder / "tiny.yaml").write_text(RECIPE)
    return "tiny.yaml"


def records(run: str | Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
