"""Dispatch and combine: tokens to the experts' slots and back, by index (Appendix F does it with one-hot products).

Legend: G groups, N tokens a group, E experts, C slots an expert, D model, O outputs, B sequences, F hidden, A rows: the
filled slots of all experts, end to end.

`Local` keeps all experts in this process. Another dispatcher may put a collective in between: the layer does not know.

# Deviates: the paper computes empty slots, as zeros; here an expert gets the rows that were sent to it.
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from switchcli.model.layers import compute_dtype
from switchcli.model.moe.router import Routing


class LocalMeta(NamedTuple):
    """Where each row that goes to an expert comes from, the first expert's rows first."""

    source_A: torch.Tensor
    """int64: which of the G * N tokens, all groups end to end."""
    weight_A: torch.Tensor
    """What the expert's output is multiplied by, float32."""
    end_E: torch.Tensor
    """int32: the end of each expert's rows."""


class DispatchMeta(Protocol):
    """What a dispatcher needs to have back what it sent."""

    @property
    def end_E(self) -> torch.Tensor:
        """int32: the end of the rows of each expert that is here."""


S = TypeVar("S", bound=DispatchMeta)


class Dispatcher(Protocol[S]):
    """The way of the tokens to the experts, and back."""

    def dispatch(self, x_GND: torch.Tensor, routing: Routing, learns: bool) -> tuple[torch.Tensor, S]:
        """The rows of the experts that are here, the first one's first, in the type of products: [A, D].

        `learns`: this is training, where every process has a batch of the same size.
        """

    def expand_mask(self, mask_BF: torch.Tensor, sent: S, length: int) -> torch.Tensor:
        """To each row that was sent, what belongs to its sequence of `length` positions: [A, F]."""

    def combine(self, y_AO: torch.Tensor, sent: S, x_GND: torch.Tensor) -> torch.Tensor:
        """Add each row times its weight to its token: [G, N, O]; a token in no slot stays exactly zero."""


class LocalDispatcher:
    """The way there and back when every expert is here."""

    def dispatch(self, x_GND: torch.Tensor, routing: Routing, learns: bool) -> tuple[torch.Tensor, LocalMeta]:
        """Gather the token of each filled slot, in the type that products are computed in: [A, D]."""
        rows = filled_slots(routing, x_GND.shape[1], exact=x_GND.is_cpu)
        return x_GND.to(compute_dtype(x_GND)).flatten(0, 1).index_select(0, rows.source_A), rows

    def expand_mask(self, mask_BF: torch.Tensor, rows: LocalMeta, length: int) -> torch.Tensor:
        """[A, F]."""
        return mask_BF.index_select(0, rows.source_A // length)

    def combine(self, y_AO: torch.Tensor, rows: LocalMeta, x_GND: torch.Tensor) -> torch.Tensor:
        """Add each row times its weight to its token: [G, N, O]; a token in no slot stays exactly zero."""
        G, N, _D = x_GND.shape
        return weighted_scatter_add(y_AO, rows.weight_A, rows.source_A, G * N).view(G, N, -1)


def weighted_scatter_add(
    y_AO: torch.Tensor, weight_A: torch.Tensor, source_A: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """Each row times its weight, added to the token `source_A` that it came from: [tokens, O] in the type of y."""
    combined: torch.Tensor = _WeightedScatterAdd.apply(y_AO, weight_A, source_A, num_tokens)  # type: ignore[no-untyped-call]
    return combined


class _WeightedScatterAdd(torch.autograd.Function):
    """Keeps what an expert said, not its product with the weight: `index_add` would keep that for its shape alone."""

    @staticmethod
    def forward(
        ctx: Any, y_AO: torch.Tensor, weight_A: torch.Tensor, source_A: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        ctx.save_for_backward(y_AO if ctx.needs_input_grad[1] else None, weight_A, source_A)
        weighted_AO = y_AO * weight_A.unsqueeze(1).to(y_AO.dtype)
        return weighted_AO.new_zeros(num_tokens, y_AO.shape[1]).index_add_(0, source_A, weighted_AO)

    @staticmethod
    def backward(ctx: Any, gradient_NO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        y_AO, weight_A, source_A = ctx.saved_tensors
        gradient_AO = gradient_NO.index_select(0, source_A)
        for_weight_A = None if y_AO is None else torch.linalg.vecdot(gradient_AO, y_AO).to(weight_A.dtype)
        return gradient_AO.mul_(weight_A.unsqueeze(1).to(gradient_AO.dtype)), for_weight_A, None, None


def filled_slots(routing: Routing, group_size: int, exact: bool) -> LocalMeta:
    """The filled slots in order, of all groups together for each expert.

    `exact`: as many rows as there are filled slots. Off the CPU their number would have to be waited for: then there
    are `most_rows`, and those too many go through the last expert and give their token nothing.
    """
    G, _, C = routing.token_GEC.shape
    token_EGC = routing.token_GEC.transpose(0, 1)
    filled_EGC = token_EGC < group_size
    if exact:
        slot_A = filled_EGC.flatten().nonzero().squeeze(1)
    else:
        slot_A = filled_EGC.flatten().nonzero_static(size=routing.max_filled_slots, fill_value=0).squeeze(1)
    num_rows = filled_EGC.sum()
    start_A = slot_A // C % G * group_size
    token_A = token_EGC.flatten()[slot_A].clamp(max=group_size - 1)
    weight_A = routing.weight_GEC.transpose(0, 1).flatten()[slot_A]
    weight_A = weight_A.masked_fill(torch.arange(len(slot_A), device=slot_A.device) >= num_rows, 0.0)
    end_E = filled_EGC.sum((1, 2)).cumsum(0)
    end_E[-1] = len(slot_A)
    return LocalMeta(start_A + token_A, weight_A, end_E.int())
