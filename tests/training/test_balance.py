"""The biases of choices, which the choices of each step change."""

from pathlib import Path
from typing import Any

import torch
from checkpointed_run import Parts, assert_equal
from doubles import FactoringAdafactor, Source, trained
from tiny_model import NOISY, SPARSE, a_model, rows
from torch import nn

from switchcli.checkpoint.model_weights import load_weights, logical_tensors
from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import unsharded_weights
from switchcli.model.block_execution import recompute_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.moe.layer import SwitchLayer, sparse_layers
from switchcli.model.moe.router import TopKRouter
from switchcli.model.trainable import freeze, trainable
from switchcli.system.signals import StopRequest
from switchcli.training.config import TrainSpec
from switchcli.training.loss import StepLoss, cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.schedules import Constant
from switchcli.training.state import TrainState

BIASED = TopKRouter(k=2, gate="sigmoid", balance="bias", bias_rate=0.01, keep_threshold=0.9, min_capacity=1)


class Choices:
    """Counts the choices of each expert in a step from the logits, by layer: all k of every real token."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        for name, layer in sparse_layers(model).items():
            layer.router.register_forward_hook(lambda module, inputs, logits, name=name: self._note(name, logits))
            layer.register_forward_hook(lambda layer, inputs, output, name=name: self._count(name, layer, inputs[1]))
        self._logits: dict[str, torch.Tensor] = {}
        self.source = Source(self._rows)
        """The batches of the run, which say when a step begins."""

    def _rows(self, step: int, first: int, count: int) -> Batch:
        if len(self.steps) == step:
            self.steps.append({})
        return rows(step, first, count)

    def _note(self, name: str, logits: torch.Tensor) -> None:
        self._logits[name] = logits.detach().flatten(0, 1)

    def _count(self, name: str, layer: SwitchLayer, real_BS: torch.Tensor) -> None:
        count_E = self.steps[-1].setdefault(name, torch.zeros(SPARSE.num_experts, dtype=torch.int64))
        for logits_E, real in zip(self._logits[name], real_BS.flatten().tolist(), strict=True):
            score_E = logits_E.sigmoid() + layer.router.bias
            for expert in score_E.topk(layer.router_spec.k).indices.tolist() if real else []:
                count_E[expert] += 1


class Run:
    """A run of a tiny model whose router is balanced by earlier steps."""

    def __init__(self, router: Any, recomputed: bool = False) -> None:
        self.model = a_model(with_router(router))
        if recomputed:
            recompute_blocks(self.model)
        self.state = TrainState()

    def fit(self, steps: int, source: BatchSource = rows, poison: int | None = None) -> None:
        def objective(model: nn.Module, batch: Batch) -> StepLoss:
            loss = cross_entropy(model, batch)
            return loss._replace(target_sum=loss.target_sum * (torch.nan if self.state.step == poison else 1.0))

        trained(
            self.state,
            self.model,
            objective,
            Microbatches(source, 4, 2, 0, 1),
            FactoringAdafactor().build(trainable(self.model)),
            Constant(learning_rate=0.01),
            DistributedContext("cpu", "float32"),
            [],
            TrainSpec(steps=steps, batch_tokens=1, nonfinite="skip"),
            StopRequest(),
        )

    def biases(self) -> dict[str, torch.Tensor]:
        return {name: layer.router.bias.clone() for name, layer in sparse_layers(self.model).items()}


def with_router(router: Any) -> ModelSpec:
    return NOISY.model_copy(update={"router": router})


def test_a_bias_follows_the_sign_of_the_distance_from_the_mean_load() -> None:
    run = Run(BIASED)
    choices = Choices(run.model)

    expected = {name: torch.zeros(SPARSE.num_experts) for name in SPARSE.sparse_layer_names()}
    for step in range(3):
        run.fit(step + 1, choices.source)
        for name, load_E in choices.steps[step].items():
            mean = load_E.sum().item() / len(load_E)
            for expert, load in enumerate(load_E.tolist()):
                expected[name][expert] += 0.01 * ((load < mean) - (load > mean))
        assert any(bias_E.any() for bias_E in expected.values())
        torch.testing.assert_close(run.biases(), expected, rtol=0, atol=1e-7)


def test_a_bias_has_no_gradient_and_recomputed_blocks_do_not_count_twice() -> None:
    run, again = Run(BIASED), Run(BIASED, recomputed=True)
    run.fit(3)
    again.fit(3)
    torch.testing.assert_close(run.biases(), again.biases(), rtol=0, atol=0)
    assert not any(bias_E.requires_grad for bias_E in run.biases().values())


def test_a_skipped_step_balances_nothing() -> None:
    run = Run(BIASED)
    run.fit(1)
    before = run.biases()
    run.fit(2, poison=1)
    assert run.state.skipped_steps == [2]
    torch.testing.assert_close(run.biases(), before, rtol=0, atol=0)
    run.fit(3)
    assert any(not bias_E.equal(before[name]) for name, bias_E in run.biases().items())


def test_a_router_that_is_not_trained_keeps_its_biases() -> None:
    run = Run(BIASED)
    freeze(run.model, "non_expert")
    run.fit(2)
    assert not any(bias_E.any() for bias_E in run.biases().values())


def test_routers_that_were_balanced_by_the_loss_start_without_bias() -> None:
    run = Run(BIASED)
    for layer in sparse_layers(run.model).values():
        layer.router.bias.fill_(1.0)
    load_weights(unsharded_weights(run.model), logical_tensors(a_model(with_router(TopKRouter()), seed=1)))
    assert not any(bias_E.any() for bias_E in run.biases().values())


def test_a_resumed_run_has_the_biases(tmp_path: Path) -> None:
    whole = Parts(tmp_path / "whole", with_router(BIASED), FactoringAdafactor(), 0)
    whole.train(4)
    part = Parts(tmp_path / "part", with_router(BIASED), FactoringAdafactor(), 0)
    part.train(2)
    part.saver.save(part.state)
    resumed = Parts(tmp_path / "part", with_router(BIASED), FactoringAdafactor(), 1)
    resumed.restore()
    resumed.train(4)
    assert_equal(whole, resumed)
    assert any(name.endswith("router.bias") and tensor.any() for name, tensor in whole.everything().items())
