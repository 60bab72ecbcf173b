"""Learning-rate schedules: pure functions `schedule(step, total_steps)` of the step, counted from 0.

A schedule has no state. After a resume the rate follows from the step alone.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from switchcli.spec import MAX_COUNT, Count, Spec


class Schedule(Spec, ABC):
    """Base class of the schedules."""

    kind: str
    """The schedule's name in a recipe."""
    learning_rate: float = Field(default=1e-3, gt=0.0)
    """The highest learning rate, which is that after the warm-up."""

    @abstractmethod
    def __call__(self, step: int, total_steps: int) -> float:
        """Return the learning rate of `step`, counted from 0, in a run of `total_steps`."""

    def incompatibility(self, total_steps: int) -> str | None:
        """Return why the schedule does not fit a run of `total_steps`, beginning with its key; None if it fits."""
        return None

    def of_branch(self, first_step: int, total_steps: int) -> "Schedule":
        """Return the schedule of a run of `total_steps` that continues another one after `first_step`."""
        return self


class InverseSquareRoot(Schedule):
    """T5's schedule: learning_rate * sqrt(warmup_steps / max(step, warmup_steps)). Constant at first, without a ramp.

    With the defaults this is 1 / sqrt(max(step, 10,000)): 0.01 until step 10,000, 0.005 at 40,000 (T5, section 3.1.2).
    """

    kind: Literal["inverse_square_root"] = "inverse_square_root"
    """`inverse_square_root` is T5's schedule for pre-training: constant, then falling with 1 / sqrt(step)."""
    learning_rate: float = Field(default=0.01, gt=0.0)
    """Learning rate of the constant part; 0.01 as in T5."""
    warmup_steps: Count = 10_000
    """Steps of the constant part; 10,000 as in T5."""
    decay_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Last fraction of the run over which the rate also falls linearly, to 0 after the last update: 0.1 in
    Mesh-TensorFlow, off in T5."""

    def __call__(self, step: int, total_steps: int) -> float:
        rate = self.learning_rate * math.sqrt(self.warmup_steps / max(step, self.warmup_steps))
        ramp_steps = self.decay_fraction * total_steps
        return rate * min(1.0, (total_steps - step) / ramp_steps) if ramp_steps else rate


class WarmedUp(Schedule, ABC):
    """Base class of the schedules with a linear warm-up from 0. The first step already learns."""

    warmup_steps: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Steps of the linear warm-up from 0; none by default, as in T5."""

    def incompatibility(self, total_steps: int) -> str | None:
        if self.warmup_steps <= total_steps:
            return None
        return (
            f"warmup_steps ({self.warmup_steps}) must be at most train.steps ({total_steps}): try {total_steps // 10}."
        )

    def _warmup(self, step: int) -> float:
        """Return the fraction of the rate that the warm-up has reached, in (0, 1]."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


class Constant(WarmedUp):
    """One learning rate, as in T5's fine-tuning, after an optional warm-up (1,000 steps in T5X)."""

    kind: Literal["constant"] = "constant"
    """`constant` keeps one learning rate after an optional warm-up: T5's schedule for fine-tuning, with 0.001."""

    def __call__(self, step: int, total_steps: int) -> float:
        return self.learning_rate * self._warmup(step)


class Falling(WarmedUp, ABC):
    """Base class of the schedules that fall after the warm-up, to `final_fraction` of the peak after the last update.

    The last update itself is one step above that end, as the rate is a function of the steps taken before: 0.109 of the
    peak for a line of 100 steps with a `final_fraction` of 0.1.
    """

    final_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Learning rate that is reached after the last update, as a fraction of the peak."""

    def __call__(self, step: int, total_steps: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * self._height(progress))

    @abstractmethod
    def _height(self, progress: float) -> float:
        """Return the height of the fall at a fraction of the steps after the warm-up: 1 at 0, and 0 at 1."""


class Cosine(Falling):
    """Half a cosine."""

    kind: Literal["cosine"] = "cosine"
    """`cosine` falls along half a cosine after an optional warm-up."""

    def _height(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class Linear(Falling):
    """A straight line."""

    kind: Literal["linear"] = "linear"
    """`linear` falls along a straight line after an optional warm-up."""

    def _height(self, progress: float) -> float:
        return 1 - progress


class WarmupStableDecay(WarmedUp):
    """Linear warm-up from 0, a constant rate, then a fall to 0 after the last update (Hu et al. 2024, MiniCPM).

    In a branch (`start.keep: run`) the fall begins at the branch and takes all of its own steps. So one run with a
    constant rate gives models of several lengths, each for the steps of its decay alone.
    """

    kind: Literal["wsd"] = "wsd"
    """`wsd` (warm-up, stable, decay) is constant and falls to 0 over the last fraction of a run, and in a branch over
    all of its own steps."""
    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Last fraction of the run over which the rate falls to 0; a branch falls over its own steps instead."""
    shape: Literal["linear", "sqrt"] = "linear"
    """How the rate falls with the progress of the decay, from 0 to 1: `linear` by 1 - progress, `sqrt` by
    1 - sqrt(progress), which is fast at first (Hägele et al. 2024)."""

    def __call__(self, step: int, total_steps: int) -> float:
        remaining = max(0.0, min(1.0, (total_steps - step) / (self.decay_fraction * total_steps)))
        decay = remaining if self.shape == "linear" else 1 - math.sqrt(1 - remaining)
        return self.learning_rate * self._warmup(step) * decay

    def of_branch(self, first_step: int, total_steps: int) -> "WarmupStableDecay":
        return self.model_copy(update={"decay_fraction": 1 - first_step / total_steps})


ScheduleSpec = Annotated[
    InverseSquareRoot | Constant | Cosine | Linear | WarmupStableDecay, Field(discriminator="kind")
]
