"""Learning-rate schedules: pure functions of the step, called as `schedule(step, total_steps)`, step counted from 0.

Nothing is stepped and nothing is saved: after a resume the rate is what the step says. T5's is constant for
`warmup_steps`, then one over the root of the step.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from switchcli.spec import MOST, Spec


class Schedule(Spec, ABC):
    """What every schedule has."""

    @abstractmethod
    def __call__(self, step: int, total_steps: int) -> float:
        """Return the learning rate of `step`, counted from 0, in a run of `total_steps`."""

    def incompatibility(self, total_steps: int) -> str | None:
        """Return why the schedule does not fit a run of `total_steps`, beginning with its key; None if it fits."""
        return None


class InverseSquareRoot(Schedule):
    """T5: learning_rate * sqrt(warmup / max(step, warmup)): constant first, then falling. No linear ramp.

    With the defaults this is 1 / sqrt(max(step, 10,000)): 0.01 until step 10,000, 0.005 at 40,000.
    """

    kind: Literal["inverse_square_root"] = "inverse_square_root"
    learning_rate: float = Field(default=0.01, gt=0.0)
    """The rate of the constant part."""
    warmup_steps: int = Field(default=10_000, ge=1, le=MOST["steps"])
    """Length of the constant part."""
    decay_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the run at its end over which the rate also falls to 0: 0.1 in Mesh-TensorFlow, off in T5."""

    def __call__(self, step: int, total_steps: int) -> float:
        rate = self.learning_rate * math.sqrt(self.warmup_steps / max(step, self.warmup_steps))
        ramp_steps = self.decay_fraction * total_steps
        return rate * min(1.0, (total_steps - step) / ramp_steps) if ramp_steps else rate


class Constant(Schedule):
    """One rate, as T5 is fine-tuned, after a linear warm-up from 0 if one is asked for (T5X has 1,000 steps)."""

    kind: Literal["constant"] = "constant"
    learning_rate: float = Field(default=1e-3, gt=0.0)
    warmup_steps: int = Field(default=0, ge=0, le=MOST["steps"])

    def __call__(self, step: int, total_steps: int) -> float:
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def incompatibility(self, total_steps: int) -> str | None:
        return _too_long(self.warmup_steps, total_steps)


class Cosine(Schedule):
    """Linear warm-up from 0, then half a cosine down to `final_fraction` of the peak at the last step."""

    kind: Literal["cosine"] = "cosine"
    learning_rate: float = Field(default=1e-3, gt=0.0)
    """The peak."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST["steps"])
    final_fraction: float = Field(default=0.0, ge=0.0, le=1.0)

    def __call__(self, step: int, total_steps: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        cosine = 0.5 * (1 + math.cos(math.pi * _progress(step, self.warmup_steps, total_steps)))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)

    def incompatibility(self, total_steps: int) -> str | None:
        return _too_long(self.warmup_steps, total_steps)


class Linear(Schedule):
    """Linear warm-up from 0, then a straight line to `final_fraction` of the peak at the last step."""

    kind: Literal["linear"] = "linear"
    learning_rate: float = Field(default=1e-3, gt=0.0)
    """The peak."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST["steps"])
    final_fraction: float = Field(default=0.0, ge=0.0, le=1.0)

    def __call__(self, step: int, total_steps: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = 1 - _progress(step, self.warmup_steps, total_steps)
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * left)

    def incompatibility(self, total_steps: int) -> str | None:
        return _too_long(self.warmup_steps, total_steps)


def _too_long(warmup_steps: int, total_steps: int) -> str | None:
    """Return why a warm-up from 0 does not fit a run: it would end below its peak. None if it fits."""
    if warmup_steps <= total_steps:
        return None
    return f"warmup_steps ({warmup_steps}) must be at most train.steps ({total_steps}): try {total_steps // 10}."


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the part after the warm-up that lies behind, in [0, 1]."""
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


ScheduleSpec = Annotated[InverseSquareRoot | Constant | Cosine | Linear, Field(discriminator="kind")]
