"""The settings of a training run that belong to no single object: lengths, batches, and what happens how often."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from switchcli.model.moe.router import Policy
from switchcli.model.surgery.student import FromTeacherInit
from switchcli.spec import MOST, Place, Spec

Precision = Literal["float32", "bfloat16", "selective"]


class NonfiniteSpec(Spec):
    """What a run does about a number that is not finite: in the gradient of a step, or in what is to be evaluated or
    saved after it."""

    policy: Literal["stop", "skip", "roll_back"] = "stop"
    """`stop`: the run ends. `skip`: the step changes nothing, as if its batch were not there; what is lost after the
    update ends the run. `roll_back`: weights and optimizer are again those of the newest checkpoint, and the batches
    since then are left out: that of a stop, where there is one, so that what is left out hangs on where a run was
    stopped. The last two look at each gradient before it is used: a GPU is waited for in each step."""
    at_most: int = Field(default=10, ge=1, le=MOST["count"])
    """How often in a run: the next time it ends all the same."""


class TrainSpec(Spec):
    """How long, on how much, from which seed."""

    steps: int = Field(ge=1, le=MOST["steps"])
    """Optimizer steps of the whole run."""
    batch_tokens: int = Field(ge=1, le=MOST["batch_tokens"])
    """Encoder input tokens of one optimizer step, over all ranks and microbatches (the paper's 2**20)."""
    microbatch_tokens: int | None = Field(default=None, ge=1, le=MOST["batch_tokens"])
    """Encoder input tokens of one forward pass on one rank; a step is accumulated from as many as it takes.

    Absent: each rank takes its whole share at once. Dropout and jitter are drawn for each microbatch, so a run whose
    noise is to be the same on any number of ranks sets this.
    """
    seed: int = Field(default=0, ge=0, lt=2**31)
    precision: Precision = "float32"
    """`selective`: products in bfloat16; weights, optimizer, losses and the router stay float32 (section 2.4).
    `bfloat16`: the router in bfloat16 too, the paper's other arm, which diverges (Table 2)."""
    compile: bool = False
    """torch.compile for attention and dense feed-forwards: the first steps take longer, by minutes on a CPU."""
    activation_checkpointing: Literal["none", "blocks"] = "none"
    """`blocks`: each block keeps its inputs alone and is computed again on the way back, with the same noise: far fewer
    activations, a quarter to a third more time, the same gradients."""
    clip_norm: float | None = Field(default=None, gt=0.0)
    """Largest global gradient norm; absent: no clipping, as in T5."""
    nonfinite: NonfiniteSpec = NonfiniteSpec()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = Field(default=1, ge=0, le=MOST["threads"])
    """Threads of each rank that make batches while the model computes; 0: the step makes its own. What is in a batch
    does not depend on it."""
    batches_ahead: int = Field(default=2, ge=1, le=MOST["threads"])
    """Steps whose batches are made before they are asked for, at most."""

    @property
    def router_dtype(self) -> torch.dtype:
        """What routers compute in."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


class StartSpec(Spec):
    """What a run begins with that does not begin from scratch."""

    checkpoint: Place
    """A run's folder (its newest is taken), one checkpoint's, or a folder in the Hugging Face layout; `--model`."""
    optimizer: Literal["carry", "reset"] = "carry"
    """Go on with the checkpoint's optimizer state, as T5 does, or with a new one. A converted checkpoint has none."""


class RandomInit(Spec):
    """A student starts from initial weights."""

    kind: Literal["random_init"] = "random_init"


class FromCheckpoint(Spec):
    """A student starts from one that is there."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: Place
    """A run's folder, one checkpoint's, or a folder in the Hugging Face layout; `--student`."""


StudentSpec = Annotated[FromTeacherInit | RandomInit | FromCheckpoint, Field(discriminator="kind")]


class LogSpec(Spec):
    """Metrics go to metrics.jsonl always; trackers are other places that get them too."""

    every_steps: int = Field(default=10, ge=1, le=MOST["steps"])
    sample_every_steps: int | None = Field(default=None, ge=1, le=MOST["steps"])
    """Fill in two held-out texts on the console every so many steps; absent: at the end alone."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class EvalSpec(Spec):
    """Held-out neg. log perplexity, before the first step, every so many, and at the end."""

    every_steps: int = Field(default=100, ge=1, le=MOST["steps"])
    sequences: int = Field(default=64, ge=1, le=MOST["count"])
    """Held-out sequences in each evaluation: the same ones each time, at most as many as there are."""
    capacity: Policy = "paper"
    """`paper`: routers count by eval_capacity_factor; `dropless`: a slot for every token, but for expert_choice, which
    has its own number."""


class CheckpointSpec(Spec):
    """Which checkpoints are written and which are kept."""

    save_every_steps: int = Field(default=500, ge=1, le=MOST["steps"])
    keep_last: int = Field(default=2, ge=1, le=MOST["count"])
    """2 by default: if the newest is damaged, the one before it still serves."""
    keep_best: bool = True
    """Keep those with the highest figures besides, one for each (of pre-training the held-out neg. log perplexity), of
    those saved at an evaluated step."""
    background: bool = False
    """Write a checkpoint in a thread while training goes on, which waits for a copy of weights and optimizer alone.

    It costs that copy in the host's memory, on each rank that of its share (twice, of weights that are cut), and on a
    CPU the time that writing takes from the steps beside it. One save at a time: the next waits for the last, a stop
    and the end for what is under way. One that fails ends the run, with the step then taken."""
