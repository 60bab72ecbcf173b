#!/usr/bin/env bash
# A run is stopped, another learning rate is refused with the command that branches the run, and both go on to the end.
set -euo pipefail

switchcli pretrain quickstart/switch train.steps=40 &
until grep -qs '"step": 20,' runs/quickstart/switch/metrics.jsonl; do # step 20 is logged
    kill -0 $! # the run has not ended
    sleep 0.2
done
kill -TERM $!
code=0
wait $! || code=$?
test $code = 75 # interrupted after saving: run the same command again

code=0
switchcli pretrain quickstart/switch train.steps=40 schedule.learning_rate=0.01 2>refusal.txt || code=$?
cat refusal.txt
test $code = 2
grep -q -- schedule.learning_rate refusal.txt
grep -q -- "add --branch-from runs/quickstart/switch --out NEW" refusal.txt

switchcli pretrain quickstart/switch train.steps=40

# It went on to the end in the folder that it began in, and archived nothing.
test "$(ls runs/quickstart)" = switch

# The named options continue the run with the other learning rate, from the step that is asked for.
switchcli pretrain quickstart/switch train.steps=44 schedule.learning_rate=0.01 --branch-from runs/quickstart/switch \
    --out runs/quickstart/switch-branch1

python - <<'CHECK'
import json

result = json.load(open("runs/quickstart/switch/result.json"))
assert result["step"] == 40
steps = [json.loads(line)["step"] for line in open("runs/quickstart/switch/metrics.jsonl")]
assert steps == sorted(steps)
assert steps[-1] == 40
branch = json.load(open("runs/quickstart/switch-branch1/result.json"))
assert (branch["step"], branch["start"]["step"], branch["start"]["data"]) == (44, 40, "continued")
CHECK
