#!/usr/bin/env bash
# From a sparse teacher to a dense student that transformers loads: pre-train, distill, convert, compare the answers.
set -euo pipefail

switchcli pretrain quickstart/switch train.steps=30
switchcli distill --teacher runs/quickstart/switch --out runs/student
switchcli convert runs/student served --to huggingface
switchcli generate runs/student --max-tokens 20 --json \
    "A list <extra_id_0> by square brackets." "Return the <extra_id_0> of the file." >ours.json

# The student is smaller than its teacher, and transformers computes the logits and the answers of switchcli.
python - <<'CHECK'
import json

import switchcli
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

result = json.load(open("runs/student/result.json"))
sizes = {who: result["distillation"][who]["parameters"] for who in ("teacher", "student")}
assert sizes["student"] < sizes["teacher"] / 3, sizes
assert result["held_out/neg_log_perplexity"] > result["held_out/first_neg_log_perplexity"]

ours = switchcli.load("runs/student", device="cpu")
theirs = AutoModelForSeq2SeqLM.from_pretrained("served")
tokenizer = AutoTokenizer.from_pretrained("served")
for answer in json.load(open("ours.json"))["answers"]:
    inputs = tokenizer(answer["input"], return_tensors="pt").input_ids
    targets = tokenizer("<extra_id_0> is delimited <extra_id_1>", return_tensors="pt").input_ids
    with torch.no_grad():
        same = (ours.model(inputs, targets).logits_BTV, theirs(inputs, labels=targets).logits)
    torch.testing.assert_close(*same, rtol=1e-4, atol=1e-4)
    (ids,) = theirs.generate(inputs, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(ids).removeprefix("<pad>").removesuffix("</s>") == answer["output"]
CHECK
