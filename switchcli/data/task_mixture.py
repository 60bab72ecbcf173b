"""Mixtures of tasks: how often each task is shown. The batches of a mixture are in task_batches.py.

Legend  K tasks
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from switchcli.spec import Count, Spec


class Proportional(Spec):
    """T5's mixture in proportion to size: the rate of a task is min(examples, cap) ** (1 / temperature)."""

    kind: Literal["proportional"] = "proportional"
    """`proportional` samples tasks in proportion to their numbers of examples."""
    cap: Count | None = None
    """Number of examples beyond which a larger task is not shown more often, so that it does not drown small ones."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Smoothing of the rates: at 1 they are in proportion to the examples, above 1 closer to each other."""

    def rates(self, num_examples: Sequence[int]) -> NDArray[np.float64]:
        """Return each task's fraction of the examples that are shown [K]; they add up to 1."""
        capped = np.minimum(num_examples, np.inf if self.cap is None else self.cap)
        # capped ** (1 / temperature), up to a factor: ratios to the maximum do not overflow at small temperatures.
        weights = np.exp(np.log(capped / capped.max()) / self.temperature)
        return weights / weights.sum()


class Equal(Spec):
    """A mixture that shows every task equally often."""

    kind: Literal["equal"] = "equal"
    """`equal` samples all tasks equally often."""

    def rates(self, num_examples: Sequence[int]) -> NDArray[np.float64]:
        return np.full(len(num_examples), 1 / len(num_examples))


MixtureSpec = Annotated[Proportional | Equal, Field(discriminator="kind")]
