"""Checkpoints under every fault: a kill, a full disk, a power cut at each file operation; damage to each file."""

import errno
import os
import random
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch
from faults.disk import Crash, Disk, Operation, crash, refuse, strike_at
from messages import naming
from tiny_checkpoint import MODEL, OPTIMIZER, equal, numbered, save_step, state_json, wanted

from switchcli.checkpoint.checkpoint import Checkpoint, newest, prune, recover, save
from switchcli.errors import CheckpointError
from switchcli.system import publish

PLAIN = re.compile(r"step-\d{8}")


def ignore(_: str) -> None:
    pass


def is_intact(checkpoint: Checkpoint | None, step: int | None = None) -> bool:
    """Every tensor and document is of the checkpoint's own step."""
    assert checkpoint is not None
    return (
        step in (None, checkpoint.step)
        and equal(checkpoint.read("model", wanted(MODEL)), numbered(MODEL, checkpoint.step))
        and equal(checkpoint.read("optimizer", wanted(OPTIMIZER)), numbered(OPTIMIZER, checkpoint.step))
        and checkpoint.document("recipe.yaml") == f"step: {checkpoint.step}\n".encode()
    )


def damage(path: Path) -> None:
    (path / "state.json").write_bytes(b"{}")


# What a run does to its folder after the saves of two steps, and the step that must be there whatever happens.


def save_a_new_step(folder: Path) -> None:
    save_step(folder, 12)


def save_a_step_again(folder: Path) -> None:
    save_step(folder, 8, {"score": -1.0})


def save_and_prune(folder: Path) -> None:
    save_step(folder, 12)
    prune(folder, 12, 1, keep_best=False)


SCENES = {save_a_new_step: 8, save_a_step_again: 8, save_and_prune: 8, recover: 4}


def prepare(folder: Path, scene: Callable[[Path], None]) -> Path:
    for step in (4, 8):
        save_step(folder, step)
    if scene is recover:
        damage(folder / "step-00000008")
        temporary = publish.temporary_path(folder / "step-00000004")
        shutil.copytree(folder / "step-00000004", temporary / "new")
        (temporary / "old").mkdir()
        (folder / "step-00000004").rename(temporary / "old" / "step-00000004")
    return folder


def assert_recovered(folder: Path, at_least: int) -> None:
    recover(folder)
    found = newest(folder, ignore)
    assert found is not None
    assert found.step >= at_least
    assert is_intact(found)
    assert all(path.name.startswith("step-") for path in folder.iterdir())
    save_step(folder, found.step + 4)
    assert is_intact(newest(folder, ignore), found.step + 4)


@pytest.mark.parametrize("loses_power", [False, True])
@pytest.mark.parametrize("scene", SCENES)
def test_a_process_that_dies_at_any_operation_loses_nothing(
    tmp_path: Path, scene: Callable[[Path], None], loses_power: bool
) -> None:
    for at in count():
        folder = prepare(tmp_path / str(at), scene)
        disk, is_done = Disk(folder, strike_at(at, crash)), False
        with suppress(Crash), disk:
            scene(folder)
            is_done = True
        if loses_power:
            disk.lose_power()
        assert_recovered(folder, SCENES[scene])
        if is_done:
            break
    assert at >= 5


def test_a_crash_in_the_first_save_leaves_nothing_or_all(tmp_path: Path) -> None:
    for at in count():
        folder, is_done = tmp_path / str(at), False
        with suppress(Crash), Disk(folder, strike_at(at, crash)):
            save_step(folder, 4)
            is_done = True
        if is_done:
            break
        recover(folder)
        found = newest(folder, ignore)
        assert found is None or is_intact(found, 4)
        assert not folder.exists() or len([*folder.iterdir()]) == (found is not None)
    assert at >= 10


def test_the_checkpoint_that_was_replaced_stays_until_the_name_of_the_new_one_is_on_the_disk(tmp_path: Path) -> None:
    """A process is killed while it saves a step again; the next one recovers, and the power fails."""
    for at in count():
        folder, is_done = tmp_path / str(at), False
        save_step(folder, 8)

        def kill(disk: Disk, operation: Operation, at: int = at) -> None:
            if operation.number == at:
                raise Crash

        disk = Disk(folder, kill)
        with suppress(Crash), disk:
            save_a_step_again(folder)
            is_done = True
        with disk:
            recover(folder)
        disk.lose_power()
        assert_recovered(folder, 8)
        if is_done:
            break
    assert at >= 10


@pytest.mark.parametrize("names_synced", ["none", "all", "all but the last"])
def test_the_first_checkpoint_stays_after_a_power_cut(tmp_path: Path, names_synced: str) -> None:
    """Where no folder is there, or a process has made some and was killed."""
    folder = tmp_path / "run/checkpoints"
    if names_synced != "none":
        folder.parent.mkdir()
    disk = Disk(tmp_path)
    with disk:
        if names_synced == "all but the last":
            folder.mkdir()
        save_step(folder, 4)
    disk.lose_power()
    assert is_intact(newest(folder, pytest.fail), 4)


@pytest.mark.unit("ENOSPC-False", "EIO-True")
@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_disk_that_refuses_any_operation_keeps_what_was_saved(tmp_path: Path, number: int, for_good: bool) -> None:
    for scene in (save_a_new_step, save_a_step_again):
        for at in count():
            folder, message = prepare(tmp_path / f"{scene.__name__}-{at}", scene), ""
            with Disk(folder, strike_at(at, refuse(number), for_good=for_good)) as disk:
                try:
                    scene(folder)
                except CheckpointError as error:
                    message = str(error)
            if message:
                assert re.match(rf"{folder}\b.*\d bytes\b.*\d.*--out\b", message)
                assert for_good or all(PLAIN.fullmatch(path.name) for path in folder.iterdir())
            if scene is save_a_new_step or not for_good:
                assert is_intact(newest(folder, pytest.fail))
            assert_recovered(folder, 8)
            if len(disk.operations) <= at:
                break
        assert at >= 10


def test_a_save_on_a_full_disk_leaves_no_file_behind(tmp_path: Path) -> None:
    """The disk stays full: it refuses writes and syncs, and files can be removed."""
    for at in range(12):
        folder = prepare(tmp_path / str(at), save_a_new_step)
        with (
            Disk(folder, strike_at(at, refuse(errno.ENOSPC, "write", "sync"), for_good=True)),
            suppress(CheckpointError),
        ):
            save_a_new_step(folder)
        assert all(PLAIN.fullmatch(path.name) for path in folder.iterdir()), at


def test_a_limit_on_the_size_of_files_is_met_as_a_full_disk_is(tmp_path: Path) -> None:
    save_step(tmp_path, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"a": torch.zeros(10_000)}
    for limit in (0, 1, 100, 20_000, 40_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match=naming("File too large", "40,046 bytes", "ulimit -f")):
                save(tmp_path, 8, model=big, optimizer={}, documents={"state.json": state_json(step=8)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    assert is_intact(newest(tmp_path, pytest.fail), 4)


def flips(path: Path, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    content = path.read_bytes()
    for _ in range(count):
        flipped = bytearray(content)
        place = rng.randrange(len(content))
        flipped[place] ^= 1 << rng.randrange(8)
        yield f"bit flipped in byte {place}", bytes(flipped)


def other_damage(path: Path) -> Iterator[tuple[str, bytes | None]]:
    content = path.read_bytes()
    for share in (0.0, 0.25, 0.5, 0.999):
        yield f"cut to {share}", content[: int(len(content) * share)]
    yield "zeros", bytes(len(content))
    yield "longer", content + b"\n"
    yield "deleted", None
    yield "of the step before", (path.parent.parent / "step-00000004" / path.name).read_bytes()


def count_damage_detected(folder: Path, flips_a_file: int) -> int:
    """Damage every file of the newest of two checkpoints in each way: the one before must be found, exact."""
    for step in (4, 8):
        save_step(folder, step)
    rng = random.Random(0)
    cases = 0
    for path in sorted((folder / "step-00000008").iterdir()):
        content = path.read_bytes()
        for what, damaged in (*flips(path, flips_a_file, rng), *other_damage(path)):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            warnings: list[str] = []
            found = newest(folder, warnings.append)
            assert is_intact(found, 4), f"{path.name}: {what}"
            assert path.name in warnings[0] or "MANIFEST" in warnings[0]
            path.write_bytes(content)
            cases += 1
    assert is_intact(newest(folder, pytest.fail), 8)
    return cases


def test_damage_to_any_file_is_detected(tmp_path: Path) -> None:
    assert count_damage_detected(tmp_path, 5) == 5 * 13


def test_a_damaged_checkpoint_is_named_in_one_line_and_replaced_when_its_step_is_saved_again(tmp_path: Path) -> None:
    for step in (4, 8):
        save_step(tmp_path, step)
    damage(tmp_path / "step-00000008")
    warnings: list[str] = []
    assert is_intact(newest(tmp_path, warnings.append), 4)
    (warning,) = warnings
    assert re.search(r"step-00000008/state\.json\b", warning)
    assert "\n" not in warning
    save_step(tmp_path, 8)
    assert is_intact(newest(tmp_path, pytest.fail), 8)


def test_a_save_takes_no_place_that_is_filled_meanwhile(tmp_path: Path) -> None:
    def fill(disk: Disk, operation: Operation) -> None:
        if operation.kind == "rename":
            (tmp_path / "step-00000008").mkdir()
            (tmp_path / "step-00000008" / "file").touch()

    with Disk(tmp_path, fill), pytest.raises(CheckpointError, match="not empty"):
        save_step(tmp_path, 8)
    assert [path.name for path in tmp_path.rglob("*")] == ["step-00000008", "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    save_step(tmp_path, 4)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied .* --out"):
            save_step(tmp_path, 8)
    finally:
        tmp_path.chmod(0o755)
    assert is_intact(newest(tmp_path, pytest.fail), 4)


def swap(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def test_swapped_files_and_steps_are_detected(tmp_path: Path) -> None:
    one, two = save_step(tmp_path, 4), save_step(tmp_path, 8)
    swap(one / "model-00000.safetensors", two / "model-00000.safetensors")
    with pytest.raises(CheckpointError, match=naming("step-00000004", "step-00000008", "--out")):
        newest(tmp_path, ignore)
    swap(one / "model-00000.safetensors", two / "model-00000.safetensors")
    swap(one, two)
    with pytest.raises(CheckpointError, match=naming("step-00000004", "step-00000008", "--out")):
        newest(tmp_path, ignore)
