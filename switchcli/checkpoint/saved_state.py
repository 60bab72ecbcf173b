"""The state file of a checkpoint: what resuming needs beside the tensors, as JSON."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field

from switchcli.metric_names import HELD_OUT
from switchcli.spec import Spec


class Best(NamedTuple):
    """The highest value of a figure, and the last step that had it."""

    value: float
    step: int


Count = Annotated[int, Field(ge=0, lt=2**63)]
_Part = float | list[float] | list[list[float]]


class SavedState(Spec):
    """A state.json: the state's own names, and of the window each metric's total and weight; what is more is of a
    later version, which no damage is."""

    model_config = ConfigDict(extra="ignore")
    step: Count = 0
    targets_seen: Count = 0
    seconds: Annotated[float, Field(ge=0.0)] = 0.0
    eval_metrics: dict[str, float] = Field(default_factory=dict)
    evaluated_step: Count | None = None
    first_eval_metrics: dict[str, float] = Field(default_factory=dict)
    best: dict[str, Best] = Field(default_factory=dict)
    texts: dict[str, dict[str, float]] = Field(default_factory=dict)
    bits_per_byte: float | None = None
    position: list[Count] = Field(default_factory=list)
    skipped_steps: list[tuple[Count, Count]] = Field(default_factory=list)
    metrics_since_log: dict[str, tuple[_Part, _Part]] = Field(default_factory=dict)

    @classmethod
    def read(cls, text: bytes) -> "SavedState":
        """Raises ValueError or RecursionError for what no run wrote."""
        return cls.model_validate_json(json.dumps(_upgrade(json.loads(text))))

    def metrics_at_step(self) -> Mapping[str, float]:
        """The figures of the very weights that this lies beside: none when it was not their step's evaluation."""
        return self.eval_metrics if self.evaluated_step == self.step else {}


_RENAMED = {"figures": "eval_metrics", "first_figures": "first_eval_metrics", "left_out": "skipped_steps",
            "window": "metrics_since_log"}  # fmt: skip
"""Keys that versions up to 0.1 wrote, and their names now."""


def _upgrade(state: Any) -> Any:
    """Return the state of an earlier version under the keys of this one."""
    if not isinstance(state, dict):
        return state
    state = {_RENAMED.get(key, key): value for key, value in state.items()}
    if "held_out_step" not in state:
        return state
    # The first versions saved one metric, and not which step was the best.
    step = state.pop("held_out_step")
    last, first = (
        {} if value is None else {HELD_OUT: value}
        for value in (state.pop(f"{which}held_out_neg_log_perplexity", None) for which in ("", "first_"))
    )
    best = {name: (value, step) for name, value in last.items()}
    return {**state, "eval_metrics": last, "evaluated_step": step, "first_eval_metrics": first, "best": best}
