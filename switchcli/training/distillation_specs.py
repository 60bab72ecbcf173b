"""Settings of distillation: its loss (distillation.py), and the cache of the teacher (teacher_cache.py)."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from switchcli.model.decoding import Decoding
from switchcli.model.moe.router import Policy
from switchcli.spec import MAX_COUNT, PathOrUrl, Size, Spec

if TYPE_CHECKING:
    import torch


class TeacherCacheSpec(Spec):
    """Where a teacher's probabilities are cached, and how many of each target."""

    folder: PathOrUrl
    """Folder of the cache, which is created if missing; before training the teacher runs on what it lacks."""
    top_k: Size = 64
    """Largest probabilities cached for each target, at most the vocabulary; of all others their sum is cached."""
    precision: Literal["float16", "float32"] = "float16"
    """Type of the cached probabilities; a token id takes 2 bytes, or 4 with a vocabulary above 65,536."""

    @property
    def dtype(self) -> "torch.dtype":
        import torch

        return torch.float16 if self.precision == "float16" else torch.float32


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
    of p from q, or `jsd`, the mean of both from their mixture."""
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Weight of the teacher in the mixture of `jsd`; towards 0 it is like forward KL, towards 1 like reverse KL."""
    targets: Literal["data", "teacher", "student"] = "data"
    """Targets to learn from: those of the `data`, or of tasks the answers of the `teacher`, generated once into the
    cache (sequence-level distillation), or those that the `student` generates in `student_fraction` of the steps."""
    student_fraction: float = Field(default=0.5, gt=0.0, le=1.0)
    """Fraction of the steps on the student's answers, with `targets: student`; they have no hard loss."""
    decoding: Decoding | None = None
    """How answers are generated; absent: beam search with 4 beams by a teacher, sampling at temperature 1 by a
    student."""
    start_step: int = Field(default=0, ge=0, le=MAX_COUNT)
    """First step that uses the teacher; before it the loss is that of the targets alone."""
    capacity: Policy = "dropless"
    """How the teacher's routers count capacity: `dropless`, `paper`, or a factor."""
    mode: Literal["evaluation", "training"] = "evaluation"
    """`training` runs the teacher with its dropout, jitter and training capacity, as in Mesh-TensorFlow."""
    cache: TeacherCacheSpec | None = None
    """Where the teacher's probabilities are stored before training; by default the teacher runs in every step."""
    baseline: float | PathOrUrl | None = None
    """The dense model that student and teacher are compared with: its checkpoint or its metric; `--baseline`."""

    @property
    def teacher_decoding(self) -> Decoding:
        """How a teacher answers."""
        return self.decoding or Decoding(beams=4)

    @property
    def student_decoding(self) -> Decoding:
        """How a student answers."""
        return self.decoding or Decoding(temperature=1.0)

    @property
    def mixture(self) -> float:
        """The b of the soft part (distillation.py): 0 for forward KL, 1 for reverse KL, beta for the mean of both."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.beta}[self.loss]

    @model_validator(mode="after")
    def _probabilities_suffice(self) -> Self:
        if self.targets == "student" and self.cache is not None:
            raise ValueError(
                "targets (student): the answers change with the student, and a cache holds the teacher's probabilities "
                "of targets that stay: leave cache out, or take targets=teacher"
            )
        if self.targets == "student" and not self.soft_fraction:
            raise ValueError(
                "targets (student): the student's answers are scored by the teacher, and soft_fraction is 0: set it, "
                "such as to 0.25"
            )
        if self.targets == "teacher" and self.cache is None:
            raise ValueError("targets (teacher): the answers are stored: name a folder by cache.folder")
        if self.cache is not None and self.loss == "jsd":
            raise ValueError(
                "loss (jsd): needs the teacher's probabilities of all tokens, and a cache has the largest: leave cache "
                "out, or take forward_kl or reverse_kl"
            )
        if self.cache is not None and self.mode == "training":
            raise ValueError(
                "mode (training): the teacher's noise differs in each step and cannot be cached: take evaluation"
            )
        return self
