"""The state file of a checkpoint, state.json: everything that resuming needs besides the tensors."""

from collections.abc import Mapping
from typing import Annotated, NamedTuple, Self

from pydantic import ConfigDict, Field, model_validator

from switchcli.spec import Spec

Count = Annotated[int, Field(ge=0, lt=2**63)]


class Best(NamedTuple):
    """The highest value of a metric, and the last step that had it."""

    value: float
    """The value. Higher is better for every metric."""
    step: Count
    """The optimizer step of the evaluation."""


class BranchPoint(NamedTuple):
    """Where a run that was branched from another run began. The defaults describe a run that is no branch."""

    step: Count = 0
    """The step of the checkpoint that it began from."""
    input_tokens: Count = 0
    """Input tokens that the model was trained on up to that step."""
    row_offset: int = 0
    """Added to a row's number: step * rows per step + offset is the first row of a step in the order of the data."""
    is_data_continued: bool = True
    """Whether the data goes on from the position of that checkpoint. If not, it begins anew at the branch."""


FROM_BEGINNING = BranchPoint()
_Sums = float | list[float] | list[list[float]]


class RunState(Spec):
    """The progress of a run: what a checkpoint stores of it as plain values, and a training changes."""

    model_config = ConfigDict(frozen=False)
    step: Count = 0
    """Optimizer steps taken. The data position and the learning rate follow from it."""
    targets_seen: Count = 0
    """Target tokens without padding that the run learned from, over all ranks."""
    seconds: Annotated[float, Field(ge=0.0, lt=1e10)] = 0.0
    """Seconds spent in training steps, over all starts of the run."""
    eval_metrics: dict[str, float] = Field(default_factory=dict)
    """Metrics of the last evaluation, by name. Higher is better for each."""
    evaluated_step: Count | None = None
    """The step of the last evaluation. A checkpoint of another step was not evaluated."""
    first_eval_metrics: dict[str, float] = Field(default_factory=dict)
    """The first value of each metric: before the first step for held-out text, later for tasks."""
    best: dict[str, Best] = Field(default_factory=dict)
    """The best value of each metric over all evaluations, and its step."""
    texts: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Metrics of each held-out text at the last evaluation, by label."""
    bits_per_byte: float | None = None
    """Bits per byte over all held-out texts at the last evaluation. Lower is better. None if unknown."""
    position: list[Count] = Field(default_factory=list)
    """The position in a stream of text; empty if the step alone determines the batch."""
    skipped_steps: list[Count] = Field(default_factory=list)
    """Steps whose batches were skipped because a gradient was not finite."""
    branch: BranchPoint = FROM_BEGINNING
    """Where the run began, if it was branched from another."""


class SavedState(RunState):
    """The content of a state.json. Unknown keys are keys of a later version, and are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    # Every version wrote these keys.
    step: Count
    targets_seen: Count
    seconds: Annotated[float, Field(ge=0.0, lt=1e10)]
    metrics_since_log: dict[str, tuple[_Sums, _Sums]] = Field(default_factory=dict)
    """Total and weight of each training metric since the last log record, summed over ranks."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Raise ValueError for what happened after the step, and for sums that are no tensors."""
        past = [self.branch.step, self.evaluated_step or 0, *self.skipped_steps]
        past += [best.step for best in self.best.values()]
        if max(past) > self.step:
            raise ValueError("a step after the last one")
        for total, weight in self.metrics_since_log.values():
            shape, weight_shape = _shape(total), _shape(weight)
            if weight_shape not in ((), shape):
                raise ValueError("the weight of a metric has neither one number nor the shape of its total")
        return self

    @classmethod
    def read(cls, text: bytes) -> "SavedState":
        """Return the state in the JSON `text`. Raises ValueError or RecursionError if no run wrote it."""
        return cls.model_validate_json(text)

    def metrics_at_step(self) -> Mapping[str, float]:
        """Return the evaluation metrics of this checkpoint's weights. Empty if they were not evaluated at its step."""
        return self.eval_metrics if self.evaluated_step == self.step else {}


def _shape(sums: _Sums) -> tuple[int, ...]:
    """Return the shape of nested lists of numbers. Raises ValueError if their lengths differ."""
    if not isinstance(sums, list):
        return ()
    shapes = {_shape(inner) for inner in sums}
    if len(shapes) > 1:
        raise ValueError("rows of different lengths")
    return (len(sums), *shapes.pop()) if shapes else (0,)
