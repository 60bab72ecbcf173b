#!/usr/bin/env bash
# Own text and an own tokenizer: train the vocabulary, look at it, train a model on it, and measure the model.
set -euo pipefail

# The text: one file for each topic of Python's built-in help.
python - <<'TEXT'
from pathlib import Path
from pydoc_data.topics import topics

Path("corpus").mkdir()
for name, text in topics.items():
    Path("corpus", f"{name}.txt").write_text(text, encoding="utf-8")
TEXT

cat >mine.yaml <<'RECIPE'
extends: quickstart/switch
data:
  corpora: [{kind: files, paths: [corpus/*.txt]}]
  tokenizer: {kind: train, vocab_size: 2000}
train: {steps: 60, batch_tokens: 2048}
RECIPE

switchcli recipes validate mine.yaml
switchcli data tokenizer train mine.yaml --out tokenizer.json
switchcli data tokenizer show tokenizer.json "A list <extra_id_0> by square brackets."
switchcli pretrain mine.yaml data.tokenizer="{kind: file, path: tokenizer.json}"
switchcli eval runs/mine --json >eval.json

# The run has this vocabulary, and what `eval` measures is what the run ended with.
cmp tokenizer.json runs/mine/tokenizer.json
python - <<'CHECK'
import json

result = json.load(open("runs/mine/result.json"))
measured = json.load(open("eval.json"))["passes"][0]["held_out"]["text"]["neg_log_perplexity"]
assert result["step"] == 60
assert result["held_out/neg_log_perplexity"] > result["held_out/first_neg_log_perplexity"] + 1
assert abs(measured - result["held_out/neg_log_perplexity"]) < 1e-4
CHECK
