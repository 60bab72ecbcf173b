"""Settings of distillation (distillation.py)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from switchcli.spec import PathOrUrl, Spec


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
    absent. Near the teacher the gradient is beta (1 - beta) times that of forward KL, a quarter at 0.5."""
    targets: Literal["data", "student"] = "data"
    """Targets to learn from: those of the `data`, or on tasks what the `student` itself answers in each step, which has
    no hard loss."""
    baseline: float | PathOrUrl | None = None
    """The dense model that student and teacher are compared with: its checkpoint, or its neg. log perplexity, on tasks
    its score; `--baseline`."""

    @property
    def mixture(self) -> float:
        """The b of the soft part (distillation.py): 0 for forward KL, 1 for reverse KL, beta for the mean of both."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.beta or 0.5}[self.loss]

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        if self.beta is not None and self.loss != "jsd":
            raise ValueError(f"beta ({self.beta}): has no effect with loss={self.loss}: leave it out, or take loss=jsd")
        if self.targets == "student" and not self.soft_fraction:
            raise ValueError(
                "targets (student): the student's answers are scored by the teacher, and soft_fraction is 0: set it, "
                "such as to 0.25"
            )
        return self
