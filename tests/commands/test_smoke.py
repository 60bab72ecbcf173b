"""One run of each verb in a terminal of 80 columns: no traceback, nothing cut, and the figure that it is run for.

A verb runs in a fork of this process, so that nothing is imported again.
"""

from pathlib import Path

import pytest
from terminal import import_what_verbs_call, switchcli_in_terminal
from test_help import COMMANDS
from tiny_run import lay_out, lay_out_tuning

pytestmark = [pytest.mark.integration, pytest.mark.smoke]

TASKS = (
    "[{{kind: files, name: colour, validation: [colour.validation.jsonl], input: '{{text}}', target: label, "
    "labels: [red, green, blue], metrics: [accuracy, macro_f1]}}]"
)
SHORT = ("eval.sequences=4",)
WORK = {
    "pretrain": (["tiny.yaml", *SHORT, "--out", "made"], "held-out loss"),
    "finetune": (
        ["tune.yaml", "--model", "{trained}", "train.steps=2", "eval.every_steps=2", "--out", "made"],
        "accuracy|macro_f1|95 % interval|Next:|generate made|eval made",
    ),
    "distill": (
        ["train.steps=2", *SHORT, "--teacher", "{trained}", "--baseline", "{dense}", "--out", "made"],
        "teacher's gain",
    ),
    "eval": (
        ["{trained}", f"tasks={TASKS}", "scoring.decoding.max_tokens=4", "--out", "made"],
        "macro_f1",
    ),
    "generate": (["{trained}", "red", "--max-tokens", "2"], ""),
    "doctor": (["{trained}"], "sound:"),
    "plan": (["tiny.yaml", "--devices", "2"], "Meshes"),
    "recipes list": ([], "quickstart/switch"),
    "recipes show": (["quickstart/switch"], "num_experts"),
    "recipes copy": (["quickstart/switch", "made.yaml"], "made.yaml"),
    "recipes validate": (["tiny.yaml"], "tiny.yaml: ok"),
    "recipes schema": (["pretrain"], '"properties"'),
    "recipes explain": (["schedule"], "schedule.learning_rate"),
    "data prepare": (["tiny.yaml", "--processes", "1"], "documents"),
    "data tokenizer train": (["tiny.yaml", "--out", "made.json"], "vocab size"),
    "data tokenizer show": (["{trained}", "red green"], "512"),
    "convert": (["{trained}", "made", "--to", "huggingface"], "made"),
    "upcycle": (["{dense}", "made", "--experts", "2"], "2 experts"),
    "prune": (["{trained}", "made", "--experts", "2", "text.sequences=4"], "feed_forward"),
    "report": (["{dense}", "{trained}"], "Held-out"),
    "report --routing": (["{trained}", "text.sequences=4"], "tokens by lift"),
    "sweep": (["--jobs", "1", "--out", "made", "pretrain", "tiny.yaml", *SHORT, "--", "--quiet"], "done after"),
}
"""A command of each verb, and words of its terminal, separated by bars."""


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    import_what_verbs_call()


def test_every_verb_has_a_command_here() -> None:
    leaves = {name for name, command in COMMANDS.items() if not hasattr(command, "commands")}
    assert {words.partition(" --")[0] for words in WORK} == leaves


@pytest.mark.parametrize("verb", WORK)
def test_a_verb_in_a_terminal(verb: str, trained: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    lay_out(tmp_path, text)
    lay_out_tuning(tmp_path)
    words, figures = WORK[verb]
    arguments = [word.format(trained=trained, dense=dense) for word in words]
    shown = switchcli_in_terminal([*verb.split(), *arguments], 80, tmp_path)
    assert not shown.faults, f"{shown.faults}\n{shown.text}"
    assert "perplexity" not in shown.text
    assert [words for words in figures.split("|") if words not in shown.text] == [], shown.text
