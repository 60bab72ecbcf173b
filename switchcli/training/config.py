"""Settings of a training run that belong to no single object: its length, batches, evaluation, logs and checkpoints.

Also those of scoring (scoring.py) and of distillation (distillation.py).
"""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from switchcli.model.config import Precision, router_dtype
from switchcli.model.decoding import Search
from switchcli.model.moe.router import Policy
from switchcli.model.surgery.student_spec import FromTeacherInit
from switchcli.spec import Count, PathOrUrl, Spec

if TYPE_CHECKING:
    import torch


class TrainSpec(Spec):
    """Length, batch size, precision and seed of a training run."""

    steps: Count
    """Optimizer steps of the whole run."""
    batch_tokens: Count
    """Encoder input tokens of one optimizer step, over all ranks and microbatches (2**20 in the paper)."""
    microbatch_tokens: Count | None = None
    """Encoder input tokens of one forward pass on one rank; gradients are accumulated over a rank's microbatches.

    By default a rank processes its share of the batch in one pass. Dropout and jitter are drawn for each microbatch, so
    set this where the noise must be the same on any number of ranks.
    """
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the initial weights, the order of the data, dropout and jitter."""
    precision: Precision = "float32"
    """`selective` computes matrix products in bfloat16 and keeps weights, optimizer, losses and routers in float32
    (section 2.4); `bfloat16` also computes the routers in bfloat16, which diverged in the paper (Table 2)."""
    compile: bool = False
    """Apply torch.compile to every block, sparse layers included; the first steps take longer.

    It is meant for GPUs: on a CPU compiled steps are not faster. Where a sparse layer or the model axis sends tensors
    to other ranks, only sublayers without experts are compiled. On CUDA, blocks that are compiled whole and have heads
    of at least 16 train with torch's flex_attention, unless torch is deterministic.
    """
    activation_checkpointing: Literal["none", "blocks"] = "none"
    """`blocks` stores only the inputs of each block and recomputes the rest in the backward pass with the same noise:
    far less memory for activations, a quarter to a third more time, the same gradients."""
    clip_norm: float | None = Field(default=None, gt=0.0)
    """Largest global gradient norm; no clipping by default, as in T5."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a gradient is not finite: `stop` ends the run, `skip` leaves the step out, at most 10 times in a
    run. With `skip` each gradient is checked before it is used, so every step waits for the GPU. A held-out metric or a
    value about to be saved that is not finite always ends the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; `auto` takes a GPU if there is one."""

    @property
    def router_dtype(self) -> "torch.dtype":
        """The dtype that routers compute in."""
        return router_dtype(self.precision)


class StartSpec(Spec):
    """The checkpoint that a run starts from, instead of initial weights, and what the run keeps of it."""

    checkpoint: PathOrUrl
    """A run's folder (its newest checkpoint), one checkpoint, or a folder in the Hugging Face layout; `--model`. With
    `keep: run` also RUN@STEP; `--branch-from`."""
    keep: Literal["weights", "optimizer", "run"] = "optimizer"
    """`weights` begins with a new optimizer. `optimizer` continues with the optimizer state too, as T5 does; a
    converted checkpoint has none, and a folder in the Hugging Face layout has the default `weights`. `run` continues
    that run of the same verb as a branch with other settings: its steps and its position in the data too."""


class RandomInit(Spec):
    """Start a student from initial weights."""

    kind: Literal["random_init"] = "random_init"
    """`random_init` starts from initial weights."""


class FromCheckpoint(Spec):
    """Start a student from a checkpoint."""

    kind: Literal["checkpoint"] = "checkpoint"
    """`checkpoint` starts from a checkpoint."""
    path: PathOrUrl
    """A run's folder, one checkpoint, or a folder in the Hugging Face layout; `--student`."""


StudentSpec = Annotated[FromTeacherInit | RandomInit | FromCheckpoint, Field(discriminator="kind")]


class LogSpec(Spec):
    """How often metrics are logged, and where; metrics.jsonl always gets them."""

    every_steps: Count = 10
    """Steps between two log records."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that also get the metrics."""


class EvalSpec(Spec):
    """Evaluation on held-out text, before the first step, regularly, and at the end."""

    every_steps: Count = 100
    """Steps between two evaluations."""
    sequences: Count = 64
    """Held-out sequences of each evaluation, the same ones each time; all of them if there are fewer."""
    capacity: Policy | None = None
    """How routers count capacity outside training: `paper` is the router's eval_capacity_factor, `dropless` a slot for
    every token (expert_choice keeps its own capacity), a number replaces the factor. Absent: `paper` for held-out text,
    `dropless` for answers to tasks and for a teacher."""


class CheckpointSpec(Spec):
    """How often checkpoints are saved, and which are kept."""

    save_every_steps: Count = 500
    """Steps between two checkpoints."""
    keep_last: Count = 2
    """Newest checkpoints that are kept; 2 by default, so that one remains if the newest is damaged."""
    keep_best: bool = True
    """Also keep, for each evaluation metric, the best of the checkpoints that were saved at an evaluated step."""
    keep_steps: tuple[Count, ...] = ()
    """Steps whose checkpoints are saved and never removed, such as those to branch from (`--branch-from RUN@STEP`); a
    step that the run does not take has no effect."""


class ScoringSpec(Spec):
    """How a model answers the examples of tasks, and how its answers are scored."""

    split: Literal["validation", "test"] = "validation"
    """Split of each task that is scored."""
    examples: Count | None = None
    """Examples of each task, at most: a random sample, the same in each evaluation, that keeps all answers to a
    question together; by default all examples."""
    batch_examples: Count = 32
    """Examples that one rank answers together."""
    by: Literal["generation", "likelihood"] = "generation"
    """`generation` decodes an answer. `likelihood` answers with the label of the task that has the highest probability,
    the first one of equals, so no answer is malformed; each task must have labels. The probability of a label is that
    of all its tokens and its EOS, without a correction for its length; `decoding` does not apply."""
    decoding: Search = Search()
    """How answers are decoded."""


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
