"""Test doubles: small implementations of what training is given, made of functions and lists."""

import io
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.context import DistributedContext
from switchcli.system.signals import StopTraining
from switchcli.terminal.console import Console, silent
from switchcli.training import optimizers
from switchcli.training.config import ScoringSpec
from switchcli.training.loop import Callback, fit
from switchcli.training.measure import Evaluator
from switchcli.training.optimizer_specs import UNSHARDED, Adafactor
from switchcli.training.optimizers import Layouts, NamedParameters, Optimizer
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState
from switchcli.training.validation import HeldOutText


class KeepingConsole(Console):
    """Keeps messages and warnings in lists, and prints nothing."""

    def __init__(self) -> None:
        super().__init__(stream=io.StringIO())
        self.messages: list[str] = []
        self.warnings: list[str] = []

    def message(self, text: str = "", style: str = "") -> None:
        self.messages.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class NoWarnings(Console):
    """Fails the test at the first warning."""

    def __init__(self) -> None:
        super().__init__(stream=io.StringIO())

    def warning(self, text: str) -> None:
        pytest.fail(text)


class FactoringAdafactor(Adafactor):
    """Adafactor that factors matrices from `least` rows and columns on, so that small models have factored ones."""

    least: int = 8

    def build(self, parameters: NamedParameters, layouts: Layouts = UNSHARDED) -> Optimizer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizers, "MIN_DIM_TO_FACTOR", self.least)
            return super().build(parameters, layouts)


class Source(BatchSource):
    """Batches of a function of step, first row and number of rows."""

    def __init__(self, rows: Callable[[int, int, int], Batch]) -> None:
        self._rows = rows

    def batch(self, step: int, first: int, count: int) -> Batch:
        return self._rows(step, first, count)


class Records:
    """A log that keeps the records in a list."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def __call__(self, record: Mapping[str, Any]) -> None:
        self.written.append(dict(record))


class SaveEvery(Callback):
    """Saves by what has a `save`."""

    def __init__(self, every_steps: int, saver: Any) -> None:
        super().__init__(every_steps)
        self._saver = saver

    def __call__(self, state: TrainState) -> None:
        self._saver.save(state)


def text_evaluator(context: DistributedContext, texts: Mapping[str, HeldOutText], rows_each: int = 2) -> Evaluator:
    """What measures models on texts alone."""
    tokenizer: Any = None
    return Evaluator(tokenizer, texts, (), ScoringSpec(), "paper", rows_each, context, silent())


def a_run(
    context: DistributedContext,
    log: Records,
    *,
    model: Any = None,
    texts: Mapping[str, HeldOutText] = MappingProxyType({}),
    state: TrainState | None = None,
    source: BatchSource | None = None,
    console: Console | None = None,
    every_steps: int = 1,
    steps: int = 100,
    batch_tokens: int = 1,
    flops_per_step: int = 1,
    layers: Sequence[str] = (),
) -> Any:
    """What callbacks read of a run. Rows of held-out text are evaluated two at a time."""
    console = console or silent()
    recipe = SimpleNamespace(
        model=SimpleNamespace(sparse_layer_names=lambda: list(layers)),
        train=SimpleNamespace(steps=steps, batch_tokens=batch_tokens),
        log=SimpleNamespace(every_steps=every_steps),
        eval=SimpleNamespace(every_steps=every_steps),
    )
    return SimpleNamespace(
        recipe=recipe,
        schedule=InverseSquareRoot(),
        model=model,
        evaluator=text_evaluator(context, texts),
        data=SimpleNamespace(source=source),
        state=state or TrainState(),
        task=SimpleNamespace(flops_per_step=flops_per_step),
        context=context,
        console=console,
        log=log,
    )


class Still(Optimizer):
    """Moves nothing."""

    def step(self, learning_rate: float) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}


class StopAfter:
    """A stop request that is there from look number `looks` on, counted from 0."""

    def __init__(self, looks: int) -> None:
        self.looked = 0
        self._looks = looks

    @property
    def requested(self) -> bool:
        self.looked += 1
        return self.looked > self._looks


class Do(Callback):
    """Calls a function after every so many steps, and after the last."""

    def __init__(self, every_steps: int, what: Callable[[TrainState], None]) -> None:
        super().__init__(every_steps)
        self._what = what

    def __call__(self, state: TrainState) -> None:
        self._what(state)


def trained(*arguments: Any, **keywords: Any) -> bool:
    """`fit`, and whether it trained to the end: False after a stop."""
    try:
        fit(*arguments, **keywords)
    except StopTraining:
        return False
    return True
