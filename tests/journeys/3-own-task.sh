#!/usr/bin/env bash
# An own task in JSON Lines: pre-train briefly, fine-tune on the task, and score it above chance.
set -euo pipefail

# The task: is a line Python code or English? Lines of Python's sources and of its built-in help, as many of each.
python - <<'EXAMPLES'
import ast
import json
import random
from pathlib import Path
from pydoc_data.topics import topics


def lines(texts):
    return sorted({line.strip() for text in texts for line in text.splitlines() if len(line.split()) > 6})


draw = random.Random(0)
sources = [path.read_text(encoding="utf-8") for path in sorted(Path(ast.__file__).parent.glob("[a-j]*.py"))]
examples = [{"line": line, "kind": "code"} for line in draw.sample(lines(sources), 1100)]
examples += [{"line": line, "kind": "english"} for line in draw.sample(lines(topics.values()), 1100)]
draw.shuffle(examples)
for name, part in (("train", examples[:2000]), ("held_out", examples[2000:])):
    Path(f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in part), encoding="utf-8")
EXAMPLES

cat >lines.yaml <<'RECIPE'
verb: finetune
tasks:
  - kind: files
    name: lines
    train: [train.jsonl]
    validation: [held_out.jsonl]
    input: "code or english: {line}"
    target: kind
    labels: [code, english]
    metrics: [accuracy]
data: {inputs_length: 128, targets_length: 16}
schedule: {kind: constant, learning_rate: 0.01}
train: {steps: 80, batch_tokens: 2048}
eval: {every_steps: 40}
checkpoint: {save_every_steps: 40}
RECIPE

switchcli pretrain quickstart/switch train.steps=40
switchcli finetune lines.yaml --model runs/quickstart/switch
switchcli eval runs/lines --out scores

# Even the lower end of the interval is above chance, and each prediction can be read.
test "$(wc -l <scores/predictions/lines.jsonl)" = 200
python - <<'CHECK'
import json

task = json.load(open("scores/result.json"))["passes"][0]["tasks"]["lines"]
assert task["chance"] == 50
assert task["score"]["low"] > task["chance"], task["score"]
CHECK
