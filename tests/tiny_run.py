"""A text, and a recipe that pre-trains a tiny model on it: what commands are tried on."""

import random
from pathlib import Path

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
