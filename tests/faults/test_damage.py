"""Damage to the files of a run is found before anything of them is used, and what is whole goes on to the same bits."""

import json
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.numpy
from faults.harness import Prepared, run

CHECKPOINT = 4
OLDER, NEWEST = (Path(f"out/checkpoints/step-{step:08}") for step in (2, 4))
FILES = ("MANIFEST", "data.json", "model-00000.safetensors", "optimizer-00000.safetensors", "recipe.yaml", "state.json")

# Ways to damage a file, and a checkpoint


def flip(content: bytes, draw: random.Random) -> bytes:
    """One bit, anywhere."""
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def hole(content: bytes, draw: random.Random) -> bytes:
    """A block that never reached the disk."""
    begin = draw.randrange(max(1, len(content) - 64))
    return content[:begin] + bytes(len(content[begin : begin + 64])) + content[begin + 64 :]


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip,
    "hole": hole,
    "cut": lambda content, draw: content[: draw.choice((0, len(content) // 2, len(content) - 1))],
    "zeros": lambda content, draw: bytes(len(content)),
    "longer": lambda content, draw: content + draw.randbytes(draw.choice((1, 4096))),
}


def change_bytes(how: str, file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(BYTES[how](content, draw))
    if file.read_bytes() == content:
        file.write_bytes(content[:-1])


def lose(file: Path, draw: random.Random) -> None:
    file.unlink()


def link_to_a_copy(file: Path, draw: random.Random) -> None:
    """Replace the file by a link to the same bytes elsewhere."""
    aside = Path(f"aside-{file.name}").absolute()
    file.rename(aside)
    file.symlink_to(aside)


def make_a_folder(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


def take_another_steps(file: Path, draw: random.Random) -> None:
    other = (OLDER if file.parent == NEWEST else NEWEST) / file.name
    if other.read_bytes() == file.read_bytes():  # the recipe is that of every step
        file.unlink()
    else:
        shutil.copy(other, file)


def swap_experts(checkpoint: Path, draw: random.Random) -> None:
    """The weights of two experts of a layer, in a file that is as sound as the other."""
    path = checkpoint / "model-00000.safetensors"
    named = safetensors.numpy.load_file(path)
    one = draw.choice([name for name in sorted(named) if ".experts.0." in name])
    other = one.replace(".experts.0.", f".experts.{draw.randrange(1, 4)}.")
    named[one], named[other] = named[other], named[one]
    safetensors.numpy.save_file(named, path)


def swap_files(checkpoint: Path, draw: random.Random) -> None:
    """Weights under the name of the optimizer's state, and the other way round."""
    model, optimizer = (checkpoint / f"{group}-00000.safetensors" for group in ("model", "optimizer"))
    model.rename(checkpoint / "aside")
    optimizer.rename(model)
    (checkpoint / "aside").rename(optimizer)


def become_another_step(checkpoint: Path, draw: random.Random) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(OLDER if checkpoint == NEWEST else NEWEST, checkpoint)


def empty(checkpoint: Path, draw: random.Random) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


Damage = Callable[[Path, random.Random], None]
OF_A_FILE: dict[str, Damage] = {
    **{how: partial(change_bytes, how) for how in BYTES},
    **{how.__name__: how for how in (lose, link_to_a_copy, make_a_folder, take_another_steps)},
}
OF_ALL: dict[str, Damage] = {how.__name__: how for how in (swap_experts, swap_files, become_another_step, empty)}
DAMAGES = [(file, how) for how in OF_A_FILE for file in FILES] + [("", how) for how in OF_ALL]
FEW = [(FILES[number % len(FILES)], how) for number, how in enumerate(OF_A_FILE)] + [("", how) for how in OF_ALL]


def damage(checkpoint: Path, file: str, how: str, draw: random.Random) -> None:
    if file:
        OF_A_FILE[how](checkpoint / file, draw)
    else:
        OF_ALL[how](checkpoint, draw)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "damages",
    [
        pytest.param(FEW, marks=pytest.mark.integration, id="few"),
        pytest.param(DAMAGES * 20, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)], id="all"),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_run_ends_the_same(
    damages: list[tuple[str, str]],
    prepare: Callable[[str], Prepared],
    draw: random.Random,
    record_property: Callable[[str, int], None],
) -> None:
    prepared = prepare("pretrain")
    record_property("trials", len(damages))
    for file, how in damages:
        with prepared.tried("after"):
            damage(NEWEST, file, how, draw)
            named = f"{file or 'model-00000|optimizer-00000'}|MANIFEST"
            told = run("doctor", "out", "--checkpoint-files").said
            wrong = prepared.goes_on(rf"(?s){NEWEST.name}.*({named}).*\bfrom step 2\b")
            assert not wrong, f"{how} of {file}: {wrong}"
            found = re.search(rf"damaged .*{NEWEST.name}", told) and re.search(rf"loading takes .*{OLDER.name}", told)
            assert found, f"{how} of {file}: doctor says {told}"


@pytest.mark.integration
def test_a_run_of_which_no_checkpoint_is_whole_is_not_begun_anew(
    prepare: Callable[[str], Prepared], draw: random.Random
) -> None:
    prepared = prepare("pretrain")
    with prepared.tried("after"):
        damage(NEWEST, "state.json", "flip", draw)
        damage(OLDER, "model-00000.safetensors", "cut", draw)
        before = contents(Path("out"))
        for _ in range(2):
            done = run(*prepared.verb.words)
            assert done.code == CHECKPOINT, done.said
            assert all(word in done.errors[0] for word in (NEWEST.name, OLDER.name, "--out"))
            assert contents(Path("out")) == before


READERS = {
    "eval": "eval run --out new",
    "generate": "generate run red",
    "convert": "convert run new --to huggingface",
    "report --routing": "report run --routing",
    "finetune": "finetune tune.yaml --model run --out new",
    "distill": "distill --teacher run --out new",
    "prune": "prune run new --experts 2",
    "upcycle": "upcycle dense new --experts 2",
}


@pytest.mark.integration
@pytest.mark.parametrize("verb", READERS)
def test_every_verb_that_reads_a_damaged_model_says_which_file(
    verb: str, prepare: Callable[[str], Prepared], draw: random.Random
) -> None:
    with prepare("eval").tried():
        for name in ("run", "dense"):
            (file,) = Path(name).glob("checkpoints/step-*/model-00000.safetensors")
            change_bytes("flip", file, draw)
        done = run(*READERS[verb].split())
        assert done.code == CHECKPOINT, done.said
        assert "model-00000.safetensors" in done.said
        assert not Path("new").exists()


# The file of metrics

NO_RECORDS = {
    "half a record": b'{"step": 2, "neg_log',
    "nothing": b"",
    "no step": b'{"loss": 1.0}',
    "a step of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "NUL bytes": b"\0" * 4096,
    "control characters": bytes(range(1, 10)) + b"\x1b[2J",
    "a line of 20 MB": b"x" * 20_000_000,
}
"""Lines that hold no record of a step, by what they are."""
ENDS = {
    "without its last newline": (lambda whole: whole[:-1], 0),
    "cut in its last line": (lambda whole: whole[:-9], 1),
    "NUL bytes at its end": (lambda whole: whole + b"\0" * 100_000, 0),
    "a step to come": (lambda whole: whole + b'{"step": 7, "loss": 1.0}\n', 0),
    "empty": (lambda whole: b"", 99),
}
"""What became of a file of metrics, and how many of its last records are lost by it."""


def assert_goes_on_with(content: bytes, kept: list[bytes], is_damaged: bool = False) -> None:
    """A run of 4 steps whose metrics are these goes on to a fifth, and a report reads them."""
    metrics = Path("out/metrics.jsonl")
    metrics.write_bytes(content)
    for command in ("report out --json", "pretrain out/recipe.yaml train.steps=5 --out out"):
        done = run(*command.split())
        assert done.code == 0, done.said
    assert (f"{metrics}: " in done.said) == is_damaged
    lines = metrics.read_bytes().splitlines(keepends=True)
    assert lines[: len(kept)] == kept
    assert {json.loads(line)["step"] for line in lines[len(kept) :]} == {5}
    assert not is_damaged or Path(f"{metrics}.damaged-1").read_bytes() == content


@pytest.mark.integration
def test_sound_lines_of_damaged_metrics_stay_and_the_old_file_is_kept(prepare: Callable[[str], Prepared]) -> None:
    with prepare("pretrain").tried("after"):
        sound = Path("out/metrics.jsonl").read_bytes().splitlines(keepends=True)
        damaged = [line + b"\n" for line in NO_RECORDS.values()]
        assert_goes_on_with(b"".join([sound[0], *damaged, *sound[1:]]), sound, is_damaged=True)


@pytest.mark.integration
@pytest.mark.parametrize("end", ENDS)
def test_metrics_with_another_end_go_on(end: str, prepare: Callable[[str], Prepared]) -> None:
    change, lost = ENDS[end]
    with prepare("pretrain").tried("after"):
        sound = Path("out/metrics.jsonl").read_bytes().splitlines(keepends=True)
        assert_goes_on_with(change(b"".join(sound)), sound[: max(0, len(sound) - lost)])
