"""TrainState: all that resuming needs beside the tensors: no settings, and nothing that follows from the step."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from switchcli.checkpoint.saved_state import Best, SavedState
from switchcli.metric_names import HELD_OUT_BITS
from switchcli.train.metrics import Mean, Metrics


@dataclass
class TrainState:
    """Where a run stands: the only thing in training that changes beside weights and optimizer."""

    step: int = 0
    """Optimizer steps taken; the data position and the learning rate follow from it."""
    targets_seen: int = 0
    """Real target tokens learned from, over all ranks."""
    seconds: float = 0.0
    """Time spent in training steps, over all starts."""
    metrics_since_log: Metrics = field(default_factory=dict)
    """This rank's metrics since the last logged step, in float64: JSON keeps those exactly."""
    eval_metrics: dict[str, float] = field(default_factory=dict)
    """The last evaluation's, by name; each is better when it is higher."""
    evaluated_step: int | None = None
    """The step of the last evaluation: a checkpoint of another step was not evaluated."""
    first_eval_metrics: dict[str, float] = field(default_factory=dict)
    """The first of each: of the held-out text before the first step, of tasks after some."""
    best: dict[str, Best] = field(default_factory=dict)
    """Of all evaluations."""
    texts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figures of each held-out text in the last evaluation, by its label."""
    bits_per_byte: float | None = None
    """Of all held-out text in the last evaluation; lower is better. None where it is not known."""
    position: list[int] = field(default_factory=list)
    """Where a stream of text stands; empty where what a step reads follows from its number."""
    skipped_steps: list[tuple[int, int]] = field(default_factory=list)
    """First and last step of each time that numbers which are not finite were gone on from (train.nonfinite)."""

    def num_skipped_steps(self) -> int:
        """Steps whose batches the weights have not learned from; those of several times count once."""
        return len({step for first, last in self.skipped_steps for step in range(first, last + 1)})

    def note(self, figures: Mapping[str, float]) -> None:
        """Take figures of the weights as they are; what is noted at one step is one evaluation."""
        if self.evaluated_step != self.step:
            self.eval_metrics = {}
        self.evaluated_step = self.step
        for name, figure in figures.items():
            self.eval_metrics[name] = figure
            self.first_eval_metrics.setdefault(name, figure)
            if name not in self.best or figure >= self.best[name].value:
                self.best[name] = Best(figure, self.step)

    def bits(self) -> dict[str, float]:
        """Of a record: bits a byte where they are known."""
        return {} if self.bits_per_byte is None else {HELD_OUT_BITS: self.bits_per_byte}

    def to_json(self, window: Metrics) -> bytes:
        """The state with the window of all ranks, `window`, in place of this rank's."""
        state = {name: getattr(self, name) for name in SavedState.model_fields}
        state["metrics_since_log"] = {name: [part.tolist() for part in mean] for name, mean in window.items()}
        return (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()

    def restore(self, text: bytes, device: torch.device, with_window: bool) -> None:
        """Become the state of a checkpoint. The ranks of one share of the batch take the window, the others zeros: it
        counts once."""
        saved = SavedState.read(text)
        for name in SavedState.model_fields.keys() - {"metrics_since_log"}:
            setattr(self, name, getattr(saved, name))
        self.metrics_since_log = {
            name: Mean(*(torch.tensor(part, dtype=torch.float64, device=device) * with_window for part in parts))
            for name, parts in saved.metrics_since_log.items()
        }
