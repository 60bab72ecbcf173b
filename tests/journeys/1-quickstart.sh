#!/usr/bin/env bash
# The quickstart: train the smallest shipped recipe, then let the model fill in a gap.
set -euo pipefail

switchcli recipes list
switchcli pretrain quickstart/switch train.steps=100
switchcli generate runs/quickstart/switch --temperature 0.8 --top-p 0.95 "A list <extra_id_0> by square brackets." |
    tee answer.txt

# The model learned, and its answer has letters besides the marks of the gaps.
python - <<'CHECK'
import json

result = json.load(open("runs/quickstart/switch/result.json"))
assert result["step"] == 100
assert result["held_out/neg_log_perplexity"] > result["held_out/first_neg_log_perplexity"] + 2
assert len(result["samples"]) == 2
CHECK
sed 's/<extra_id_[0-9]*>//g' answer.txt | grep -q '[[:alpha:]]'
