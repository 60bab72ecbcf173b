"""`--branch-from RUN[@STEP]`: a new run that continues another one with settings that a resume refuses."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drill import CLOCKS, fingerprint, newest
from messages import lacking
from tiny_run import SwitchCLI, lay_out, lay_out_tuning, records
from typer.testing import CliRunner

from switchcli.checkpoint import checkpoint
from switchcli.cli import app
from switchcli.data.text_batches import PreparedTextSource
from switchcli.training.schedules import Constant

KEPT = "checkpoint.keep_last=10"
CONSTANT = ("schedule.kind=constant", "schedule.learning_rate=0.01")
STEPS = 8


@pytest.fixture(scope="module")
def original(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps with checkpoints of steps 4 and 8. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("original")
    arguments = ["pretrain", lay_out(folder, text), f"train.steps={STEPS}", KEPT, *CONSTANT, "--out", "run", "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    return folder / "run"


@pytest.fixture
def run(original: Path, recipe: str) -> Path:
    """A copy of the original beside its recipe, in the current folder."""
    shutil.copytree(original, "run")
    return Path("run")


@pytest.fixture
def branch(run: Path, recipe: str, switchcli: SwitchCLI) -> Callable[..., dict[str, Any]]:
    """Branch the run after step 4, with these settings, into `new`, and return the result."""

    def start(*settings: str, source: str = "run@4") -> dict[str, Any]:
        arguments = (recipe, f"train.steps={STEPS}", KEPT, *CONSTANT, *settings)
        done = switchcli("pretrain", *arguments, "--branch-from", source, "--out", "new", "--json")
        assert done.code == 0, done.err
        result: dict[str, Any] = json.loads(done.out)
        return result

    return start


def records_after(run: Path, after: int) -> list[dict[str, Any]]:
    """The records of training after a step, without clocks."""
    untimed = [{key: value for key, value in line.items() if key not in CLOCKS} for line in records(run)]
    return [line for line in untimed if line["step"] > after]


def weights_of(run: Path) -> dict[str, str]:
    return {key: value for key, value in fingerprint(run).items() if key in ("step", "model", "optimizer")}


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of the rows that training reads, in the order of the data."""
    read: list[int] = []
    raw_rows = PreparedTextSource._raw_rows

    def record(source: PreparedTextSource, row_R: "np.ndarray[Any, Any]") -> Any:
        read.extend(row_R.tolist())
        return raw_rows(source, row_R)

    with monkeypatch.context() as patch:
        patch.setattr(PreparedTextSource, "_raw_rows", record)
        yield read


@pytest.mark.integration
def test_with_the_same_settings_it_goes_on_with_the_same_bits(branch: Callable[..., dict[str, Any]], run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result, new_run = branch(), Path("new")
    assert weights_of(new_run) == weights_of(run)
    # Records of training cover the steps since the last one, so the first of a branch may cover fewer than there.
    new, old = (
        [line for line in records_after(each, 4) if "held_out/neg_log_perplexity" in line] for each in (new_run, run)
    )
    assert new == old
    assert [line["step"] for line in new] == [5, 8]
    assert result["input_tokens"] == STEPS * 256
    assert result["start"]["step"] == 4
    assert result["start"]["data"] == "continued"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, "it is only read"


@pytest.mark.integration
def test_another_learning_rate_is_that_of_a_run_that_changes_it_at_that_step(
    branch: Callable[..., dict[str, Any]], recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is never interrupted, whose schedule itself changes at step 4."""
    branch("schedule.learning_rate=0.002")
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "__call__", lambda schedule, step, total: 0.002 if step >= 4 else 0.01)
        done = switchcli("pretrain", recipe, f"train.steps={STEPS}", *CONSTANT, "--out", "straight", "-q")
        assert done.code == 0
    assert weights_of(Path("new")) == weights_of(Path("straight"))


@pytest.mark.integration
def test_branches_of_one_constant_run_each_fall_over_their_own_steps(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 and 5 are between the saves, and kept; the recipe of the run is that of its branches."""
    wsd = ("schedule.kind=wsd", "schedule.learning_rate=0.01", "schedule.warmup_steps=2", "log.every_steps=1")
    kept = ("checkpoint.keep_steps=[3,5]", "checkpoint.keep_last=1", "checkpoint.keep_best=false")
    room: list[int] = []
    monkeypatch.setattr(checkpoint, "preflight", lambda folder, size: room.append(size))
    trunk = switchcli("pretrain", recipe, f"train.steps={STEPS}", *wsd, *kept, "--out", "trunk", "-q")
    assert trunk.code == 0, trunk.err
    assert sorted(path.name for path in Path("trunk/checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (3, 5, STEPS)
    ]
    rates = {"trunk": [0.005, *[0.01] * 6, 0.00625]}  # the last 1.6 of eight steps
    for out, first, steps, shape in (("short", 3, 5, "linear"), ("long", 5, 9, "sqrt")):
        settings = (f"train.steps={steps}", f"schedule.shape={shape}", "--branch-from", f"trunk@{first}", "--out", out)
        done = switchcli("pretrain", "trunk/recipe.yaml", *settings)
        assert done.code == 0, done.err
        assert not lacking(done.err, "rises again")
        progress = [own / (steps - first) for own in range(steps - first)]
        rates[out] = [0.01 * (1 - (share**0.5 if shape == "sqrt" else share)) for share in progress]
    # The newest, one being written, and the named ones that it takes: steps 3 and 5, then 5, then none.
    assert [size / room[2] * 2 for size in room] == [4, 3, 2]
    for out, expected in rates.items():
        found = [record["learning_rate"] for record in records(Path(out)) if "learning_rate" in record]
        assert found == pytest.approx(expected)
    # One run whose schedule itself changes at step 3.
    straight = {step: 0.005 if step == 0 else 0.01 for step in range(3)} | {3: 0.01, 4: 0.005}
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "__call__", lambda schedule, step, total: straight[step])
        done = switchcli("pretrain", recipe, "train.steps=5", *CONSTANT, "--out", "straight", "-q")
        assert done.code == 0, done.err
    assert weights_of(Path("short")) == weights_of(Path("straight"))
    # A branch that was stopped after its fourth step goes on with the same rates.
    shutil.rmtree("short/checkpoints/step-00000005")
    Path("short/result.json").unlink()
    again = switchcli("pretrain", "short/recipe.yaml", "--out", "short", "-q")
    assert again.code == 0, again.err
    assert weights_of(Path("short")) == weights_of(Path("straight"))


@pytest.mark.integration
def test_another_batch_goes_on_at_the_next_row(branch: Callable[..., dict[str, Any]], rows_read: list[int]) -> None:
    """Four steps of eight rows were read: the next is row 32, whatever the batch is now."""
    result = branch("train.batch_tokens=128", "data.held_out_fraction=0.1", "eval.sequences=8")
    training = [row for row in rows_read if row >= 8]  # held-out rows, which are read too, are 0 to 7
    assert training == list(range(32, 32 + 4 * 4))
    assert result["input_tokens"] == 4 * 256 + 4 * 128
    assert result["start"]["data"] == "continued"


def test_a_branch_of_a_branch_goes_on_at_the_next_row(begun: str, rows_read: list[int], switchcli: SwitchCLI) -> None:
    """Two steps of eight rows and one of four were read: the next is row 20."""
    for settings in (
        ("train.steps=3", "train.batch_tokens=128", "--branch-from", "a", "--out", "new"),
        ("train.steps=4", "train.batch_tokens=512", "--branch-from", "new", "--out", "newer"),
    ):
        rows_read.clear()
        assert switchcli("pretrain", begun, *settings, "-q").code == 0
    assert [row for row in rows_read if row >= 8] == list(range(20, 20 + 16))


def test_a_branch_takes_more_steps_than_the_run_has(begun: str, switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", begun, "train.seed=1", "--branch-from", "a", "--out", "new")
    assert (done.code, lacking(done.err, "train.steps 2")) == (2, [])


@pytest.mark.integration
def test_its_messages_and_records_count_the_tokens_of_both_runs(run: Path, recipe: str, switchcli: SwitchCLI) -> None:
    settings = (f"train.steps={STEPS}", *CONSTANT, "train.batch_tokens=128", "log.every_steps=1")
    done = switchcli("pretrain", recipe, *settings, "--branch-from", "run@4", "--out", "new")
    assert done.code == 0, done.err
    announced = next(line for line in done.err.splitlines() if "parameters for" in line)
    assert not lacking(announced, "8 steps of 128 tokens from step 4 1.54k tokens")  # 4 * 256 + 4 * 128
    assert not lacking(done.err, "at step 4 before the branch")
    logged = [record["input_tokens"] for record in records(Path("new")) if "input_tokens" in record]
    assert logged == [4 * 256 + count * 128 for count in (1, 2, 3, 4)]


@pytest.mark.integration
@pytest.mark.parametrize(
    "change",
    [
        "train.seed=1",
        "data.corpora=[{kind: files, paths: [other.txt], sample_by: line}]",
    ],
)
def test_other_data_begins_anew(change: str, branch: Callable[..., dict[str, Any]], rows_read: list[int]) -> None:
    Path("other.txt").write_text(Path("text.txt").read_text().replace("red", "blue"))
    result = branch(change)
    assert result["start"]["data"] == "new"
    assert result["step"] == STEPS
    assert max(rows_read) == 4 * 8 - 1, "four steps of eight rows, from the first"


@pytest.mark.integration
def test_a_stream_goes_on_where_it_was(run: Path, recipe: str, switchcli: SwitchCLI) -> None:
    stream = (recipe, "data.access=stream", "data.stream_shards=2", f"train.steps={STEPS}", KEPT, *CONSTANT, "--quiet")
    assert switchcli("pretrain", *stream, "--out", "streamed").code == 0
    assert switchcli("pretrain", *stream, "--branch-from", "streamed@4", "--out", "again").code == 0
    assert weights_of(Path("again")) == weights_of(Path("streamed"))
    half = ("train.batch_tokens=128", "--branch-from", "streamed@4", "--out")
    assert switchcli("pretrain", *stream, *half, "half").code == 0
    assert switchcli("pretrain", *stream, "train.seed=3", "--branch-from", "streamed@4", "--out", "anew").code == 0
    state = json.loads((Path("half/checkpoints/step-00000008/state.json")).read_text())
    assert (state["branch"], json.loads(Path("anew/result.json").read_text())["start"]["data"]) == (
        [4, 1024, 16, True],
        "new",
    )


@pytest.mark.integration
def test_the_refusal_of_a_resume_says_how_to_branch(run: Path, recipe: str, switchcli: SwitchCLI) -> None:
    settings = (f"train.steps={STEPS + 2}", KEPT, "schedule.kind=constant", "schedule.learning_rate=0.002")
    refused = switchcli("pretrain", recipe, *settings, "--out", "run", "--quiet")
    assert refused.code == 2
    added = re.search(r"add (--branch-from run --out NEW)", refused.err)
    assert added is not None, refused.err
    done = switchcli("pretrain", recipe, *settings, *shlex.split(added[1]))
    assert done.code == 0, done.err
    assert weights_of(Path("NEW"))["step"] == str(STEPS + 2)


@pytest.mark.integration
def test_a_branch_cannot_change_a_shape_and_so_the_refusal_names_none(
    run: Path, recipe: str, switchcli: SwitchCLI
) -> None:
    refused = switchcli("pretrain", recipe, f"train.steps={STEPS}", "model.d_model=64", "--out", "run")
    assert refused.code == 2
    assert "--branch-from" not in refused.err
    other = ("schedule.learning_rate=0.002", "--branch-from", "run@4", "--out", "run")
    refused = switchcli("pretrain", recipe, f"train.steps={STEPS + 2}", *other)
    assert (refused.code, lacking(refused.err, "error: run another --out")) == (2, []), "into the folder of another run"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("source", "change", "code", "words"),
    [
        ("run@4", "model.d_model=64", 2, "model.d_model 64 32"),
        ("run@4", "optimizer.kind=adamw", 4, "optimizer --model start.keep=weights"),
        ("run@4", "train.steps=4", 2, "train.steps 4 8"),
        ("run@5", "train.steps=20", 4, "run/checkpoints/step-00000005 4 8"),
        ("nowhere", "train.steps=20", 4, "nowhere checkpoint"),
        ("run@4", "data.tokenizer={kind: file, path: other.json}", 2, "data.tokenizer other.json"),
    ],
)
def test_what_a_branch_cannot_do_is_refused(
    source: str, change: str, code: int, words: str, run: Path, recipe: str, switchcli: SwitchCLI
) -> None:
    other = json.loads((run / "tokenizer.json").read_text())
    other["model"]["vocab"][-1][0] += "x"
    Path("other.json").write_text(json.dumps(other))
    settings = (f"train.steps={STEPS}", *CONSTANT, change)
    done = switchcli("pretrain", recipe, *settings, "--branch-from", source, "--out", "new", "--json")
    assert done.code == code, done.err
    assert not lacking(done.err, words), done.err
    assert json.loads(done.out)["exit_code"] == code


@pytest.mark.integration
def test_another_verb_and_its_own_folder_are_refused(run: Path, recipe: str, switchcli: SwitchCLI) -> None:
    lay_out_tuning(Path())
    done = switchcli("finetune", "tune.yaml", "--branch-from", "run", "--out", "tuned")
    assert done.code == 2
    assert not lacking(done.err, "pretrain --model start.keep=weights")
    within = switchcli("pretrain", recipe, "train.steps=20", "--branch-from", "run", "--out", "run", "--no-resume")
    assert within.code == 2
    assert not lacking(within.err, "--branch-from --out")


@pytest.mark.parametrize("keys", [("--branch-from", "run"), ("start.checkpoint=run", "start.keep=run")])
def test_two_checkpoints_to_start_from_are_refused(keys: tuple[str, ...], recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", recipe, "--model", "other", *keys)
    assert (done.code, lacking(done.err, "--model --branch-from")) == (2, [])


def test_a_recipe_can_name_the_run_that_it_continues(begun: str, switchcli: SwitchCLI) -> None:
    keys = ("start.checkpoint=a", "start.keep=run", "train.steps=3")
    done = switchcli("pretrain", begun, *keys, "--out", "new", "--json")
    start = json.loads(done.out)["start"]
    assert (start["keep"], start["step"], Path(start["checkpoint"]).parents[1]) == ("run", 2, Path("a"))


@pytest.mark.integration
def test_it_resumes_without_the_other_run(
    branch: Callable[..., dict[str, Any]], run: Path, recipe: str, switchcli: SwitchCLI
) -> None:
    """The branch has only the checkpoint that it began from, as after a kill before its first save."""
    branch("schedule.learning_rate=0.002")
    whole = fingerprint(Path("new"))
    shutil.rmtree("new/checkpoints/step-00000008")
    shutil.rmtree("run")
    Path("new/result.json").unlink()
    lines = Path("new/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("new/metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
    branch("schedule.learning_rate=0.002")
    assert newest(Path("new")) == STEPS
    assert fingerprint(Path("new")) == whole


@pytest.mark.integration
def test_its_recipe_repeats_it_though_the_run_has_gone_on(
    branch: Callable[..., dict[str, Any]], run: Path, recipe: str, switchcli: SwitchCLI
) -> None:
    """`run` names its newest checkpoint when the branch begins; the recipe of the branch names that one."""
    steps = ("train.steps=10", "schedule.learning_rate=0.002")
    result = branch(*steps, source="run")
    assert result["start"]["step"] == STEPS
    more = switchcli("pretrain", recipe, "train.steps=12", KEPT, *CONSTANT, "--out", "run", "--quiet")
    assert more.code == 0, more.err
    again = switchcli("pretrain", "new/recipe.yaml", "--out", "again", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["start"] == result["start"]
    assert weights_of(Path("again")) == weights_of(Path("new"))
    # The command that made the branch resumes it.
    arguments = (recipe, KEPT, *CONSTANT, "schedule.learning_rate=0.002", "train.steps=11", "--out", "new", "--quiet")
    assert switchcli("pretrain", *arguments, "--branch-from", "run").code == 0
    assert weights_of(Path("new"))["step"] == "11"
    assert not lacking(switchcli("pretrain", *arguments).err, "new --branch-from")
    # Another checkpoint in the place of the recorded one is noticed.
    shutil.rmtree("run/checkpoints/step-00000008")
    assert switchcli("pretrain", "new/recipe.yaml", "--out", "third").code == 4


@pytest.mark.integration
def test_distill_with_another_temperature(trained: Path, recipe: str, switchcli: SwitchCLI) -> None:
    distill = ("distill", "--teacher", trained, "checkpoint.save_every_steps=1", "train.steps=2", "--json", "--out")
    assert switchcli(*distill, "run").code == 0
    refused = switchcli(*distill, "run", "distill.temperature=2.0")
    assert refused.code == 2
    assert not lacking(refused.err, "distill.temperature --branch-from run")
    done = switchcli(*distill, "new", "distill.temperature=2.0", "--branch-from", "run@1")
    assert done.code == 0, done.err
    assert json.loads(done.out)["start"]["step"] == 1
    same = switchcli(*distill, "same", "--branch-from", "run@1")
    assert same.code == 0, same.err
    assert weights_of(Path("same")) == weights_of(Path("run")) != weights_of(Path("new"))
