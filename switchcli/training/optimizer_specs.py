"""Settings of the optimizers. The optimizers themselves are in optimizers.py, which needs torch; a recipe does not."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from switchcli.spec import Spec

if TYPE_CHECKING:
    from switchcli.training.optimizers import Layouts, NamedParameters, Optimizer

UNSHARDED: Layouts = MappingProxyType({})
"""The layouts of parameters of which each rank has all values."""


class Adafactor(Spec):
    """Adafactor (Shazeer and Stern 2018, Algorithms 4 to 6) as T5 runs it: no momentum, factored second moments,
    updates relative to the weight.

    Update of parameter w from gradient g at step t = 1, 2, ...:

        decay_t = 1 - t**-0.8
        v = decay_t v + (1 - decay_t) (g**2 + epsilon)
        u = g / sqrt(v)
        u = u / max(1, RMS(u))
        w = w - learning_rate max(0.001, RMS(w)) u

    If the last two dims are both at least 128, as in T5, only the row means R and the column means C of v are stored,
    and v is approximated by R C / mean(R).

    # Deviates: Mesh-TensorFlow factors the two largest dims and takes both RMS over all experts of a stacked weight;
    # here the last two dims are factored and each RMS is one expert's own: the update is the same at any sharding.
    """

    kind: Literal["adafactor"] = "adafactor"
    """`adafactor` is Adafactor as T5 runs it."""
    epsilon: float = Field(default=1e-30, gt=0.0)
    """Constant added to squared gradients; 1e-30 as in the Adafactor paper."""
    scale_by_parameter: bool = True
    """Multiply updates by the root mean square of the weight; if false, the learning rate is absolute."""

    def build(self, parameters: NamedParameters, layouts: Layouts = UNSHARDED) -> Optimizer:
        """Return the optimizer of these parameters."""
        from switchcli.training.optimizers import AdafactorOptimizer

        return AdafactorOptimizer(self, parameters, layouts)


class AdamW(Spec):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), by torch's fused kernel.

    Norm scales and position biases are decayed like all other weights.

    With `scale_by: rms` the step of a weight w is multiplied by max(0.001, RMS(w)), as Adafactor's is, and its decay is
    not (AdamWScale of nanoT5, Nawrot 2023). RMS is that of one expert in a stack, and of the full weight if it is
    sharded. This is not torch's kernel, and takes memory for two copies of the largest weight during a step.
    """

    kind: Literal["adamw"] = "adamw"
    """`adamw` is Adam with decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of the mean of gradients."""
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of the mean of squared gradients."""
    epsilon: float = Field(default=1e-8, gt=0.0)
    """Constant added to the denominator of an update."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Fraction of a weight that each step subtracts, times the learning rate."""
    scale_by: Literal["none", "rms"] = "none"
    """`rms` multiplies the step of each matrix, and of each expert, by the root mean square of its weights, at least
    0.001: the learning rate is then relative, as with Adafactor."""

    def build(self, parameters: NamedParameters, layouts: Layouts = UNSHARDED) -> Optimizer:
        """Return the optimizer of these parameters."""
        from switchcli.training.optimizers import AdamWOptimizer

        return AdamWOptimizer(self, parameters, layouts)


class Muon(Spec):
    """Muon (Jordan et al. 2024) for hidden matrices; AdamW for embeddings, softmax, routers, position biases and norms.

    Update of a matrix w [A, B] from its gradient g:

        m = momentum m + (1 - momentum) g
        u = momentum m + (1 - momentum) g
        w = w - learning_rate weight_decay w - learning_rate 0.2 sqrt(max(A, B)) NewtonSchulz(u)

    NewtonSchulz brings all singular values of u near 1, in float32 and five steps. The factor 0.2 sqrt(max(A, B)) gives
    steps of AdamW's size, so that both take the same learning rate (Liu et al. 2025, Muon is Scalable, section 2.2). In
    a stack each expert is a matrix of its own. An expert that gets no token still moves, by the direction of its past.
    """

    kind: Literal["muon"] = "muon"
    """`muon` makes steps of the matrices in blocks and experts orthogonal, and is AdamW for all other weights."""
    momentum: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of the mean of gradients of hidden matrices, which is also the weight of Nesterov's look ahead."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of AdamW's mean of gradients, for all other weights."""
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of AdamW's mean of squared gradients."""
    epsilon: float = Field(default=1e-8, gt=0.0)
    """Constant added to the denominator of an update of AdamW."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """Fraction of any weight that each step subtracts, times the learning rate; 0.1 as in Muon is Scalable."""

    def build(self, parameters: NamedParameters, layouts: Layouts = UNSHARDED) -> Optimizer:
        """Return the optimizer of these parameters."""
        from switchcli.training.optimizers import MuonOptimizer

        return MuonOptimizer(self, parameters, layouts)


OptimizerSpec = Annotated[Adafactor | AdamW | Muon, Field(discriminator="kind")]
