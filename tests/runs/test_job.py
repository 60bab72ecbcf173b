"""A job: which checkpoint each name of a command line or a recipe means, as long as the run lasts."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from messages import lacking, naming_words
from ranks import on_ranks
from shared_runs import switchcli
from tiny_run import lay_out_tuning

from switchcli import api
from switchcli.errors import CheckpointError, RecipeError
from switchcli.recipe import resolve as recipes
from switchcli.recipe.resolve import dump
from switchcli.runs.job.job import Job
from switchcli.runs.job.pins import BASELINE, START, STUDENT, TEACHER, Pin
from switchcli.runs.train.distilling import Distillation

pytestmark = pytest.mark.integration
FIRST = "checkpoints/step-00000001"
LAST = "checkpoints/step-00000002"
EACH = ("checkpoint.save_every_steps=1", "eval.every_steps=1", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def originals(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a`, a sparse run, and `d`, a dense one; `tuned` from `a`; `student` of `a`, that starts from `d`.

    Each takes two steps. When `tuned` and `student` begin, `a` and `d` have taken one.
    """
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lay_out_tuning(Path())
        for run, key in (("a", "model.size=custom"), ("d", "model.num_experts=1")):
            switchcli("pretrain", trained / "recipe.yaml", key, *EACH, "--out", run)
            shutil.move(f"{run}/{LAST}", f"{run}-later")
        switchcli("finetune", "tune.yaml", *EACH, "train.steps=2", "--model", "a", "--out", "tuned")
        switchcli("distill", *EACH, "--teacher", "a", "--student", "d", "--out", "student")
    return folder


@pytest.fixture
def here(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs, in the current folder."""
    shutil.copytree(originals, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def goes_on(run: str) -> None:
    """The run saves a newer checkpoint."""
    shutil.move(f"{run}-later", f"{run}/{LAST}")


def resolve(
    verb: str, out: str, overrides: Sequence[str] = (), recipe: str | None = None, resume: bool = True, **options: str
) -> Job:
    return api.resolve_job(api.read_recipe(recipe, overrides, verb), Path(out), resume, **options)


def paths(job: Job) -> dict[str, str]:
    """The checkpoints that the recipe of a job names, by key."""
    tree = recipes.layer(job.recipe.model_dump(mode="json"), "job")
    return {key: path for key in (START, TEACHER, STUDENT) if (path := tree.stated(key)) is not None}


def opened(job: Job) -> set[str]:
    return {*job.handles}


def test_a_new_run_starts_from_the_newest_checkpoint_and_one_that_has_begun_from_its_own(here: Path) -> None:
    goes_on("a")
    new = resolve("finetune", "new", recipe="tune.yaml", model="a")
    assert (paths(new), opened(new)) == ({START: f"a/{LAST}"}, {START})
    begun = resolve("finetune", "tuned", recipe="tune.yaml", model="a")
    assert (paths(begun), opened(begun)) == ({START: f"a/{FIRST}"}, set())
    over = resolve("finetune", "tuned", recipe="tune.yaml", model="a", resume=False)
    assert paths(over) == {START: f"a/{LAST}"}


def test_a_run_that_has_not_ended_is_told_of_unless_its_checkpoint_is_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve("finetune", "new", recipe="tune.yaml", model=f"a/{FIRST}")
    assert capsys.readouterr().err == ""
    resolve("finetune", "new", recipe="tune.yaml", model="a")
    assert not lacking(capsys.readouterr().err, "warning: --model a ended 1 2")
    goes_on("a")
    resolve("finetune", "new", recipe="tune.yaml", model="a")
    assert capsys.readouterr().err == ""


def test_a_run_that_has_begun_needs_neither_its_start_nor_the_start_of_its_student(here: Path) -> None:
    shutil.move(f"a/{FIRST}", "gone")
    shutil.rmtree("d")
    assert not opened(resolve("finetune", "tuned", recipe="tune.yaml", model="a"))
    with pytest.raises(CheckpointError, match=naming_words(f"student distill.teacher a/{FIRST} --no-resume")):
        resolve("distill", "student", teacher="a", student="d")
    shutil.move("gone", f"a/{FIRST}")
    again = resolve("distill", "student", EACH, teacher="a", student="d")
    assert opened(again) == {TEACHER}
    assert paths(again)[STUDENT] == f"d/{FIRST}"


def test_a_run_that_saved_nothing_keeps_what_its_recipe_records(here: Path) -> None:
    for run in ("tuned", "student"):
        shutil.rmtree(f"{run}/checkpoints")
    goes_on("a")
    begun = resolve("finetune", "tuned", recipe="tune.yaml", model="a")
    assert (paths(begun), opened(begun)) == ({START: f"a/{FIRST}"}, {START})
    distilled = resolve("distill", "student", teacher="a", student="d")
    assert paths(distilled) == {TEACHER: f"a/{FIRST}", STUDENT: f"d/{FIRST}"}
    assert opened(distilled) == {TEACHER, STUDENT}
    shutil.rmtree(f"a/{FIRST}")
    with pytest.raises(
        CheckpointError, match=naming_words(f"tuned/recipe.yaml start.checkpoint a/{FIRST} --no-resume")
    ):
        resolve("finetune", "tuned", recipe="tune.yaml", model="a")


def test_a_branch_of_a_distillation_begins_with_its_checkpoint(here: Path) -> None:
    goes_on("a")
    keys = ("distill.temperature=2.0", "train.steps=3")
    branch = resolve("distill", "new", keys, teacher="a", student="d", branch_from="student@1")
    assert paths(branch) == {START: f"student/{FIRST}", TEACHER: f"a/{LAST}", STUDENT: f"d/{FIRST}"}
    assert (branch.recipe.start.keep, branch.recipe.distill.temperature) == ("run", 2.0)
    assert branch.recipe.model == branch.handles[START].spec


def test_a_branch_of_a_distillation_takes_the_shape_of_its_student(here: Path) -> None:
    handle = resolve("distill", "new", teacher="a").handles[TEACHER]
    teacher = Pin(str(handle.path), handle.spec, handle)
    smaller = teacher.model.model_copy(update={"d_ff": 16})
    tree = recipes.load(None)
    for pins, d_ff in (({}, teacher.model.d_ff), ({START: teacher._replace(model=smaller, handle=None)}, 16)):
        defaults = Distillation.defaults(tree, {TEACHER: teacher, **pins})
        assert defaults.stated("model.d_ff") == d_ff


def test_a_branch_of_a_tuned_run_takes_its_model_and_its_recipe_names_the_step(here: Path) -> None:
    shutil.move(f"tuned/{LAST}", "tuned-later")
    branch = resolve("finetune", "new", ("train.steps=9",), recipe="tune.yaml", branch_from="tuned")
    assert (paths(branch), opened(branch)) == ({START: f"tuned/{FIRST}"}, {START})
    Path("branch.yaml").write_text(dump(branch.recipe))
    goes_on("tuned")
    again = resolve("finetune", "again", recipe="branch.yaml")
    assert (paths(again), again.recipe) == (paths(branch), branch.recipe)


def test_a_branch_of_a_branch_names_the_branch(here: Path) -> None:
    keys = ("train.steps=2", *EACH)
    switchcli("finetune", "tune.yaml", *keys, "--branch-from", "tuned@1", "--out", "second")
    third = resolve("finetune", "third", ("train.steps=4",), recipe="tune.yaml", branch_from="second")
    assert paths(third) == {START: f"second/{LAST}"}
    begun = resolve("finetune", "second", keys, recipe="tune.yaml", branch_from="tuned")
    assert (paths(begun), opened(begun)) == ({START: f"tuned/{FIRST}"}, set())
    other = resolve("finetune", "second", ("train.steps=4", *EACH), recipe="tune.yaml", branch_from="tuned@2")
    assert (paths(other), opened(other)) == ({START: f"tuned/{LAST}"}, {START}), "another branch"


def test_a_start_that_was_no_branch_is_checked_when_it_becomes_one(here: Path) -> None:
    shutil.rmtree("tuned/checkpoints")  # its recipe.yaml names a run of pretrain
    with pytest.raises(RecipeError, match=naming_words("--branch-from pretrain")):
        resolve("finetune", "tuned", recipe="tune.yaml", branch_from="a")


def test_a_student_that_is_gone_is_not_missed_though_its_name_is_like_a_size(here: Path) -> None:
    shutil.move("d", "tiny-two")
    switchcli("distill", *EACH, "--teacher", "a", "--student", "tiny-two", "--out", "second")
    shutil.rmtree("tiny-two")
    assert opened(resolve("distill", "second", EACH, teacher="a", student="tiny-two")) == {TEACHER}


def test_a_student_may_be_a_size_and_a_baseline_a_number(here: Path) -> None:
    job = resolve("distill", "new", ("student.kind=random_init",), teacher="a", baseline="-3.5")
    assert (opened(job), job.recipe.distill.baseline) == ({TEACHER}, -3.5)
    with pytest.raises(RecipeError, match=naming_words("44,319,232 parameters larger --student")):
        resolve("distill", "new", ("student.kind=random_init",), teacher="a", student="t5-small")


def test_a_baseline_is_not_pinned(here: Path) -> None:
    job = resolve("distill", "new", teacher="a", baseline="d")
    assert job.recipe.distill.baseline == "d"
    assert opened(job) == {TEACHER, BASELINE}


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        (["start.checkpoint=a"], {"model": "a"}, "start.checkpoint --model leave"),
        (["distill.teacher=a"], {"teacher": "a"}, "distill.teacher --teacher leave"),
        (["student.kind=random_init"], {"teacher": "a", "student": "d"}, "student.kind random_init --student leave"),
        (
            ["student.path=d", "student.kind=checkpoint"],
            {"teacher": "a", "student": "t5-small"},
            "--student t5-small student.path",
        ),
        ([], {"teacher": "a", "student": "t5-smal"}, "student.path --student t5-small"),
        ([], {"teacher": "a", "baseline": "nan"}, "--baseline nan finite"),
        ([], {}, "distill.teacher --teacher"),
    ],
)
def test_names_that_contradict_one_another_are_refused(
    overrides: list[str], options: dict[str, str], words: str, here: Path
) -> None:
    verb = "finetune" if "model" in options else "distill"
    with pytest.raises(RecipeError, match=naming_words(words)):
        resolve(verb, "new", overrides, **options)


def resolved_on_rank(folders: Sequence[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """What a rank starts from that sees the runs in a folder of its own, and the checkpoints that it opens."""
    os.chdir(folders[int(os.environ["RANK"])])
    job = resolve("distill", "new", teacher="a", student="d", baseline="d")
    return paths(job), {key: str(handle.path) for key, handle in job.handles.items()}


def test_all_ranks_take_the_checkpoints_of_rank_0(here: Path, tmp_path: Path) -> None:
    """Between their starts a run has saved another one."""
    later = tmp_path / "later"
    shutil.copytree(here, later)
    shutil.move(later / "a-later", later / "a" / LAST)
    named, opened = on_ranks(2, resolved_on_rank, [here, later])[1]
    assert named == {TEACHER: f"a/{FIRST}", STUDENT: f"d/{FIRST}"}
    assert opened == {**named, BASELINE: f"d/{FIRST}"}
