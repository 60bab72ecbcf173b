"""TrainState: all that resuming needs beside the tensors: no settings, and nothing that follows from the step."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import ConfigDict, Field

from switchcli.spec import Spec
from switchcli.train.metrics import Mean, Metrics

HELD_OUT = "held_out/neg_log_perplexity"
"""The one figure of pre-training."""


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


@dataclass
class TrainState:
    """Where a run stands: the only thing in training that changes beside weights and optimizer."""

    step: int = 0
    """Optimizer steps taken; the data position and the learning rate follow from it."""
    targets_seen: int = 0
    """Real target tokens learned from, over all ranks."""
    seconds: float = 0.0
    """Time spent in training steps, over all starts."""
    window: Metrics = field(default_factory=dict)
    """This rank's metrics since the last logged step, in float64: JSON keeps those exactly."""
    figures: dict[str, float] = field(default_factory=dict)
    """The last evaluation's, by name; each is better when it is higher."""
    evaluated_step: int | None = None
    """The step of the last evaluation: a checkpoint of another step was not evaluated."""
    first_figures: dict[str, float] = field(default_factory=dict)
    """The first of each: of the held-out text before the first step, of tasks after some."""
    best: dict[str, Best] = field(default_factory=dict)
    """Of all evaluations."""
    texts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figures of each held-out text in the last evaluation, by its label."""
    bits_per_byte: float | None = None
    """Of all held-out text in the last evaluation; lower is better. None where it is not known."""
    position: list[int] = field(default_factory=list)
    """Where a stream of text stands; empty where what a step reads follows from its number."""
    left_out: list[tuple[int, int]] = field(default_factory=list)
    """First and last step of each time that numbers which are not finite were gone on from (train.nonfinite)."""

    def num_left_out(self) -> int:
        """Steps whose batches the weights have not learned from; those of several times count once."""
        return len({step for first, last in self.left_out for step in range(first, last + 1)})

    def note(self, figures: Mapping[str, float]) -> None:
        """Take figures of the weights as they are; what is noted at one step is one evaluation."""
        if self.evaluated_step != self.step:
            self.figures = {}
        self.evaluated_step = self.step
        for name, figure in figures.items():
            self.figures[name] = figure
            self.first_figures.setdefault(name, figure)
            if name not in self.best or figure >= self.best[name].figure:
                self.best[name] = Best(figure, self.step)

    def bits(self) -> dict[str, float]:
        """Of a record: bits a byte where they are known."""
        return {} if self.bits_per_byte is None else {"held_out/bits_per_byte": self.bits_per_byte}

    def to_json(self, window: Metrics) -> bytes:
        """The state with the window of all ranks, `window`, in place of this rank's."""
        state = {name: getattr(self, name) for name in Saved.model_fields}
        state["window"] = {name: [part.tolist() for part in mean] for name, mean in window.items()}
        return (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()

    def restore(self, text: bytes, device: torch.device, with_window: bool) -> None:
        """Become the state of a checkpoint. The ranks of one share of the batch take the window, the others zeros: it
        counts once."""
        saved = Saved.read(text)
        for name in Saved.model_fields.keys() - {"window"}:
            setattr(self, name, getattr(saved, name))
        self.window = {
            name: Mean(*(torch.tensor(part, dtype=torch.float64, device=device) * with_window for part in parts))
            for name, parts in saved.window.items()
        }


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
