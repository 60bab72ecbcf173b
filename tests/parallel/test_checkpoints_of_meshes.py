"""One checkpoint at any mesh: it opens wherever it was written, goes on as if never left, and is exported alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny import NOISY, SOURCE, TARGET, rows

from switchcli.errors import CheckpointError
from switchcli.interop.config import Lengths
from switchcli.interop.express import express, translate
from switchcli.model.count import count
from switchcli.model.initialise import initialise
from switchcli.model.spec import ModelSpec
from switchcli.model.transformer import SwitchTransformer
from switchcli.parallel.mesh import ALONE, ParallelSpec
from switchcli.parallel.runtime import Runtime
from switchcli.parallel.signals import StopRequest
from switchcli.train import checkpoint, tensor_file
from switchcli.train.evaluate import evaluate, shared
from switchcli.train.loop import fit
from switchcli.train.microbatches import Microbatches
from switchcli.train.objective import cross_entropy
from switchcli.train.optimizer import Adafactor, AdamW, OptimizerSpec
from switchcli.train.saver import DATA, Saver, logical_tensors
from switchcli.train.schedule import InverseSquareRoot
from switchcli.train.spec import CheckpointSpec, TrainSpec
from switchcli.train.state import TrainState
from switchcli.train.tensor_file import Kind

DOCUMENTS = {DATA: b'{"tokens_sha256": "one"}'}
OPTIMIZERS = {"adafactor": Adafactor(min_dim_to_factor=8), "adamw": AdamW()}
MESHES = {"1": (1, 1), "2": (2, 1), "2, experts on 2": (2, 2), "4, experts on 2": (4, 2), "4, experts on 4": (4, 4)}
Figures = dict[str, Any]


def warn(message: str) -> None:
    raise AssertionError(message)


def going_on(
    folder: Path, steps: int, parallel: ParallelSpec, optimizer: OptimizerSpec, spec: ModelSpec = NOISY
) -> Figures:
    """Restore what is in `folder`, if anything, train up to `steps`, save. The figure found there, and that left."""
    torch.set_num_threads(1)
    runtime = Runtime("cpu", "float32", parallel)
    model = SwitchTransformer(spec)
    runtime.spread(model)
    initialise(model, 0)
    state, built = TrainState(), optimizer.build(dict(model.named_parameters()))
    settings = CheckpointSpec(save_every_steps=1, keep_last=9, keep_best=False)
    saver = Saver(folder, model, built, runtime, DOCUMENTS, settings)
    saver.restore(state, warn)
    held_out = shared(lambda first, count: rows(99, first, count), 8, 2, runtime.rank, runtime.world)

    def figure() -> float:
        return float(evaluate(model, cross_entropy, held_out, runtime)["neg_log_perplexity"].value())

    found = figure()
    if state.step < steps:
        fit(
            state,
            runtime.wrap(model),
            lambda step: cross_entropy,
            Microbatches(rows, 8, 2, 1, runtime.rank, runtime.world),
            built,
            InverseSquareRoot(),
            runtime,
            [],
            TrainSpec(steps=steps, batch_tokens=1),
            StopRequest(),
        )
    saver.save(state)
    return {"found": found, "left": figure(), "held": sum(weight.numel() for weight in model.parameters())}


def at(mesh: str, *arguments: object) -> list[Figures]:
    world, expert = MESHES[mesh]
    return on_ranks(world, going_on, *arguments[:2], ParallelSpec(expert=expert), *arguments[2:])


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights by their logical names, then the optimizer's."""
    found = checkpoint.Checkpoint.open(checkpoint.path(folder, step))
    return {
        name: tensor
        for group in ("model", "optimizer")
        for name, tensor in found.read(
            group, {name: on_meta(kind) for name, kind in found.kinds(group).items()}
        ).items()
    }


def exported(folder: Path, step: int) -> bytes:
    """The weights of a checkpoint as `switchcli convert --to huggingface` writes them."""
    found = checkpoint.Checkpoint.open(checkpoint.path(folder, step))
    config, _ = express(NOISY, Lengths(SOURCE, TARGET), found.path, torch.float32)
    with torch.device("meta"):
        wanted = logical_tensors(SwitchTransformer(NOISY))
    return tensor_file.encode(translate(config, found.read("model", wanted)))


def on_meta(kind: Kind) -> torch.Tensor:
    return torch.empty(kind.shape, dtype=kind.dtype, device="meta")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_from_mesh_to_mesh(optimizer: str, tmp_path: Path) -> None:
    """Five meshes in turn, two steps each, against one process all along."""
    left = None
    for turn, mesh in enumerate(MESHES, 1):
        alone = going_on(tmp_path / "alone", 2 * turn, ALONE, OPTIMIZERS[optimizer])
        for one in at(mesh, tmp_path / "moved", 2 * turn, OPTIMIZERS[optimizer]):
            assert one["found"] == pytest.approx(one["found"] if left is None else left, abs=1e-6)
            assert one["left"] == pytest.approx(alone["left"], abs=1e-5)
        left = one["left"]
    assert tensors(tmp_path / "moved", 10).keys() == tensors(tmp_path / "alone", 10).keys()


@pytest.mark.slow
def test_what_is_read_and_written_again_at_another_mesh_is_the_same(tmp_path: Path) -> None:
    going_on(tmp_path, 2, ALONE, OPTIMIZERS["adafactor"])
    before, export = tensors(tmp_path, 2), exported(tmp_path, 2)
    sizes = count(NOISY)
    for mesh, (world, expert) in MESHES.items():
        for one in at(mesh, tmp_path, 2, OPTIMIZERS["adafactor"]):
            assert one["held"] == sizes.dense + sizes.expert // expert
        again = tensors(tmp_path, 2)
        assert before.keys() == again.keys()
        assert all(torch.equal(before[name], again[name]) for name in before)
        assert exported(tmp_path, 2) == export
        assert len([*tmp_path.glob("step-00000002/model-*")]) == world  # each wrote its share
    opened = logical_tensors(SwitchTransformer(NOISY))
    assert opened.keys() == {name for name in before if "/" not in name}


@pytest.mark.slow
def test_a_checkpoint_of_other_experts_is_refused_on_every_rank(tmp_path: Path) -> None:
    going_on(tmp_path, 2, ALONE, OPTIMIZERS["adafactor"])
    for said in on_ranks(2, refused, tmp_path, NOISY.model_copy(update={"num_experts": 8})):
        assert "num_experts: the checkpoint has experts 0..3, the recipe experts 0..7" in said


def refused(folder: Path, spec: ModelSpec) -> str:
    try:
        going_on(folder, 2, ParallelSpec(expert=2), OPTIMIZERS["adafactor"], spec)
    except CheckpointError as error:
        return str(error)
    return "taken"
