"""Checkpoints: what is saved is what is read, in every kind of tensor, and what must not be read is refused."""

import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from messages import naming
from tiny_checkpoint import MODEL, OPTIMIZER, equal, numbered, reseal, save_step, state_json, wanted
from torch import Tensor

from switchcli.checkpoint import checkpoint as checkpoints
from switchcli.checkpoint import manifest as manifests
from switchcli.checkpoint import tensor_file
from switchcli.checkpoint.checkpoint import Checkpoint, newest, preflight, prune, save
from switchcli.checkpoint.manifest import DamagedError
from switchcli.errors import CheckpointError, NumericsError
from switchcli.system import publish
from switchcli.system.user_files import open_regular


def fail(text: str) -> None:
    raise AssertionError(text)


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    path = save_step(tmp_path, 4)
    assert path == checkpoints.checkpoint_path(tmp_path, 4) == tmp_path / "step-00000004"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    checkpoint = newest(tmp_path, fail)
    assert checkpoint is not None
    assert checkpoint.step == 4
    assert checkpoint.document("recipe.yaml") == b"step: 4\n"
    assert equal(checkpoint.read("model", wanted(MODEL)), numbered(MODEL, 4))
    assert equal(checkpoint.read("optimizer", wanted(OPTIMIZER)), numbered(OPTIMIZER, 4))
    assert list(checkpoint.read("model", wanted(MODEL))) == list(MODEL)
    with pytest.raises(CheckpointError, match=naming("tokenizer.json")) as caught:
        checkpoint.document("tokenizer.json")
    assert not isinstance(caught.value, DamagedError)


def test_the_library_reads_the_files_and_nothing_else_is_in_the_folder(tmp_path: Path) -> None:
    path = save_step(tmp_path, 4)
    read = safetensors.torch.load_file(path / "model-00000.safetensors")
    assert equal(read, numbered(MODEL, 4))
    assert sorted(p.name for p in path.iterdir()) == [
        "MANIFEST",
        "model-00000.safetensors",
        "optimizer-00000.safetensors",
        "recipe.yaml",
        "state.json",
    ]


DTYPES = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8]
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    tensor = torch.randint(0, 256, shape).to(draw(DTYPES))
    return tensor.transpose(0, -1) if draw(st.booleans()) and shape else tensor


@settings(deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=9).filter(lambda name: name != "__metadata__"), tensors(), max_size=5)
)
def test_any_tensors_are_encoded_as_by_the_library(named: dict[str, Tensor]) -> None:
    encoded = bytes(tensor_file.encode(named))
    assert equal(safetensors.torch.load(encoded), named)
    contiguous = {name: tensor.contiguous() for name, tensor in named.items()}
    assert encoded == safetensors.torch.save(contiguous)
    assert tensor_file.encode(named, {"format": "pt"}) == safetensors.torch.save(contiguous, {"format": "pt"})


def test_tensors_are_spread_over_files_of_bounded_size() -> None:
    named = {
        name: torch.zeros(size, dtype=torch.uint8) for name, size in {"a": 3, "b": 9, "c": 2, "d": 2, "e": 1}.items()
    }
    assert [list(shard) for shard in tensor_file.group_by_bytes(named, 4)] == [["a"], ["b"], ["c", "d"], ["e"]]
    assert list(tensor_file.group_by_bytes({}, 4)) == []


def test_files_of_several_ranks_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    in_threes = tensor_file.group_by_bytes
    monkeypatch.setattr(tensor_file, "group_by_bytes", lambda tensors, _: in_threes(tensors, 3))
    tensors = {name: torch.zeros(3, dtype=torch.uint8) for name in "abc"}
    names = [name for rank in range(2) for name, _ in checkpoints.encode_files(tensors, {}, rank, 2)]
    assert sorted(names) == [f"model-{number:05}.safetensors" for number in range(6)]


def test_a_step_is_saved_again_in_place_of_the_first(tmp_path: Path) -> None:
    save_step(tmp_path, 4)
    path = save(tmp_path, 4, model={"a": torch.ones(1)}, optimizer={}, documents={"state.json": state_json(step=4)})
    assert torch.equal(Checkpoint.open(path).read("model", {"a": torch.ones(1)})["a"], torch.ones(1))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_may_be_copied_under_any_name_but_another_step(tmp_path: Path) -> None:
    path = save_step(tmp_path, 4)
    assert Checkpoint.open(path.rename(tmp_path / "mine")).step == 4
    (tmp_path / "mine").rename(tmp_path / "step-00000008")
    with pytest.raises(DamagedError, match=naming("step-00000008", "step 4")):
        Checkpoint.open(tmp_path / "step-00000008")


@pytest.mark.parametrize(
    ("change", "key", "held", "wants"),
    [
        ({"embed.weight": torch.empty(4, 4)}, "embed.weight", "float32 [4, 3]", "float32 [4, 4]"),
        (
            {"embed.weight": torch.empty(4, 3, dtype=torch.bfloat16)},
            "embed.weight",
            "float32 [4, 3]",
            "bfloat16 [4, 3]",
        ),
        ({"head.weight": torch.empty(1)}, "head.weight", "", "float32 [1]"),
        ({"embed.weight": None}, "embed.weight", "float32 [4, 3]", ""),
        ({"ff.experts.2.wi": torch.empty(3, 2)}, "num_experts", "0..1", "0..2"),
        ({"ff.experts.0.wi": None, "ff.experts.1.wi": None}, "num_experts", "0..1", ""),
    ],
)
def test_another_architecture_is_refused_by_its_first_key(
    tmp_path: Path, change: dict[str, Tensor | None], key: str, held: str, wants: str
) -> None:
    checkpoint = Checkpoint.open(save_step(tmp_path, 4))
    other = {name: tensor for name, tensor in (wanted(MODEL) | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=naming(key, "--out")) as caught:
        checkpoint.read("model", other)
    for whose, what in (("checkpoint", held), ("recipe", wants)):
        assert re.search(rf"{whose}\b[^,]* {re.escape(what)}", str(caught.value))
    assert not isinstance(caught.value, DamagedError)
    assert "\n" not in str(caught.value)


def test_some_of_a_group_are_read_and_still_must_be_what_was_saved(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_step(tmp_path, 4))
    some = {name: tensor for name, tensor in wanted(OPTIMIZER).items() if "norm" not in name}
    found = checkpoint.read("optimizer", some, allow_extra=True)
    assert equal(found, {name: tensor for name, tensor in numbered(OPTIMIZER, 4).items() if name in some})
    assert checkpoint.tensor_specs("optimizer") == {name: tensor_file.tensor_spec(t) for name, t in OPTIMIZER.items()}
    with pytest.raises(CheckpointError, match=naming("optimizer", "norm.weight/empty")):
        checkpoint.read("optimizer", some)
    for other in ({"embed.weight/row": torch.empty(5)}, {"embed.weight/momentum": torch.empty(4)}):
        with pytest.raises(CheckpointError, match=r"optimizer: embed\.weight/.*: another way\.$"):
            checkpoint.read("optimizer", some | other, allow_extra=True, fix="another way.")


def test_a_file_that_is_removed_while_it_is_opened_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that prunes removes it; the library opens it once for its header and again for its tensors."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(tensor_file.encode({"weight": torch.ones(2)}))

    def removed(*arguments: object, **named: object) -> object:
        path.unlink()
        return safetensors.safe_open(*arguments, **named)

    monkeypatch.setattr(tensor_file, "safe_open", removed)
    assert [*tensor_file.read_tensor_specs(path)] == ["weight"]
    with pytest.raises(FileNotFoundError):
        tensor_file.read_tensor_specs(path)


def test_a_reader_leaves_a_run_at_work_alone(tmp_path: Path) -> None:
    save_step(tmp_path, 4)
    publish.make_folder(publish.temporary_path(checkpoints.checkpoint_path(tmp_path, 12)) / "new")
    (save_step(tmp_path, 8) / "state.json").unlink()
    before = sorted(tmp_path.iterdir())
    warnings: list[str] = []
    found = newest(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 4
    assert len(warnings) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_reader_never_meets_half_a_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    failures: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                if newest(tmp_path, failures.append) is None:
                    failures.append("none")
            except CheckpointError as error:
                failures.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(2, 12):
        save_step(tmp_path, step)
        prune(tmp_path, step, 2, keep_best=False)
    done.set()
    reader.join()
    assert failures == []


def test_a_listing_that_missed_what_was_saved_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is not listed in one piece: all that is listed may be pruned by the time that it is looked at."""
    save_step(tmp_path, 1)
    look = checkpoints.saved_checkpoints
    listings = [[], look(tmp_path)]
    monkeypatch.setattr(checkpoints, "saved_checkpoints", lambda folder: listings.pop(0) if listings else look(folder))
    found = newest(tmp_path, fail)
    assert found is not None
    assert found.step == 1


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, held_out in {1: None, 2: -3.0, 3: -1.0, 4: -1.5, 5: None, 6: -2.0}.items():
        save_step(tmp_path, step, None if held_out is None else {"score": held_out})
    prune(tmp_path, 6, 2, keep_best=True)
    assert steps(tmp_path) == [3, 5, 6]
    prune(tmp_path, 6, 1, keep_best=False)
    assert steps(tmp_path) == [6]
    prune(tmp_path, 6, 3, keep_best=True)
    assert steps(tmp_path) == [6]
    prune(tmp_path / "absent", 6, 2, keep_best=True)


def test_named_steps_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_step(tmp_path, step)
        prune(tmp_path, step, 1, (2, 3, 99), keep_best=False)
    assert steps(tmp_path) == [2, 3, 6]
    prune(tmp_path, 6, 1, (3,), keep_best=False)
    assert steps(tmp_path) == [3, 6]


def test_a_checkpoint_that_is_a_link_is_not_pruned(tmp_path: Path) -> None:
    save_step(tmp_path / "elsewhere", 1)
    folder = tmp_path / "checkpoints"
    for step in (2, 3):
        save_step(folder, step)
    checkpoints.checkpoint_path(folder, 1).symlink_to(checkpoints.checkpoint_path(tmp_path / "elsewhere", 1))
    prune(folder, 3, 1, keep_best=False)
    assert steps(folder) == [1, 3]
    assert steps(tmp_path / "elsewhere") == [1]


def test_the_best_is_one_that_was_evaluated(tmp_path: Path) -> None:
    for step in (100, 150, 200, 250, 300):
        save_step(tmp_path, step, {"score": -1.0}, evaluated_step=100)
        prune(tmp_path, step, 2, keep_best=True)
    assert steps(tmp_path) == [100, 250, 300]


def test_the_best_by_each_figure_is_kept(tmp_path: Path) -> None:
    scores = {1: (9.0, 1.0), 2: (3.0, 7.0), 3: (9.0, 2.0), 4: (1.0, 6.5), 5: (0.0, 0.0), 6: (0.0, 0.0)}
    for step, (cola, rte) in scores.items():
        save_step(tmp_path, step, {"cola": cola, "rte": rte, **({"once": 1.0} if step == 4 else {})})
    prune(tmp_path, 6, 1, keep_best=True)
    assert steps(tmp_path) == [2, 3, 4, 6]  # of equals the newest
    prune(tmp_path, 6, 1, keep_best=False)
    assert steps(tmp_path) == [6]


def test_a_link_to_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 4)
    (tmp_path / "step-00000008").symlink_to(tmp_path / "absent")
    found = newest(tmp_path, fail)
    assert found is not None
    assert found.step == 4


def test_pruning_counts_only_what_can_be_read(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    (tmp_path / "step-00000003" / "MANIFEST").unlink()
    prune(tmp_path, 4, 2, keep_best=False)
    assert steps(tmp_path) == [2, 3, 4]


def test_damaged_checkpoints_of_later_steps_take_no_place_of_those_that_a_run_saves_again(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save_step(tmp_path, step)
    for step in (8, 12):
        (checkpoints.checkpoint_path(tmp_path, step) / "model-00000.safetensors").write_bytes(b"")
    save_step(tmp_path, 6)  # a run that has resumed from step 4 is stopped
    prune(tmp_path, 6, 2, keep_best=False)
    assert steps(tmp_path) == [4, 6, 8, 12]
    for step in (8, 12, 16):
        save_step(tmp_path, step)
        prune(tmp_path, step, 2, keep_best=False)
    assert steps(tmp_path) == [12, 16]


def test_steps_beyond_eight_digits_are_still_in_order(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save_step(tmp_path, step)
    found = newest(tmp_path, fail)
    assert found is not None
    assert found.step == 100_000_000


def test_preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        preflight(tmp_path / "run", 1000)
        assert not (tmp_path / "run").exists()
        with pytest.raises(CheckpointError, match="1,001 bytes"):
            preflight(tmp_path / "run", 1001)
    with pytest.raises(CheckpointError, match=naming(str(tmp_path / "run"), "1,000,000,000,000,000 bytes", "--out")):
        preflight(tmp_path / "run", 10**15)


@pytest.mark.parametrize("target", ["state.json", "model-00000.safetensors", "MANIFEST"])
def test_links_pipes_and_folders_are_not_read(tmp_path: Path, target: str) -> None:
    path = save_step(tmp_path, 4)
    file = path / target
    file.rename(tmp_path / "elsewhere")
    for make in (lambda: file.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(file)):
        make()
        with pytest.raises(DamagedError, match=target):
            Checkpoint.open(path)
        file.unlink()
    file.mkdir()
    with pytest.raises(DamagedError, match=target):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("file", "call", "number", "is_damage"),
    [
        ("state.json", "open", errno.EIO, True),
        ("model-00000.safetensors", "read", errno.EIO, True),
        ("MANIFEST", "read", errno.EIO, True),
        ("model-00000.safetensors", "open", errno.ENOENT, True),
        ("state.json", "open", errno.ELOOP, True),
        ("model-00000.safetensors", "read", errno.EINVAL, True),
        ("MANIFEST", "open", errno.EACCES, False),
        ("state.json", "read", errno.EMFILE, False),
        ("model-00000.safetensors", "open", errno.ENOMEM, False),
        ("model-00000.safetensors", "read", errno.ESTALE, False),
    ],
)
def test_a_sector_that_cannot_be_read_is_damage_and_a_machine_that_refuses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_damage: bool, call: str, file: str
) -> None:
    save_step(tmp_path, 4)
    path, warnings = save_step(tmp_path, 8), []

    class Stream(io.FileIO):
        def refuse(self, *arguments: object) -> Any:
            raise OSError(number, os.strerror(number))

        read = readinto = readall = refuse  # type: ignore[assignment]

    def open_or_refuse(name: Path, *arguments: Any, **settings: Any) -> Any:
        if name != path / file:
            return open_regular(name, *arguments, **settings)
        if call == "open":
            raise OSError(number, os.strerror(number))
        return Stream(name)

    monkeypatch.setattr(manifests, "open_regular", open_or_refuse)
    if not is_damage:
        with pytest.raises(CheckpointError, match=naming(file, os.strerror(number), "make it readable")) as raised:
            newest(tmp_path, warnings.append)
        assert not isinstance(raised.value, DamagedError)
        return
    found = newest(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 4
    assert file in warnings[0]


def test_files_that_the_manifest_does_not_name_are_ignored(tmp_path: Path) -> None:
    path = save_step(tmp_path, 4)
    (path / "model-00009.safetensors").write_bytes(b"garbage")
    assert equal(Checkpoint.open(path).read("model", wanted(MODEL)), numbered(MODEL, 4))


UNSOUND_TENSORS = (
    b"",
    b"garbage",
    (1 << 40).to_bytes(8, "little") + b"{}",
    b"\x02" + b"\x00" * 7 + b"{}" + b"trailing",
    tensor_file.encode({"embed.weight": torch.ones(4, 3)}),  # which another file has
    safetensors.torch.save({"x": torch.ones(1, dtype=torch.int16)}),
)
UNSOUND_STATES = (
    *(b"", b"[]", b"nonsense", b"[" * 100_000, b"\xff", b"{}", b'{"step": 4, "seconds": 0.0}'),
    *(state_json(step=step) for step in (3, "4", 1e400, -4, None, True)),
    *(state_json(step=4, targets_seen=targets) for targets in (-1, 2**63, 1.5, None)),
    *(state_json(step=4, seconds=seconds) for seconds in (-1.0, 1e10, "1", math.inf)),
    *(state_json(step=4, eval_metrics=metrics) for metrics in ([1], {"a": math.nan}, {"a": "1"})),
    *(state_json(step=4, best=best) for best in ([1], {"a": [1.0]}, {"a": [1.0, -1]}, {"a": [1.0, 5]})),
    *(state_json(step=4, branch=branch) for branch in ([-1, 0, 0, True], [0, -1, 0, True], [5, 0, 0, True])),
    *(
        state_json(step=4, metrics_since_log={"loss": loss})
        for loss in ([1], [1, [2]], [[1, 2], [1]], [[[1], [1, 2]], 1])
    ),
    *(state_json(step=4, skipped_steps=[skipped]) for skipped in (5, -1, [1])),
    *(state_json(step=4, evaluated_step=5), state_json(step=4, position=[-1])),
)


def with_names(*names: str) -> str:
    """The text of a manifest of files of these names."""
    files = [{"bytes": 1, "name": name, "sha256": "0" * 64} for name in names]
    return json.dumps({"files": files, "format": "switchcli checkpoint 1", "step": 4}, separators=(",", ":"))


SOUND = with_names("a")
UNSOUND_MANIFESTS = (
    *("[]", "1", "", "{", '{"a": 1}'),
    *map(with_names, ("../step-00000002/state.json", "/etc/passwd", ".hidden", "", "a\n", "ä")),
    *(SOUND.replace("4", '"4"'), SOUND.replace("4", "-4"), SOUND.replace("1,", "1.5,")),
)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("model-00001.safetensors", content) for content in UNSOUND_TENSORS),
        *(("state.json", content) for content in UNSOUND_STATES),
        *(
            ("MANIFEST", f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode())
            for text in UNSOUND_MANIFESTS
        ),
    ],
)
def test_what_no_run_wrote_is_damage_though_it_is_sealed(tmp_path: Path, file: str, content: bytes) -> None:
    path = save_step(tmp_path, 4)
    (path / file).write_bytes(content)
    if file != "MANIFEST":
        reseal(path)
    with pytest.raises(DamagedError, match=file):
        Checkpoint.open(path).read("model", wanted(MODEL))


@pytest.mark.parametrize(
    "state",
    [
        {"best": {"a": [1.0, 4]}, "evaluated_step": 4, "skipped_steps": [1, 4], "branch": [4, 0, -8, True]},
        {"metrics_since_log": {"loss": [1.0, 2], "load": [[[1], [2]], 3], "each": [[1, 2], [3, 4]]}, "seconds": 9.9e9},
        {"of_a_later_version": 1},
    ],
)
def test_a_state_at_its_limits_is_read(tmp_path: Path, state: dict[str, Any]) -> None:
    path = save_step(tmp_path, 4)
    (path / "state.json").write_bytes(state_json(step=4, **state))
    reseal(path)
    assert Checkpoint.open(path).step == 4


@pytest.mark.parametrize(
    ("group", "value", "dtype"),
    [
        ("model", math.nan, torch.float32),
        ("model", -math.inf, torch.bfloat16),
        ("optimizer", math.inf, torch.float64),
    ],
)
def test_a_number_that_is_not_finite_is_refused_where_it_is_read(
    tmp_path: Path, group: checkpoints.TensorGroup, value: float, dtype: torch.dtype
) -> None:
    tensors = {
        "sound": torch.full((3,), torch.finfo(dtype).max, dtype=dtype),
        "empty": torch.ones(0),
        "ids": torch.ones(2, dtype=torch.int64),
    }
    bad_AB = torch.zeros(4, 5, dtype=dtype)
    bad_AB[2, 4] = value
    groups = {"model": {}, "optimizer": {}} | {group: tensors | {"bad": bad_AB}}
    save(tmp_path, 1, **groups, documents={"state.json": state_json(step=1)})
    read = Checkpoint.open(tmp_path / "step-00000001").read(group, wanted(groups[group]))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    for access in (lambda: read["bad"], lambda: read.read_slice("bad", (slice(2, 3), slice(0, 5)))):
        with pytest.raises(NumericsError, match=naming("step-00000001", f"{group}-00000.safetensors", "bad", "NaN")):
            access()
    assert torch.equal(read.read_slice("bad", (slice(0, 2), slice(0, 5))), bad_AB[:2])  # a rank reads its part alone


def test_a_checkpoint_of_a_later_version_is_refused_and_not_called_damaged(tmp_path: Path) -> None:
    path = save_step(tmp_path, 4)
    text = (path / "MANIFEST").read_text().splitlines()[0].replace("switchcli checkpoint 1", "switchcli checkpoint 2")
    (path / "MANIFEST").write_text(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
    with pytest.raises(
        CheckpointError, match=naming("MANIFEST", "switchcli checkpoint 1", "switchcli checkpoint 2")
    ) as caught:
        Checkpoint.open(path)
    assert not isinstance(caught.value, DamagedError)


def test_what_was_found_is_read_to_the_end_when_the_run_removes_it_meanwhile(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    found = newest(tmp_path, print)
    assert found is not None
    tensors = found.read("model", wanted(MODEL))
    shutil.rmtree(found.path)
    assert equal(dict(tensors), numbered(MODEL, 1))
    with pytest.raises(FileNotFoundError):
        found.read("model", wanted(MODEL))
