"""TrainState: all that resuming needs beside the tensors: no settings, and nothing that follows from the step."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from switchcli.train.metrics import Mean, Metrics

HELD_OUT = "held_out/neg_log_perplexity"
"""The one figure of pre-training."""


class Best(NamedTuple):
    """The highest value of a figure, and the last step that had it."""

    figure: float
    step: int


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
        state = {
            "step": self.step,
            "targets_seen": self.targets_seen,
            "seconds": self.seconds,
            "figures": self.figures,
            "evaluated_step": self.evaluated_step,
            "first_figures": self.first_figures,
            "best": self.best,
            "texts": self.texts,
            "bits_per_byte": self.bits_per_byte,
            "position": self.position,
            "window": {name: [part.tolist() for part in mean] for name, mean in window.items()},
        }
        return (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()

    def restore(self, text: bytes, device: torch.device, with_window: bool) -> None:
        """Become the state of a checkpoint. The ranks of one share of the batch take the window, the others zeros: it
        counts once."""
        state = _of_today(json.loads(text))
        self.step = state["step"]
        self.targets_seen = state["targets_seen"]
        self.seconds = state["seconds"]
        self.figures, self.first_figures = state["figures"], state["first_figures"]
        self.evaluated_step = state["evaluated_step"]
        self.best = {name: Best(*best) for name, best in state["best"].items()}
        self.texts, self.position = state.get("texts", {}), state.get("position", [])
        self.bits_per_byte = state.get("bits_per_byte")
        self.window = {
            name: Mean(*(torch.tensor(part, dtype=torch.float64, device=device) * with_window for part in parts))
            for name, parts in state["window"].items()
        }


def own_figures(state: Mapping[str, Any]) -> Mapping[str, float]:
    """The figures of the very weights that a state.json lies beside: none when it was not their step's evaluation."""
    today = _of_today(state)
    return today.get("figures", {}) if today.get("evaluated_step") == today.get("step") else {}


def _of_today(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state as it is written now: that of version 0.1 has one figure, and does not know which was the best."""
    if "held_out_step" not in state:
        return state
    step, keys = state["held_out_step"], ("held_out_neg_log_perplexity", "first_held_out_neg_log_perplexity")
    last, first = ({} if state.get(key) is None else {HELD_OUT: state[key]} for key in keys)
    best = {name: (figure, step) for name, figure in last.items()}
    return {**state, "figures": last, "evaluated_step": step, "first_figures": first, "best": best}
