"""TrainState: all that resuming needs beside the tensors: no settings, and nothing that follows from the step."""

import json
from dataclasses import dataclass, field

import torch

from switchcli.train.metrics import Mean, Metrics

_HELD_OUT = ("held_out_neg_log_perplexity", "held_out_step", "first_held_out_neg_log_perplexity")


@dataclass
class TrainState:
    """Where a run stands: the only thing in training that changes beside weights and optimizer."""

    step: int = 0
    """Optimizer steps taken; the data position and the learning rate follow from it."""
    targets_seen: int = 0
    """Real target tokens learned from, over all ranks."""
    seconds: float = 0.0
    """Time spent in training steps, over all starts."""
    held_out_neg_log_perplexity: float | None = None
    """The last evaluation's."""
    window: Metrics = field(default_factory=dict)
    """This rank's metrics since the last logged step, in float64: JSON keeps those exactly."""
    held_out_step: int | None = None
    """The step of the last evaluation: a checkpoint of another step was not evaluated."""
    first_held_out_neg_log_perplexity: float | None = None
    """The evaluation's before the first step."""

    def note_held_out(self, figure: float) -> None:
        """Take the held-out neg. log perplexity of the weights as they are."""
        if self.first_held_out_neg_log_perplexity is None:
            self.first_held_out_neg_log_perplexity = figure
        self.held_out_neg_log_perplexity = figure
        self.held_out_step = self.step

    def to_json(self, window: Metrics) -> bytes:
        """The state with the window of all ranks, `window`, in place of this rank's."""
        state = {
            "step": self.step,
            "targets_seen": self.targets_seen,
            "seconds": self.seconds,
            **{name: getattr(self, name) for name in _HELD_OUT},
            "window": {name: [part.tolist() for part in mean] for name, mean in window.items()},
        }
        return (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()

    def restore(self, text: bytes, device: torch.device, with_window: bool) -> None:
        """Become the state of a checkpoint. One rank alone takes the window, the others zeros: it counts once."""
        state = json.loads(text)
        self.step = state["step"]
        self.targets_seen = state["targets_seen"]
        self.seconds = state["seconds"]
        for name in _HELD_OUT:
            setattr(self, name, state[name])
        self.window = {
            name: Mean(*(torch.tensor(part, dtype=torch.float64, device=device) * with_window for part in parts))
            for name, parts in state["window"].items()
        }
