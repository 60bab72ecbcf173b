"""Dispatch and combine: tokens to the experts' slots and back, by index (Appendix F uses one-hot products).

Legend: G groups, N tokens per group, E experts, C slots per expert, D model, O outputs, B sequences, F hidden, A rows:
the filled slots of all groups, sorted by expert. T = G * N tokens of all groups.

`LocalDispatcher` is for experts that are all in this process. Another dispatcher may use collectives in between; the
layer sees no difference.

# Deviates: the paper computes empty slots as zeros. Here an expert computes only the rows that were sent to it, except
where a grouped product would wait for their number (`products_wait`).
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from switchcli.model.layers import compute_dtype
from switchcli.model.moe.router import Routing


class LocalMeta(NamedTuple):
    """The token, weight and expert of each row that the local experts compute."""

    source_A: torch.Tensor
    """int64: the token of each row, as its index among the G * N tokens of all groups."""
    weight_A: torch.Tensor
    """The factor of the expert's output, in the router's precision."""
    end_E: torch.Tensor
    """int32: the end of each expert's rows."""
    equal_rows: bool
    """Whether every expert has the same number of rows, some of them for empty slots, and products use this."""


class DispatchMeta(Protocol):
    """The data that a dispatcher needs to return the outputs of dispatched rows to their tokens."""

    @property
    def end_E(self) -> torch.Tensor:
        """int32: the end of the rows of each local expert."""

    @property
    def equal_rows(self) -> bool:
        """Whether products may rely on an equal number of rows for each local expert."""


Meta = TypeVar("Meta", bound=DispatchMeta)


class Dispatcher(Protocol[Meta]):
    """Moves tokens to the experts, and the experts' outputs back."""

    def dispatch(self, x_GND: torch.Tensor, routing: Routing, equal_batches: bool) -> tuple[torch.Tensor, Meta]:
        """Return the rows of the local experts, sorted by expert, in the dtype of products: [A, D].

        `equal_batches` says that the batches of all processes have the same size, which only training guarantees.
        """

    def expand_mask(self, mask_BF: torch.Tensor, meta: Meta, length: int) -> torch.Tensor:
        """Return for each dispatched row the mask of its sequence, [A, F]; sequences have `length` positions."""

    def combine(self, y_AO: torch.Tensor, meta: Meta, x_GND: torch.Tensor) -> torch.Tensor:
        """Add each row times its weight to its token: [G, N, O]. A token in no slot stays exactly zero."""


class LocalDispatcher:
    """A dispatcher for experts that are all in this process."""

    def dispatch(self, x_GND: torch.Tensor, routing: Routing, equal_batches: bool) -> tuple[torch.Tensor, LocalMeta]:
        N, C = x_GND.shape[1], routing.token_GEC.shape[2]
        if products_wait(x_GND) and equal_batches and C < N:  # without a capacity the empty slots are too many
            source_A, weight_A = all_slots(routing, N)
            meta = LocalMeta(source_A, weight_A, equal_ends(routing.token_GEC.shape[1], source_A), equal_rows=True)
        else:
            meta = filled_slots(routing, N, exact=x_GND.is_cpu and not torch.compiler.is_compiling())
        return x_GND.to(compute_dtype(x_GND)).flatten(0, 1).index_select(0, meta.source_A), meta

    def expand_mask(self, mask_BF: torch.Tensor, meta: LocalMeta, length: int) -> torch.Tensor:
        # The G * N tokens are also B sequences of `length` positions, end to end.
        return mask_BF.index_select(0, meta.source_A // length)

    def combine(self, y_AO: torch.Tensor, meta: LocalMeta, x_GND: torch.Tensor) -> torch.Tensor:
        G, N, _D = x_GND.shape
        return weighted_scatter_add(y_AO, meta.weight_A, meta.source_A, G * N).view(G, N, -1)


def weighted_scatter_add(
    y_AO: torch.Tensor, weight_A: torch.Tensor, source_A: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """Add each row of `y_AO` times its weight to its token `source_A`: [tokens, O] in the dtype of y."""
    combined: torch.Tensor = _WeightedScatterAdd.apply(y_AO, weight_A, source_A, num_tokens)
    return combined


class _WeightedScatterAdd(torch.autograd.Function):
    """`weighted_scatter_add`. For the backward pass it saves y, but not the product of y and its weight.

    autograd would save y for the product, and the product for `index_add`, which needs only its shape.
    """

    @staticmethod
    def forward(
        ctx: Any, y_AO: torch.Tensor, weight_A: torch.Tensor, source_A: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        ctx.save_for_backward(y_AO if ctx.needs_input_grad[1] else None, weight_A, source_A)
        weighted_AO = y_AO * weight_A.unsqueeze(1).to(y_AO.dtype)
        zeros_TO = weighted_AO.new_zeros(num_tokens, y_AO.shape[1])
        # index_add sums the rows of a token that several experts computed. Compiled by torch 2.11, a function of
        # autograd has no gradients if it returns a tensor that it changed in place.
        if torch.compiler.is_compiling():
            return zeros_TO.index_add(0, source_A, weighted_AO)
        return zeros_TO.index_add_(0, source_A, weighted_AO)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        y_AO, weight_A, source_A = ctx.saved_tensors
        # Each row gets the gradient g of its token: dL/dy = weight * g, and dL/dweight = g . y.
        grad_AO = grad_TO.index_select(0, source_A)
        grad_weight_A = None if y_AO is None else torch.linalg.vecdot(grad_AO, y_AO).to(weight_A.dtype)
        return grad_AO.mul_(weight_A.unsqueeze(1).to(grad_AO.dtype)), grad_weight_A, None, None


def products_wait(x: torch.Tensor) -> bool:
    """Return whether torch's grouped product waits for the device to learn how many rows each expert has."""
    return x.is_cuda and compute_dtype(x) != torch.bfloat16


def all_slots(routing: Routing, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token and the weight of every slot, filled or not: E * G * C rows, sorted by expert.

    The token is its index among the G * N tokens of all groups; the weight of an empty slot is 0.
    """
    token_EGC = routing.token_GEC.transpose(0, 1)
    _, G, C = token_EGC.shape
    first_token_G1 = torch.arange(G, device=token_EGC.device).unsqueeze(1) * group_size
    # An empty slot holds token N, which is out of range. Slot c then carries token c, so that the zeros which the
    # backward pass adds for empty slots go to many tokens and not all to one.
    filler_C = torch.arange(C, device=token_EGC.device) % group_size
    source_A = (token_EGC.where(token_EGC < group_size, filler_C) + first_token_G1).flatten()
    return source_A, routing.weight_GEC.transpose(0, 1).flatten()


def equal_ends(num_experts: int, rows_A: torch.Tensor) -> torch.Tensor:
    """Return the ends of each expert's rows if all experts have equally many: int32 [E]."""
    rows = len(rows_A) // num_experts
    return torch.arange(rows, len(rows_A) + 1, rows, device=rows_A.device, dtype=torch.int32)


def filled_slots(routing: Routing, group_size: int, exact: bool) -> LocalMeta:
    """Return the filled slots: all groups' slots of the first expert, then those of the second, and so on.

    Args:
        routing: the token and weight of every slot.
        group_size: N.
        exact: return as many rows as there are filled slots. Off the CPU, reading their number would wait for the
            device. With False there are always `max_filled_slots` rows: those past the filled slots belong to the last
            expert and have weight 0.
    """
    G, _, C = routing.token_GEC.shape
    # Expert-major, so that the rows of an expert are adjacent. Flat slot s is slot s % C of group s // C % G
    # of expert s // (C * G).
    token_EGC = routing.token_GEC.transpose(0, 1)
    filled_EGC = token_EGC < group_size
    if exact:
        slot_A = filled_EGC.flatten().nonzero().squeeze(1)
    else:
        slot_A = filled_EGC.flatten().nonzero_static(size=routing.max_filled_slots, fill_value=0).squeeze(1)
    # The index among all groups' tokens is the first token of the slot's group, plus the index in that group. Rows past
    # the filled slots (slot_A is 0 there) may read an empty slot, whose index N is out of range: clamp it.
    group_start_A = slot_A // C % G * group_size
    token_A = token_EGC.flatten()[slot_A].clamp(max=group_size - 1)
    weight_A = routing.weight_GEC.transpose(0, 1).flatten()[slot_A]
    num_filled = filled_EGC.sum()
    is_excess_A = torch.arange(len(slot_A), device=slot_A.device) >= num_filled
    weight_A = weight_A.masked_fill(is_excess_A, 0.0)
    end_E = filled_EGC.sum((1, 2)).cumsum(0)
    end_E[-1] = len(slot_A)  # the last expert takes the excess rows
    return LocalMeta(group_start_A + token_A, weight_A, end_E.int(), equal_rows=False)
