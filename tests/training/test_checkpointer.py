"""Checkpointer: weights, optimizer and state come back bit by bit, window included, for sparse and dense models."""

import math
from pathlib import Path

import pytest
import torch
from checkpointed_run import DOCUMENTS, Parts, assert_equal
from doubles import FactoringAdafactor
from messages import naming
from tiny_model import DENSE, NOISY, SPARSE, a_model

from switchcli.checkpoint import checkpoint, tensor_names
from switchcli.checkpoint.model_weights import load_weights, logical_tensors
from switchcli.distributed.layout import unsharded_weights
from switchcli.errors import CheckpointError, NumericsError
from switchcli.model.config import ModelSpec
from switchcli.model.trainable import trainable_members
from switchcli.model.trainable_sets import TrainableSet
from switchcli.training.checkpointer import load_optimizer_state, preflight
from switchcli.training.config import CheckpointSpec
from switchcli.training.optimizer_specs import Adafactor, AdamW, Muon, OptimizerSpec
from switchcli.training.state import TrainState

GEGLU = SPARSE.model_copy(update={"activation": "geglu"})


FACTORED = FactoringAdafactor()


@pytest.mark.parametrize(
    ("spec", "group", "optimizer"),
    [
        (NOISY, "all", FACTORED),
        (DENSE, "all", AdamW()),
        (NOISY, "expert", AdamW()),
        (NOISY, "all", Muon()),
        (GEGLU, "dense_feed_forward", Adafactor()),
    ],
)
def test_what_is_saved_comes_back_and_goes_on_as_if_never_left(
    spec: ModelSpec, group: TrainableSet, optimizer: OptimizerSpec, tmp_path: Path
) -> None:
    before = Parts(tmp_path, spec, optimizer, seed=0, group=group)
    before.train(1)
    before.state.record_evaluation({"cola": -1.25, "rte": 81.0})
    before.saver.save(before.state)
    after = Parts(tmp_path, spec, optimizer, seed=1, group=group)
    after.restore()
    assert_equal(before, after)
    assert after.state.seconds == before.state.seconds
    before.train(2)
    after.train(2)
    assert_equal(before, after)


def test_a_number_that_is_lost_is_not_saved(tmp_path: Path) -> None:
    """No gradient tells of it in the step in which it is lost, and the loop is content."""
    parts = Parts(tmp_path, NOISY, AdamW(), seed=0)
    parts.train(1)
    parts.saver.save(parts.state)
    name, moment = next(
        (name, slot) for name, slot in parts.optimizer.state().items() if name.endswith("wi/exp_avg_sq")
    )
    moment[2, 0, 0] = math.inf
    parts.train(2)
    with pytest.raises(NumericsError, match=naming("step 2", name.replace("wi", "2.wi"), "rank 0")):
        parts.saver.save(parts.state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_has_every_weight_its_documents_and_the_optimizer_of_the_weights_that_learn(
    tmp_path: Path,
) -> None:
    parts, found = saved(tmp_path, AdamW(), "expert")
    learning, start = trainable_members(parts.model, "expert"), a_model(NOISY, seed=0)
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, parts.model.get_parameter(name)) != (name in learning), name
    assert {name: found.document(name) for name in DOCUMENTS} == DOCUMENTS
    load_weights(unsharded_weights(start), found.read("model", logical_tensors(start)))
    for ours, theirs in zip(start.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    slots = tensor_names.split_experts(parts.optimizer.state(), range(NOISY.num_experts))
    assert found.read("optimizer", slots).keys() == slots.keys()
    assert {name.rpartition("/")[0] for name in parts.optimizer.state()} == learning.keys()
    other = Parts(tmp_path, NOISY, AdamW(), seed=0)
    with pytest.raises(CheckpointError, match=r"\boptimizer\b.*/step\b.*--out"):
        other.restore()


def saved(folder: Path, optimizer: OptimizerSpec, group: TrainableSet = "all") -> tuple[Parts, checkpoint.Checkpoint]:
    parts = Parts(folder, NOISY, optimizer, seed=0, group=group)
    parts.train(1)
    parts.saver.save(parts.state)
    return parts, checkpoint.Checkpoint.open(folder / "step-00000001")


@pytest.mark.parametrize(("optimizer", "group"), [(FACTORED, "all"), (FACTORED, "expert"), (AdamW(), "non_expert")])
def test_the_optimizer_is_carried_over_for_the_parameters_that_learn(
    optimizer: OptimizerSpec, group: TrainableSet, tmp_path: Path
) -> None:
    before, found = saved(tmp_path, optimizer)
    after = Parts(tmp_path / "other", NOISY, optimizer, seed=1, group=group)
    load_optimizer_state(after.optimizer, found, range(NOISY.num_experts))
    ours, theirs = after.optimizer.state(), before.optimizer.state()
    learning = trainable_members(after.model, group).keys() | {"optimizer"}
    assert ours.keys() == {name for name in theirs if name.rpartition("/")[0] in learning}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("there", "there_learned", "here", "message"),
    [
        (AdamW(), "all", Adafactor(), r"optimizer\b.*\bkind\b"),
        (AdamW(), "all", Muon(), r"\boptimizer\b.*/momentum\b"),
        (Adafactor(), "all", FACTORED, r"\boptimizer\b.*/row\b"),
        (AdamW(), "non_expert", AdamW(), r"\boptimizer\b.*\brouter\.weight/step\b"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused_with_the_way_out(
    there: OptimizerSpec, there_learned: TrainableSet, here: OptimizerSpec, message: str, tmp_path: Path
) -> None:
    _, found = saved(tmp_path, there, there_learned)
    after = Parts(tmp_path / "other", NOISY, here, seed=1)
    before = {name: tensor.clone() for name, tensor in after.optimizer.state().items()}
    with pytest.raises(CheckpointError, match=message + r".*start\.keep=weights"):
        load_optimizer_state(after.optimizer, found, range(NOISY.num_experts))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.optimizer.state().items())


def test_a_checkpoint_without_an_optimizer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    parts = Parts(tmp_path, NOISY, Adafactor(), seed=0)
    weights = logical_tensors(parts.model)
    path = checkpoint.save(tmp_path, 0, model=weights, optimizer={}, documents={"state.json": TrainState().to_json({})})
    with pytest.raises(CheckpointError, match=naming("step-00000000", "optimizer state", "start.keep=weights")):
        load_optimizer_state(parts.optimizer, checkpoint.Checkpoint.open(path), range(NOISY.num_experts))


@pytest.mark.parametrize(
    ("spec", "slot", "is_refused"),
    [
        (Adafactor(), "optimizer/steps", True),
        (Adafactor(), "embedding/moment", True),
        (FACTORED, "embedding/row", True),
        (FACTORED, "embedding/column", True),
        (AdamW(), "embedding/step", True),
        (AdamW(), "embedding/exp_avg_sq", True),
        (AdamW(), "embedding/exp_avg", False),  # a mean of gradients
    ],
)
def test_an_optimizer_state_that_no_run_wrote_is_refused(
    tmp_path: Path, spec: OptimizerSpec, slot: str, is_refused: bool
) -> None:
    before, after = (Parts(tmp_path, NOISY, spec, seed=0) for _ in range(2))
    before.train(1)
    before.optimizer.state()[slot].view(-1)[-1] = -1
    before.saver.save(before.state)
    saved = checkpoint.Checkpoint.open(tmp_path / "step-00000001")
    restores = (
        after.restore,
        lambda: load_optimizer_state(after.optimizer, saved, range(NOISY.num_experts)),
    )
    for restore in restores:
        if not is_refused:
            restore()
            continue
        with pytest.raises(CheckpointError, match=naming("step-00000001", slot, "-1")):
            restore()


def test_a_disk_without_room_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(checkpoint, "preflight", lambda folder, size: asked.append(size))
    parts = Parts(tmp_path, SPARSE, AdamW(), seed=0)
    of_run = tmp_path, unsharded_weights(parts.model), parts.optimizer, parts.context
    preflight(*of_run, CheckpointSpec(keep_last=2, keep_best=False))
    one = sum(tensor.numel() * tensor.element_size() for tensor in parts.everything().values())
    assert asked == [3 * one]  # the two that are kept, and one being written
    preflight(*of_run, CheckpointSpec(keep_last=2), num_metrics=9)
    assert asked[1] == 12 * one  # and the best by each of nine figures
    preflight(*of_run, CheckpointSpec(keep_last=2, keep_best=False), num_named=2)
    assert asked[2] == 5 * one
