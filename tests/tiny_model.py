"""A model and batches small enough for any test: sparse, dropping tokens, with as much padding as there are targets."""

import torch

from switchcli.data.batch import Batch, BatchSource
from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS
from switchcli.training.loss import StepLoss

SOURCE, TARGET = 12, 9
SHAPE = {"vocab_size": 37, "d_model": 16, "d_ff": 24, "d_kv": 5, "num_heads": 2, "num_layers": 2}
DROPPING = SwitchRouter(capacity_factor=0.6, min_capacity=1, jitter=0.0)
SPARSE = ModelSpec(**SHAPE, num_experts=4, router=DROPPING)
GROUPED = SPARSE.model_copy(update={"router": DROPPING.model_copy(update={"group_sequences": 2})})
NOISY = SPARSE.model_copy(update={"dropout": 0.2, "router": DROPPING.model_copy(update={"jitter": 0.1})})
DENSE = ModelSpec(**SHAPE)
TO_DIVIDE = {"vocab_size": 38}
"""What a model axis of two wants besides."""


def a_model(spec: ModelSpec = SPARSE, seed: int = 0) -> SwitchTransformer:
    model = SwitchTransformer(spec)
    initialize(model, seed)
    return model


def _rows(step: int, first: int, count: int) -> Batch:
    """Sequences of very different lengths; two in eight, side by side, have no target. A function of step and row."""
    inputs_BS, targets_BT = torch.zeros(count, SOURCE, dtype=torch.int64), torch.zeros(count, TARGET, dtype=torch.int64)
    for row in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 * step + row)
        source = 1 + int(torch.randint(SOURCE, (), generator=generator))
        target = 0 if row % 8 in (2, 3) else 1 + int(torch.randint(TARGET, (), generator=generator))
        for padded_L, length in ((inputs_BS[row - first], source), (targets_BT[row - first], target)):
            padded_L[:length] = torch.randint(2, SHAPE["vocab_size"], (length,), generator=generator)
            padded_L[length - 1 : length] = EOS
    return Batch(inputs_BS, targets_BT)


class _Rows(BatchSource):
    def batch(self, step: int, first: int, count: int) -> Batch:
        return _rows(step, first, count)

    def __call__(self, step: int, first: int, count: int) -> Batch:
        return _rows(step, first, count)


rows = _Rows()
"""`rows(step, first, count)`, and a source of batches for what takes one."""


def step_total(loss: StepLoss) -> torch.Tensor:
    """The loss of a step that has one microbatch, with the cross-entropy as a sum: what a test differentiates."""
    return loss.target_sum if loss.auxiliary is None else loss.target_sum + loss.auxiliary.mean()
