"""What commands write: complete or not at all on a full disk, and never through a link."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from messages import lacking
from tiny_run import SwitchCLI

ROOM = 100
"""Bytes that a file may have on the full disk: fewer than any output has."""
PICTURES = ("--figures", "out")
OUTPUTS: dict[str, tuple[str, ...]] = {
    "plan --html": ("plan", "tiny.yaml", "--devices", "2", "--html", "out"),
    "report --html": ("report", "run", "--html", "out"),
    "report --figures": ("report", "run", *PICTURES),
    "report --routing --html": ("report", "run", "--routing", "--html", "out"),
    "report --routing --figures": ("report", "run", "--routing", *PICTURES),
    "eval": ("eval", "run", "--out", "out"),
    "data tokenizer train": ("data", "tokenizer", "train", "tiny.yaml", "--out", "out", "--force"),
}


@contextmanager
def full_disk() -> Iterator[None]:
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def run(recipe: str, trained: Path) -> Path:
    """A copy of a run in the current folder, beside tiny.yaml."""
    return Path(shutil.copytree(trained, "run"))


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


@pytest.mark.unit("plan --html", "eval")
@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_on_a_full_disk_stays_what_it_was(output: str, switchcli: SwitchCLI) -> None:
    arguments = OUTPUTS[output]
    assert switchcli(*arguments).code == 0
    before, names = contents(Path("out")), sorted(Path().iterdir())
    with full_disk():
        done = switchcli(*arguments)
    assert done.code == 4, done.err
    assert "out" in done.err
    assert "File too large" in done.err
    assert contents(Path("out")) == before
    assert sorted(Path().iterdir()) == names


@pytest.mark.parametrize("name", ["quickstart/switch", "quickstart/dense"])
def test_a_copy_of_a_recipe_on_a_full_disk_leaves_nothing(
    name: str, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with full_disk():
        done = switchcli("recipes", "copy", name, "mine.yaml")
    assert (done.code, list(tmp_path.iterdir())) == (4, [])
    assert switchcli("recipes", "copy", name, "mine.yaml").code == 0


RESUME = ("pretrain", "run/recipe.yaml", "train.steps=3", "--out", "run", "--quiet")


@pytest.mark.parametrize("name", ["recipe.yaml", "tokenizer.json", "metrics.jsonl", "result.json"])
def test_a_strangers_run_cannot_have_another_file_overwritten(name: str, run: Path, switchcli: SwitchCLI) -> None:
    victim = Path("victim")
    victim.write_text("mine")
    (run / f"{name}.tmp").symlink_to(victim.absolute())  # a name that temporary files once had
    assert switchcli(*RESUME).code == 0
    assert victim.read_text() == "mine"
    shutil.copy(run / "recipe.yaml", "own.yaml")
    (run / name).unlink()
    (run / name).symlink_to(victim.absolute())
    before = sorted((run / "checkpoints").iterdir())
    done = switchcli("pretrain", "own.yaml", "train.steps=4", "--out", "run", "--quiet")
    assert done.code == 4
    assert done.err.count("\n") == 1
    assert not lacking(done.err, f"run/{name} link remove")
    assert victim.read_text() == "mine"
    assert sorted((run / "checkpoints").iterdir()) == before


def test_a_linked_folder_of_checkpoints_is_refused_and_nothing_in_it_is_removed(
    run: Path, switchcli: SwitchCLI
) -> None:
    photos = Path("photos")
    (run / "checkpoints").rename(photos)
    for name in (".tmp-mine", ".del-x", ".old-photos", ".tmp-00000001-0123abcd"):
        (photos / name).mkdir()
    before = sorted(photos.rglob("*"))
    (run / "checkpoints").symlink_to(photos.absolute())
    done = switchcli(*RESUME)
    assert done.code == 4
    assert not lacking(done.err, "run/checkpoints link")
    assert sorted(photos.rglob("*")) == before


def test_folders_with_names_of_the_users_stay_among_checkpoints(run: Path, switchcli: SwitchCLI) -> None:
    mine = [run / "checkpoints" / name for name in (".tmp-mine", ".del-x", ".old-photos", ".old-00000009-0123abcdef")]
    for folder in mine:
        folder.mkdir()
    dead = run / "checkpoints" / ".tmp-00000003-0123abcd"
    dead.mkdir()
    assert switchcli(*RESUME).code == 0
    assert [folder.exists() for folder in [*mine, dead]] == [True, True, True, True, False]


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
