"""Settings of distillation (distillation.py)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from switchcli.model.decoding import Decoding
from switchcli.model.moe.router import Policy
from switchcli.spec import MAX_COUNT, PathOrUrl, Spec

_DECODING: Mapping[str, Any] = MappingProxyType({"temperature": 1.0})
"""How a student answers by default."""


class DistillSpec(Spec):
    """The teacher of a run, and how much its probabilities count."""

    teacher: PathOrUrl
    """A run's folder (its newest checkpoint), one checkpoint, or a folder in the Hugging Face layout; `--teacher`."""
    soft_fraction: float = Field(default=0.25, ge=0.0, le=1.0)
    """Weight f of the teacher's probabilities: 0.25 in the paper's best row of Table 6, 1 in its rows without a
    mixture, 0 to train without a teacher."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Temperature T of both softmaxes; the paper gives none, and Mesh-TensorFlow has no default."""
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Divergence of the student p and the teacher q, times T**2: `forward_kl` of q from p (the paper's), `reverse_kl`
    of p from q, or `jsd`, the mean of those of both from their mixture, weighted by beta."""
    beta: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Weight of the teacher in the mixture of `jsd`; towards 0 it is like forward KL, towards 1 like reverse KL; 0.5 if
    absent."""
    targets: Literal["data", "student"] = "data"
    """Targets to learn from: those of the `data`, or of tasks those that the `student` generates in `student_fraction`
    of the steps."""
    student_fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    """Fraction of the steps on the student's answers, with `targets: student`; they have no hard loss. Absent: 0.5."""
    decoding: Decoding | None = None
    """How answers are generated. By default a student samples at a `temperature` of 1, also if other keys of the
    decoding are given."""
    start_step: int = Field(default=0, ge=0, le=MAX_COUNT)
    """First step that uses the teacher; before it the loss is that of the targets alone."""
    capacity: Policy = "dropless"
    """How the teacher's routers count capacity: `dropless`, `paper`, or a factor."""
    mode: Literal["evaluation", "training"] = "evaluation"
    """`training` runs the teacher with its dropout, jitter and training capacity, as in Mesh-TensorFlow."""
    baseline: float | PathOrUrl | None = None
    """The dense model that student and teacher are compared with: its checkpoint, or its neg. log perplexity, on tasks
    its score; `--baseline`."""

    @property
    def answer_decoding(self) -> Decoding:
        """How answers are generated."""
        return self.decoding or Decoding(**_DECODING)

    @property
    def on_policy_fraction(self) -> float:
        """The fraction of the steps on the student's answers."""
        return 0.0 if self.targets != "student" else self.student_fraction or 0.5

    @property
    def mixture(self) -> float:
        """The b of the soft part (distillation.py): 0 for forward KL, 1 for reverse KL, beta for the mean of both."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.beta or 0.5}[self.loss]

    @model_validator(mode="before")
    @classmethod
    def _complete_decoding(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not isinstance(given := value.get("decoding"), Mapping):
            return value
        return {**value, "decoding": {**_DECODING, **given}}

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        for key, choice, value in (("beta", "loss", "jsd"), ("student_fraction", "targets", "student")):
            if getattr(self, key) is not None and getattr(self, choice) != value:
                raise ValueError(
                    f"{key} ({getattr(self, key)}): has no effect with {choice}={getattr(self, choice)}: leave it out, "
                    f"or take {choice}={value}"
                )
        if self.decoding is not None and self.targets == "data":
            raise ValueError("decoding: has no effect with targets=data: leave it out, or take student")
        return self

    @model_validator(mode="after")
    def _probabilities_suffice(self) -> Self:
        if self.targets == "student" and not self.soft_fraction:
            raise ValueError(
                "targets (student): the student's answers are scored by the teacher, and soft_fraction is 0: set it, "
                "such as to 0.25"
            )
        if self.targets == "student" and self.decoding is not None and self.decoding.seed:
            raise ValueError("decoding.seed: a student's answers follow from train.seed and the step: leave it out")
        return self
