"""docs/reference/run-folder.md lists every key that the verbs write and print, and no other."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_smoke import WORK
from tiny_run import SwitchCLI, lay_out, lay_out_tuning, records

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "run-folder.md"
PLAIN = {
    "integer": (int,),
    "number": (int, float),
    "text": (str,),
    "text or number": (str, int, float),
    "true or false": (bool,),
    "anything": (object,),
}
"""JSON types, as the page names them."""
TRAINED = ("pretrain", "finetune", "distill")
"""Verbs that print their result.json."""
NOT_MADE = {
    *(
        "metrics.jsonl mixture",
        "metrics.jsonl suites/NAME",
        "metrics.jsonl skipped_steps",
        "metrics.jsonl texts",
        "result.json texts",
        "result.json skipped_steps",
    ),
    *("Start step", "Start input_tokens", "Start data"),
}
"""Keys that the runs here have no cause to write: several texts, suites, skipped steps, a branch."""


def forms() -> dict[str, dict[str, str]]:
    """The type of each key, by the heading of its table."""
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^#+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        rows = re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|(?: [^|]*\|){2}$", section, re.MULTILINE)
        if rows:
            found[section.split("\n", 1)[0]] = dict(rows)
    return found


class Checker:
    """Compares values with the page, and notes which keys were seen."""

    def __init__(self) -> None:
        self.forms = forms()
        self.seen: set[str] = set()
        self.faults: list[str] = []

    def check(self, value: Any, type_name: str, where: str) -> None:
        if value is None:
            return
        if inner := re.fullmatch(r"(list|map) of (.+)", type_name):
            container = list if inner[1] == "list" else dict
            if not isinstance(value, container):
                self.faults.append(f"{where}: no {inner[1]}")
                return
            for one in value.values() if isinstance(value, dict) else value:
                self.check(one, inner[2], where)
        elif type_name in PLAIN:
            is_bool = isinstance(value, bool) and type_name in ("integer", "number")
            if is_bool or not isinstance(value, PLAIN[type_name]):
                self.faults.append(f"{where}: {value!r} is not {type_name}")
        else:
            self.check_form(value, type_name)

    def check_form(self, value: Mapping[str, Any], form: str) -> None:
        for key, inner in value.items():
            name = re.sub(r"^(tasks|suites)/.*", r"\1/NAME", key)
            if name in self.forms[form]:
                self.seen.add(f"{form} {name}")
                self.check(inner, self.forms[form][name], f"{form} {name}")
            else:
                self.faults.append(f"{form} {name}: not on the page")


@pytest.mark.integration
def test_the_page_lists_the_keys_that_the_verbs_write(
    trained: Path,
    dense: Path,
    tuned: Path,
    distilled: Path,
    text: Path,
    tmp_path: Path,
    switchcli: SwitchCLI,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker = Checker()
    for verb, (words, _) in WORK.items():
        name = verb.partition(" --")[0]
        if verb not in ("eval", *TRAINED) and name not in checker.forms:
            continue  # a verb without --json
        folder = tmp_path / verb.replace(" ", "-")
        folder.mkdir()
        monkeypatch.chdir(folder)
        lay_out(folder, text)
        lay_out_tuning(folder)
        arguments = [word.format(trained=trained, dense=dense) for word in words]
        done = switchcli(*verb.split(), "--json", *arguments)
        form = "result.json" if verb in TRAINED else "result.json of eval" if verb == "eval" else name
        checker.check_form(json.loads(done.out), form)
        for answers in folder.glob("made/predictions/*.jsonl"):
            for line in answers.read_text().splitlines():
                checker.check_form(json.loads(line), "predictions")
    for words, form in (
        (("plan", trained.parent / "tiny.yaml", "--memory", "1MB"), "plan"),
        (("plan", trained.parent / "tiny.yaml", "train.device=auto", "--gpu", "h100"), "plan"),
        (("plan", "--memory", "80GB"), "plan of all sizes"),
        (("doctor", trained, "--checkpoint-files"), "doctor of files"),
        (("eval", trained, "--out", "of_text"), "result.json of eval"),
        (("pretrain", trained.parent / "tiny.yaml", "--dry-run"), "dry run"),
    ):
        checker.check_form(json.loads(switchcli(*words, "--json").out), form)
    for run in (trained, tuned, distilled):
        for record in records(run):
            checker.check_form(record, "metrics.jsonl")
        checker.check_form(json.loads((run / "result.json").read_text()), "result.json")
        for state in run.glob("checkpoints/step-*/state.json"):
            checker.check_form(json.loads(state.read_text()), "state.json")
    assert not checker.faults
    listed = {f"{form} {key}" for form, keys in checker.forms.items() for key in keys}
    assert listed - checker.seen <= NOT_MADE
    assert checker.seen.isdisjoint(NOT_MADE), "these are written: take them off the list"


def test_a_key_that_is_not_on_the_page_and_one_of_another_type_are_found() -> None:
    checker = Checker()
    checker.check_form({"verb": "eval", "step": True, "novel": 1}, "result.json of eval")
    assert len(checker.faults) == 2
