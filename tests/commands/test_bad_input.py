"""What a user gets wrong, one case each: the exit code of its kind, one line that says the rule and the way out."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from bad_inputs import CASES, CHECKPOINT, FILES, RECIPE, corpus, lay_out_bad
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.checkpoint.checkpoint import Checkpoint
from switchcli.recipe import library


@pytest.fixture
def texts(recipe: str) -> None:
    """Files beside the recipe of which none can be used."""
    lay_out_bad(Path())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("texts")
def test_one_line_with_the_way_out(case: str, recipe: str, switchcli: SwitchCLI) -> None:
    arguments, code, words = CASES[case]
    done = switchcli("pretrain", recipe, *arguments)
    assert (done.code, done.out) == (code, ""), done.err
    assert re.fullmatch(r"(preparing text .*\n)?error: .*\n", done.err)  # an error of the text is met while it is read
    assert not lacking(done.err, words)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.usefixtures("texts")
def test_what_is_no_yaml_of_a_recipe_is_named_by_its_line(file: str, switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", file)
    assert (done.code, done.out) == (RECIPE, "")
    assert re.fullmatch(rf"error: {file}:.*\n", done.err)
    assert not lacking(done.err, FILES[file][1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "none.yaml"], "none.yaml switchcli recipes list"),
        (["pretrain", "quickstart/swich"], "quickstart/swich quickstart/switch"),
        (["pretrain", "."], "folder .yaml"),
        (["pretrain", "train.steps=10", "quickstart/switch"], "train.steps=... recipe first KEY=VALUE"),
        *(
            ([*words.split(), "--out", "text.txt"], "--out text.txt folder file")
            for words in ("finetune tiny.yaml", "distill tiny.yaml", "eval none", "sweep pretrain tiny.yaml")
        ),
        (["pretrain", "latin1.txt"], "latin1.txt:2 UTF-8"),
        (["pretrain", "tiny.yaml", "--outt", "a"], "--outt --out"),
        (["pretrian", "tiny.yaml"], "'pretrian' 'pretrain'"),
        (["pretrain"], "Missing 'RECIPE'"),
        (["pretrain", "tiny.yaml", "--processes", "0"], "'--processes' 1"),
        *(
            (words.split(), f"{words.split()[-2]} {other}")
            for words, other in {
                "convert . there --to switchcli --revision v1": "hub",
                "report run --quality nan": "0",
            }.items()
        ),
    ],
)
@pytest.mark.usefixtures("texts")
def test_usage(arguments: list[str], words: str, switchcli: SwitchCLI) -> None:
    done = switchcli(*arguments)
    assert (done.code, done.out) == (RECIPE, "")
    assert not lacking(done.err, words)
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", ["recipes validate", "pretrain", "sweep pretrain --print"])
def test_a_pipe_of_the_shell_is_no_recipe(command: str, switchcli: SwitchCLI) -> None:
    reads, writes = os.pipe()
    done = switchcli(*command.split(), f"/dev/fd/{reads}")
    os.close(reads)
    os.close(writes)
    assert (done.code, done.out) == (RECIPE, "")
    assert done.err.endswith("it is a pipe, not a file; save its content to a file\n")


def test_credentials_in_the_address_of_the_hub_are_refused(
    switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub would print them at each attempt to reach the hub."""
    monkeypatch.setenv("HF_ENDPOINT", "https://me:c4n4ry@hub.org")
    done = switchcli("recipes", "list")
    assert (done.code, done.out) == (RECIPE, "")
    assert not lacking(done.err, "HF_ENDPOINT HF_TOKEN")
    assert "c4n4ry" not in done.err
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.org")
    assert switchcli("recipes", "list").code == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
)
def test_memory_that_the_system_refuses_is_told_in_one_line(
    error: Exception, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> NoReturn:
        try:
            raise error
        except type(error) as cause:
            raise ImportError("numpy could not be imported") from cause

    monkeypatch.setattr(library, "recipe_names", names)
    done = switchcli("recipes", "list")
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch("error: .*\n", done.err)
    assert not lacking(done.err, "memory ulimit")


def test_a_library_that_may_not_be_mapped_is_not_called_out_of_memory(
    switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> NoReturn:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object: Operation not permitted")

    monkeypatch.setattr(library, "recipe_names", names)
    with pytest.raises(ImportError, match="not permitted"):
        switchcli("recipes", "list")


@pytest.mark.integration
@pytest.mark.parametrize("kilobytes", [60_000, 150_000, 400_000])
@pytest.mark.usefixtures("recipe")
def test_no_limit_of_memory_ends_in_a_traceback(kilobytes: int) -> None:
    limited = f"ulimit -v {kilobytes}; exec {shlex.quote(sys.executable)} -m switchcli pretrain tiny.yaml"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", limited], env=one_thread, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr  # the exit code may be that of a library which aborts


def test_every_wrong_key_has_its_line_and_json_its_object(recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", recipe, "train.stps=3", "model.dmodel=3", "--json")
    assert done.code == RECIPE
    assert len(done.err.splitlines()) == 2
    assert json.loads(done.out) == {"error": done.err.removeprefix("error: ").strip(), "exit_code": RECIPE}


def test_no_cuda(recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = switchcli("pretrain", recipe, "train.device=cuda")
    assert (done.code, done.out) == (RECIPE, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert not lacking(done.err, "train.device cuda auto cpu")


def test_a_tracker_that_is_not_installed_is_missed_before_data_is_read(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    done = switchcli("pretrain", recipe, "log.trackers=[wandb]", corpus("none.txt"))
    assert (done.code, done.out) == (RECIPE, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert not lacking(done.err, "log.trackers wandb pip install 'switchcli[wandb]'")


# Folders and disks


def test_too_small_a_disk_is_seen_before_training(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    done = switchcli("pretrain", recipe, "--out", "a")
    assert (done.code, done.out) == (CHECKPOINT, "")
    assert re.fullmatch(r"error: a/checkpoints: .*\b[\d,]+ bytes\b.*\b1,000 free\b.*--out.*\n", done.err)


# Checkpoints that do not fit


def test_a_recipe_edited_in_the_runs_folder_does_not_change_the_run(begun: str, switchcli: SwitchCLI) -> None:
    path = Path("a/recipe.yaml")
    path.write_text(path.read_text().replace("  seed: 0", "  seed: 5"))
    done = switchcli("pretrain", "a/recipe.yaml", "--out", "a")
    assert (done.code, done.out) == (RECIPE, "")
    assert not lacking(done.err, "train.seed 0 5 --out --no-resume")
    path.unlink()
    assert switchcli("pretrain", begun, "train.seed=5", "--out", "a").code == RECIPE
    assert switchcli("pretrain", begun, "train.seed=5", "--out", "a", "--no-resume").code == 0
    assert Path("a.before-1/checkpoints").is_dir()


def test_fewer_steps_than_were_taken_are_refused(begun: str, switchcli: SwitchCLI) -> None:
    before = Path("a/result.json").read_text()
    done = switchcli("pretrain", begun, "train.steps=1", "--out", "a", "--quiet")
    assert (done.code, done.out) == (RECIPE, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert not lacking(done.err, "train.steps 1 2 --no-resume")
    assert Path("a/result.json").read_text() == before


def test_a_cache_that_cannot_be_made(recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHCLI_CACHE", "text.txt/cache")
    done = switchcli("pretrain", recipe)
    assert (done.code, done.out) == (CHECKPOINT, "")
    assert re.fullmatch(
        r"preparing text .*\nerror: text\.txt/cache: Not a directory.*\bSWITCHCLI_CACHE\b.*\n", done.err
    )


@pytest.mark.integration
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(begun: str, switchcli: SwitchCLI) -> None:
    command = ("pretrain", begun, "train.steps=3", "--out", "a")
    assert switchcli(*command).code == 0
    path = Path("a/checkpoints/step-00000003/optimizer-00000.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = switchcli(*command)
    assert done.code == 0
    lines = done.err.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith("warning: ")]
    assert "optimizer-00000.safetensors" in lines[number]
    assert not lacking("\n".join(lines[number + 1 :]), "2 3")
    assert Checkpoint.open(Path("a/checkpoints/step-00000003")).step == 3
