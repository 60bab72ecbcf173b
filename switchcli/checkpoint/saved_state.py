"""The state file of a checkpoint: what resuming needs beside the tensors, as JSON."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field

from switchcli.metric_names import HELD_OUT
from switchcli.spec import Spec


class Best(NamedTuple):
    """The highest value of a figure, and the last step that had it."""

    figure: float
    step: int


Count = Annotated[int, Field(ge=0, lt=2**63)]
_Part = float | list[float] | list[list[float]]


class Saved(Spec):
    """A state.json: the state's own names, and of the window each metric's total and weight; what is more is of a
    later version, which no damage is."""

    model_config = ConfigDict(extra="ignore")
    step: Count = 0
    targets_seen: Count = 0
    seconds: Annotated[float, Field(ge=0.0)] = 0.0
    figures: dict[str, float] = Field(default_factory=dict)
    evaluated_step: Count | None = None
    first_figures: dict[str, float] = Field(default_factory=dict)
    best: dict[str, Best] = Field(default_factory=dict)
    texts: dict[str, dict[str, float]] = Field(default_factory=dict)
    bits_per_byte: float | None = None
    position: list[Count] = Field(default_factory=list)
    left_out: list[tuple[Count, Count]] = Field(default_factory=list)
    window: dict[str, tuple[_Part, _Part]] = Field(default_factory=dict)

    @classmethod
    def read(cls, text: bytes) -> "Saved":
        """Raises ValueError or RecursionError for what no run wrote."""
        return cls.model_validate_json(json.dumps(_of_today(json.loads(text))))

    def own_figures(self) -> Mapping[str, float]:
        """The figures of the very weights that this lies beside: none when it was not their step's evaluation."""
        return self.figures if self.evaluated_step == self.step else {}


def _of_today(state: Any) -> Any:
    """A state as it is written now: that of version 0.1 has one figure, and does not know which was the best."""
    if not isinstance(state, dict) or "held_out_step" not in state:
        return state
    step = state.pop("held_out_step")
    last, first = (
        {} if figure is None else {HELD_OUT: figure}
        for figure in (state.pop(f"{which}held_out_neg_log_perplexity", None) for which in ("", "first_"))
    )
    best = {name: (figure, step) for name, figure in last.items()}
    return {**state, "figures": last, "evaluated_step": step, "first_figures": first, "best": best}
