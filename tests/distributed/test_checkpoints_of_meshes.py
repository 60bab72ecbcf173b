"""One checkpoint at any mesh: it opens wherever it was written, goes on as if never left, and is exported alike."""

import errno
import os
import re
from collections import Counter
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_model
import torch
from doubles import FactoringAdafactor, NoWarnings
from ranks import model_of, on_ranks, train_on_rows
from safetensors import safe_open
from tiny_model import SOURCE, TARGET, rows

from switchcli.checkpoint import checkpoint, tensor_file
from switchcli.checkpoint.documents import DATA
from switchcli.checkpoint.model_weights import logical_tensors, meta_model
from switchcli.checkpoint.tensor_file import TensorSpec
from switchcli.convert.config import StackLengths
from switchcli.convert.to_transformers import rename_tensors, transformers_config
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import local_values
from switchcli.distributed.parallel_spec import ALONE, ParallelSpec
from switchcli.errors import CheckpointError, SwitchError
from switchcli.model.config import ModelSpec
from switchcli.model.transformer import SwitchTransformer
from switchcli.planner.step import Mesh, rank_weights
from switchcli.system import publish
from switchcli.training.checkpointer import Checkpointer
from switchcli.training.config import CheckpointSpec, TrainSpec
from switchcli.training.loss import cross_entropy
from switchcli.training.optimizer_specs import AdamW, Muon, OptimizerSpec
from switchcli.training.state import TrainState
from switchcli.training.validation import HeldOutText, evaluate, rank_batches

DOCUMENTS = {DATA: b'{"tokens_sha256": "one"}'}
OPTIMIZERS = {"adafactor": FactoringAdafactor(), "adamw": AdamW(), "muon": Muon()}
LEFT_OUT = ("data 4", "zero3 2")
MESHES = {"1": (1, ALONE), **{name: mesh for name, mesh in ranks.MESHES.items() if name not in LEFT_OUT}}
NOISY = tiny_model.NOISY.model_copy(update=tiny_model.TO_DIVIDE)
Figures = dict[str, Any]


def warn(message: str) -> None:
    raise AssertionError(message)


def going_on(
    folder: Path, steps: int, parallel: ParallelSpec, optimizer: OptimizerSpec, spec: ModelSpec = NOISY
) -> Figures:
    """Restore what is in `folder`, if anything, train up to `steps`, save. The figure found there, and that left."""
    torch.set_num_threads(1)
    context = DistributedContext("cpu", "float32", parallel)
    model, weights = model_of(spec, context)
    state, built = TrainState(), optimizer.build(weights.parameters, weights.layouts)
    settings = CheckpointSpec(save_every_steps=1, keep_last=99, keep_best=False)
    saver = Checkpointer(folder, weights, built, context, DOCUMENTS, settings)
    newest = checkpoint.newest(folder, NoWarnings().warning)
    if newest is not None:
        saver.restore(state, newest)
    held_out = rank_batches(
        HeldOutText(lambda first, count: rows(99, first, count), 8), 2, context.dp_rank, context.dp_size
    )

    def figure() -> float:
        return float(evaluate(model, cross_entropy, held_out, context)["neg_log_perplexity"].value())

    found = figure()
    if state.step < steps:
        train_on_rows(context, model, built, TrainSpec(steps=steps, batch_tokens=1), 2, state=state)
    saver.save(state)
    return {
        "found": found,
        "left": figure(),
        "held": sum(local_values(weight).numel() for weight in weights.parameters.values()),
    }


def at(mesh: str, *arguments: object) -> list[Figures]:
    world, parallel = MESHES[mesh]
    return on_ranks(world, going_on, *arguments[:2], parallel, *arguments[2:])


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights by their logical names, then the optimizer's."""
    found = checkpoint.Checkpoint.open(checkpoint.checkpoint_path(folder, step))
    return {
        name: tensor
        for group in ("model", "optimizer")
        for name, tensor in found.read(
            group, {name: on_meta(kind) for name, kind in found.tensor_specs(group).items()}
        ).items()
    }


def exported(folder: Path, step: int) -> bytes:
    """The weights of a checkpoint as `switchcli convert --to huggingface` writes them."""
    found = checkpoint.Checkpoint.open(checkpoint.checkpoint_path(folder, step))
    config, _ = transformers_config(NOISY, StackLengths(SOURCE, TARGET), found.path, torch.float32)
    with torch.device("meta"):
        wanted = logical_tensors(SwitchTransformer(NOISY))
    return tensor_file.encode(rename_tensors(config, found.read("model", wanted)))


def on_meta(kind: TensorSpec) -> torch.Tensor:
    return torch.empty(kind.shape, dtype=kind.dtype, device="meta")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("optimizer", "meshes"),
    [
        pytest.param("adafactor", ("1", "expert 2", "zero3 4, expert 2", "model 2", "zero2 2", "1"), id="some meshes"),
        pytest.param("adafactor", MESHES, id="all meshes", marks=pytest.mark.nightly),
        pytest.param("adamw", MESHES, id="all meshes by adamw", marks=pytest.mark.nightly),
        pytest.param("muon", MESHES, id="all meshes by muon", marks=pytest.mark.nightly),
    ],
)
def test_a_run_goes_from_mesh_to_mesh(optimizer: str, meshes: Collection[str], tmp_path: Path) -> None:
    """The meshes in turn, two steps each, against one process all along."""
    left = None
    for turn, mesh in enumerate(meshes, 1):
        alone = going_on(tmp_path / "alone", 2 * turn, ALONE, OPTIMIZERS[optimizer])
        for one in at(mesh, tmp_path / "moved", 2 * turn, OPTIMIZERS[optimizer]):
            assert one["found"] == pytest.approx(one["found"] if left is None else left, abs=1e-6)
            assert one["left"] == pytest.approx(alone["left"], abs=1e-5)
        left = one["left"]
    last = 2 * len(meshes)
    assert tensors(tmp_path / "moved", last).keys() == tensors(tmp_path / "alone", last).keys()


SOME = ("expert 2", "model 2", "zero3 4, expert 2")


@pytest.mark.unit("a mesh")
@pytest.mark.parametrize(
    "meshes",
    [("model 2",), SOME, pytest.param([*MESHES], marks=pytest.mark.nightly)],
    ids=["a mesh", "some meshes", "all meshes"],
)
def test_what_is_read_and_written_again_at_another_mesh_is_the_same(meshes: Collection[str], tmp_path: Path) -> None:
    going_on(tmp_path, 2, ALONE, OPTIMIZERS["adafactor"])
    before, export = tensors(tmp_path, 2), exported(tmp_path, 2)
    for mesh in meshes:
        world, parallel = MESHES[mesh]
        own = rank_weights(dict(meta_model(NOISY).named_parameters()), {}, parallel.model)
        planned = Mesh(world // parallel.model, parallel.expert, parallel.model, parallel.shard)
        divided = own.expert_shards(planned)
        assert divided == (1 if parallel.shard == "none" else planned.replicas)
        experts = own.expert // parallel.expert // divided
        numbers = [one["held"] - experts for one in at(mesh, tmp_path, 2, OPTIMIZERS["adafactor"])]
        if parallel.shard == "none":
            assert set(numbers) == {own.dense}
        else:
            assert sum(numbers) == own.dense * parallel.model  # all shards of all parts
            assert max(numbers) == numbers[0] == own.dense_shard(planned)[0]
        again = tensors(tmp_path, 2)
        assert before.keys() == again.keys()
        assert all(torch.equal(before[name], again[name]) for name in before)
        assert exported(tmp_path, 2) == export
        assert len([*tmp_path.glob("step-00000002/model-*")]) == world  # each wrote its share
        files = [safe_open(file, "pt") for file in tmp_path.glob("step-00000002/*.safetensors")]
        assert Counter(chain.from_iterable(file.keys() for file in files)) == Counter(
            {*before}
        )  # none was written twice
    opened = logical_tensors(SwitchTransformer(NOISY))
    assert opened.keys() == {name for name in before if "/" not in name}


@pytest.mark.integration
def test_experts_of_which_each_replica_has_a_part_are_whole_in_a_checkpoint(tmp_path: Path) -> None:
    """Two replicas cannot divide three experts."""
    three = NOISY.model_copy(update={"num_experts": 3})
    for steps, shard in ((2, "zero2"), (4, "zero3")):
        parallel = ParallelSpec(shard=shard)  # type: ignore[arg-type] # of the two names above
        alone = going_on(tmp_path / "alone", steps, ALONE, OPTIMIZERS["adamw"], three)
        for one in on_ranks(2, going_on, tmp_path / "moved", steps, parallel, OPTIMIZERS["adamw"], three):
            assert one["left"] == pytest.approx(alone["left"], abs=1e-5)
        whole, parts = (tensors(tmp_path / folder, steps) for folder in ("alone", "moved"))
        assert {name: one.shape for name, one in whole.items()} == {name: one.shape for name, one in parts.items()}
        assert all(torch.allclose(whole[name], parts[name], rtol=0, atol=1e-5) for name in whole if "/" not in name)
    left = one["left"]
    assert going_on(tmp_path / "moved", 4, ALONE, OPTIMIZERS["adamw"], three)["found"] == pytest.approx(left, abs=1e-6)


@pytest.mark.integration
def test_a_checkpoint_of_other_experts_is_refused_on_every_rank(tmp_path: Path) -> None:
    going_on(tmp_path, 2, ALONE, OPTIMIZERS["adafactor"])
    for said in on_ranks(2, refused, tmp_path, NOISY.model_copy(update={"num_experts": 8})):
        assert re.search(r"num_experts\b.*checkpoint\b[^,]* 0\.\.3\b.*recipe\b[^,]* 0\.\.7\b", said)


@pytest.mark.integration
@pytest.mark.parametrize("full_on", [0, 1])
def test_a_full_disk_of_one_rank_ends_both_and_keeps_the_checkpoint_before(full_on: int, tmp_path: Path) -> None:
    going_on(tmp_path, 1, ALONE, OPTIMIZERS["adafactor"])
    main, other = on_ranks(2, saved_with_a_full_disk, tmp_path, full_on)
    assert main[0] == ("CheckpointError", "RankError")[full_on]
    assert "No space left on device" in main[1]
    assert other[0] == "OtherRankError"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def saved_with_a_full_disk(folder: Path, full_on: int) -> tuple[str, str]:
    """Return kind and words of the error of a save on two ranks, one of which has no room for its files."""

    def refuse(path: Path, content: bytes | memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if int(os.environ["RANK"]) == full_on:
        publish.write_new = refuse
    try:
        going_on(folder, 2, ParallelSpec(), OPTIMIZERS["adafactor"])
    except SwitchError as error:
        return type(error).__name__, str(error)
    return "", ""


def refused(folder: Path, spec: ModelSpec) -> str:
    try:
        going_on(folder, 2, ParallelSpec(expert=2), OPTIMIZERS["adafactor"], spec)
    except CheckpointError as error:
        return str(error)
    return "taken"
