"""Settings of a training run that belong to no single object: its length, batches, evaluation, logs and checkpoints."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from switchcli.model.config import Precision, router_dtype
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
