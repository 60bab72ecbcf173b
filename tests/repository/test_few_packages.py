"""Training, scoring and answering need few packages: a GPU machine without a network has no others.

`FEW` and what these require are enough for the paths that `pytest -m gpu` and `scripts/gpu` use.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import RECIPE, write_text

ROOT = Path(__file__).resolve().parents[2]
FEW = ("torch", "accelerate", "tokenizers", "safetensors", "pydantic", "typer", "rich", "PyYAML", "numpy", "pyarrow")
HIDDEN = ("datasets", "pandas", "sacrebleu", "rouge_score", "nltk", "vl_convert", "transformers")
HIDDEN += ("sentencepiece", "google", "tensorboard", "wandb", "hypothesis", "pytest_timeout", "playwright")
HIDDEN += ("multiprocess",)
HIDE = """
import importlib.metadata, io, json, os, sys

hidden = json.loads(sys.argv[1])

class Finder:
    '''The finders that were there, which find everything but the hidden packages.'''

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):
        for finder in self.finders:
            for one in getattr(finder, "find_distributions", lambda context: ())(context):
                if one.metadata["Name"].replace("-", "_") not in hidden:
                    yield one

sys.meta_path[:] = [Finder(list(sys.meta_path))]
for name in hidden:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} is not hidden")
"""
RUN_COMMANDS = """
from switchcli.cli import main

def leave(code):
    raise SystemExit(code)

os._exit = leave
for command, code in json.loads(sys.argv[2]):
    sys.argv = ["switchcli", *command]
    try:
        main()
    except SystemExit as end:
        assert (end.code or 0) == code, command
"""
TASK = """\
tasks:
  - {kind: files, name: colour, train: [rows.jsonl], validation: [rows.jsonl],
     input: "which colour: {text}", target: label, labels: [red, green],
     metrics: [accuracy, macro_f1, rouge2, rouge_lsum]}
data: {inputs_length: 32, targets_length: 8}
train: {steps: 2, batch_tokens: 128, device: cpu}
schedule: {kind: constant, learning_rate: 0.01}
eval: {every_steps: 2, sequences: 2}
scoring: {batch_examples: 4, decoding: {max_tokens: 4}}
checkpoint: {save_every_steps: 2}
"""
GENERATE = ["generate", "runs/a", "the red <extra_id_0>", "--max-tokens", "3", "--device", "cpu"]
SHORT = ["train.device=cpu", "--quiet"]
COMMANDS = [
    ["pretrain", "tiny.yaml", *SHORT, "--out", "runs/a"],
    ["finetune", "task.yaml", "--model", "runs/a", *SHORT, "--out", "runs/b"],
    ["distill", "quickstart/distill", "--teacher", "runs/a", "train.steps=2", *SHORT, "--out", "runs/c"],
    ["eval", "runs/b", "device=cpu", "--out", "runs/d", "--json"],
    GENERATE,
    [*GENERATE, "--beams", "2"],
    ["report", "runs/a", "runs/c", "--html", "page.html"],
    ["recipes", "validate", "tiny.yaml"],
    ["pretrain", "quickstart/switch", "train.steps=2", *SHORT, "--out", "runs/quickstart/switch"],
    ["finetune", "quickstart/finetune", "tasks=[python_modules]", "train.steps=2", *SHORT, "--out", "runs/f"],
]
BLEU = [
    ["finetune", "task.yaml", "tasks.0.metrics=[bleu]", "--model", "runs/a", *SHORT, "--out", "runs/g"],
    ["eval", "runs/b", "tasks=[wmt14_en_de]", "device=cpu", "--out", "runs/h"],
]
"""Commands that need the extra `tasks`, so they end with exit code 2."""


@pytest.mark.integration
def test_every_verb_runs_where_few_packages_are_installed(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "task.yaml").write_text(TASK)
    rows = [{"text": "a red walk", "label": 0}, {"text": "the green run", "label": 1}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = [(command, 0) for command in COMMANDS] + [(command, 2) for command in BLEU]
    done = subprocess.run(
        [sys.executable, "-c", HIDE + RUN_COMMANDS, json.dumps(HIDDEN), json.dumps(commands)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "runs/c/result.json").read_text())["step"] == 2
    assert "vegaEmbed" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert done.stderr.count("pip install 'switchcli[tasks]'") == len(BLEU)
    assert not (tmp_path / "runs/g").exists()
    assert not (tmp_path / "runs/h").exists()


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("file", "few"),
    [
        ("tests/model/test_gpu_layer.py", "evaluation and groups"),
        ("tests/model/test_gpu_model.py", "packed or (answers and greedy)"),
        ("tests/commands/test_gpu.py", "examined or scores or kept"),
    ],
)
def test_the_tests_for_a_gpu_run_where_few_packages_are_installed(file: str, few: str) -> None:
    """Rows of the CPU stand for those of the GPU, which import the same modules."""
    run_pytest = "import pytest; raise SystemExit(pytest.main(sys.argv[2:]))"
    arguments = ["-p", "no:cacheprovider", "-W", "default", "-m", "not gpu", "-k", f"cpu and ({few})", file]
    done = subprocess.run(
        [sys.executable, "-c", f"{HIDE}\n{run_pytest}", json.dumps(HIDDEN), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
