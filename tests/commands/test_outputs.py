"""Where a run begins anew or goes on, what is not its own stays."""

import json
import shutil
from pathlib import Path

import pytest
from messages import lacking
from tiny_run import SwitchCLI


@pytest.fixture
def run(recipe: str, trained: Path) -> Path:
    """A copy of a run in the current folder, beside tiny.yaml."""
    return Path(shutil.copytree(trained, "run"))


def test_a_run_that_begins_anew_at_a_link_sets_aside_what_the_link_names(run: Path, switchcli: SwitchCLI) -> None:
    disk = Path("disk")
    disk.mkdir()
    run.rename(disk / "run")
    run.symlink_to((disk / "run").absolute())
    done = switchcli("pretrain", "tiny.yaml", "train.steps=1", "--out", "run", "--no-resume")
    assert done.code == 0, done.err
    assert "run.before-1" in done.err
    assert run.is_symlink()
    assert sorted(path.name for path in disk.iterdir()) == ["run", "run.before-1"]
    assert [path.name for path in (disk / "run/checkpoints").iterdir()] == ["step-00000001"]
    assert [path.name for path in (disk / "run.before-1/checkpoints").iterdir()] == ["step-00000002"]


def test_the_current_folder_is_not_set_aside(run: Path, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = Path("tiny.yaml").absolute(), run.absolute()
    before = sorted(run.rglob("*"))
    monkeypatch.chdir(run)
    done = switchcli("pretrain", recipe, "--out", ".", "--no-resume")
    assert done.code == 2
    assert "--no-resume" in done.err
    assert sorted(run.rglob("*")) == before


def test_the_home_folder_in_an_option(
    trained: Path, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves the ~ of --out=~/a to the program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    done = switchcli("eval", trained, "text.sequences=2", "--out=~/a")
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.glob("*/a/result.json")] == ["result.json"]
    assert not Path("~").exists()
    done = switchcli("eval", trained, "--out=~nosuchuser/a")
    assert (done.code, lacking(done.err, "--out ~nosuchuser home")) == (2, [])


def test_the_home_folder_in_a_recipe_and_its_name(
    trained: Path, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(trained, home / "trained")
    shutil.copy(trained / "recipe.yaml", home / "below.yaml")
    (home / "mine.yaml").write_text("extends: ~/below.yaml\n")
    done = switchcli("pretrain", "~/mine.yaml", "--model=~/trained", "--dry-run", "--json")
    assert done.code == 0, done.err
    start = Path(json.loads(done.out)["recipe"]["start"]["checkpoint"])
    assert start.is_relative_to(home / "trained")
    for words, named in (
        (("~nosuchuser/mine.yaml",), "~nosuchuser home"),
        (("~/mine.yaml", "--model=~nosuchuser/a"), "--model ~nosuchuser home"),
        (("~/mine.yaml", "start.checkpoint=~nosuchuser/a"), "start.checkpoint ~nosuchuser home"),
        (("~/mine.yaml", "data.corpora.0.paths=[~nosuchuser/a]"), "data.corpora.0.paths.0 ~nosuchuser home"),
    ):
        done = switchcli("pretrain", *words, "--dry-run")
        assert (done.code, lacking(done.err, named)) == (2, [])
