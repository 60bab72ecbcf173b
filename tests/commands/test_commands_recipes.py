"""`switchcli recipes`: what goes to stdout, what is raised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from messages import lacking
from typer.testing import CliRunner

from switchcli.commands.recipes import app
from switchcli.errors import RecipeError
from switchcli.recipe import library, resolve
from switchcli.recipe.schema import resolve_standalone


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout


def test_list_has_a_description_of_every_recipe():
    _, *lines = run("list").splitlines()
    assert [line.split()[0] for line in lines] == library.recipe_names()
    rows = json.loads(run("list", "--json"))["recipes"]
    assert [row["name"] for row in rows] == library.recipe_names()
    assert all(row["description"] for row in rows)


@pytest.mark.parametrize("words", ["recipes list", "recipes list --json", "--version"])
def test_a_reader_that_closes_the_pipe_ends_the_command_quietly(words):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "switchcli", *words.split()]
    done = subprocess.run(command, check=False, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_show_prints_the_file():
    text = (library.recipes_folder() / "quickstart/switch.yaml").read_text(encoding="utf-8")
    assert run("show", "quickstart/switch") == text
    assert json.loads(run("show", "quickstart/switch", "--json"))["text"] == text
    with pytest.raises(RecipeError, match=r"\bquickstart/switch\b"):
        run("show", "quickstart/swich")


@pytest.mark.parametrize("name", ["quickstart/dense", "pretrain/local", "finetune/glue", "distill/base"])
def test_a_copy_resolves_as_the_recipe_does(name):
    assert run("copy", name, "mine.yaml") == "mine.yaml\n"
    assert resolve_standalone("mine.yaml") == resolve_standalone(name)


@pytest.mark.parametrize(
    "line", ["extends: base.yaml", "extends: base.yaml  # why", "extends : '../a/base.yaml' # why"]
)
def test_a_copy_extends_what_ships_however_that_is_written(line, tmp_path, monkeypatch):
    (tmp_path / "ships/a").mkdir(parents=True)
    (tmp_path / "ships/a/base.yaml").write_text("train: {steps: 1}\n")
    (tmp_path / "ships/a/child.yaml").write_text(f"# extends: nothing\n{line}\nmodel: {{}}\n")
    monkeypatch.setattr(library, "recipes_folder", lambda: tmp_path / "ships")
    run("copy", "a/child", "mine.yaml")
    why = line[line.index("#") - 1 :] if "#" in line else ""
    copied = (tmp_path / "mine.yaml").read_text().splitlines()
    assert copied[0] == "# extends: nothing"
    assert copied[1].split("#")[0].rstrip() == "extends: a/base"
    assert copied[1].endswith(why)
    assert resolve.load("mine.yaml").value["train"]


def test_copy_never_overwrites(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"^mine\.yaml: .*already"):
        run("copy", "quickstart/switch", "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    with pytest.raises(RecipeError, match=r"^mine\.yaml/x\.yaml: .*\bwritten\b"):
        run("copy", "quickstart/switch", "mine.yaml/x.yaml")


def test_copy_into_a_folder_keeps_the_file_name(tmp_path):
    assert json.loads(run("copy", "quickstart/dense", ".", "--json"))["file"] == "dense.yaml"
    assert (tmp_path / "dense.yaml").read_text(encoding="utf-8").startswith("extends: quickstart/switch\n")


def test_validate_reports_every_error_of_every_file(tmp_path):
    (tmp_path / "good.yaml").write_text("extends: quickstart/switch")
    (tmp_path / "bad.yaml").write_text("extends: quickstart/switch\nsteps: 1\nmodel: {d_model: no}")
    files = ["good.yaml", "bad.yaml", "none.yaml"]
    result = CliRunner().invoke(app, ["validate", *files])
    assert result.stdout == "good.yaml: ok\n"
    assert isinstance(result.exception, RecipeError)
    lines = str(result.exception).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["bad.yaml:2", "bad.yaml:3", "none.yaml"]

    result = CliRunner().invoke(app, ["validate", "--json", *files])
    assert [file["ok"] for file in json.loads(result.stdout)["files"]] == [True, False, False]
    assert result.exit_code == 2


def test_validate_takes_an_override_that_is_too_long_for_a_path():
    assert run("validate", "quickstart/switch", "description=" + "x" * 5000) == "quickstart/switch: ok\n"


def test_validate_knows_each_verb(tmp_path):
    (tmp_path / "tune.yaml").write_text(
        "verb: finetune\nupdate: expert\ntasks: [rte, glu]\ntrain: {steps: 1, batch_tokens: 512}"
    )
    with pytest.raises(RecipeError, match=r"^tune\.yaml:3: tasks\.1\.name .*\bglu\b.*\bglue\b"):
        run("validate", "tune.yaml")
    (tmp_path / "tune.yaml").write_text("extends: finetune/glue\nupdate: expert")
    assert run("validate", "tune.yaml") == "tune.yaml: ok\n"


def test_schema_is_json_schema():
    assert "extends" in json.loads(run("schema", "pretrain"))["properties"]
    with pytest.raises(RecipeError, match=r"^pretrian: .*\bpretrain\b"):
        run("schema", "pretrian")


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("recipes", "copy", "quickstart/switch", ""), "FILE"),
        (("recipes", "copy", "", "mine.yaml"), "NAME"),
        (("pretrain", "quickstart/switch", "--dry-run", "--out", ""), "--out"),
        (("eval", "run", "--out="), "--out"),
    ],
)
def test_an_empty_path_is_refused_and_not_taken_for_the_current_folder(arguments, place, switchcli):
    before = sorted(Path().iterdir())
    done = switchcli(*arguments)
    assert done.code == 2
    assert not lacking(done.err, f"error: {place} empty")
    assert sorted(Path().iterdir()) == before
