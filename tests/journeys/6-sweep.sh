#!/usr/bin/env bash
# A sweep of three runs, and a report of them as tables and as a page.
set -euo pipefail

switchcli sweep --out runs/grid pretrain quickstart/switch model.num_experts=2,4,8 \
    train.steps=30 train.batch_tokens=2048 eval.every_steps=10
switchcli report runs/grid/*
switchcli report runs/grid/* --html grid.html --json >report.json

# Each run is complete and in the report, and the page loads nothing from elsewhere.
python - <<'CHECK'
import json
import re
from pathlib import Path

for experts in (2, 4, 8):
    assert json.loads(Path(f"runs/grid/{experts}/result.json").read_text())["step"] == 30
report = json.loads(Path("report.json").read_text())
assert {one["series"] for one in report["series"]} == {"num_experts=2", "num_experts=4", "num_experts=8"}
page = Path("grid.html").read_text(encoding="utf-8")
assert "model.num_experts" in page
assert not re.search(r"""<(script|link|img)[^>]*(src|href)=["']?http""", page)
CHECK
