"""Experts over ranks: each holds a slice of every stacked weight; tokens go to it and back (paper section 5, eq. 7).

Legend: G groups, N tokens a group, E experts, L experts on this rank, R ranks that share them, C slots an expert,
D model, O outputs, F hidden, B sequences, Z sequences of all those ranks, A rows that this rank's experts get, S rows
that it sends.

With a capacity the buffer [E, G, C, D] has the same size on every rank: one all-to-all of equal parts each way, nothing
to agree on first and no wait for the device. It does not grow with the number of experts, as C falls with it (down to
the router's `min_capacity`). Where every token has a slot (dropless) it would, so the ranks tell each other how many
rows there are and send those.

What an empty slot carries is some token's row: it weighs 0 on the way back, and so in the gradient.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from switchcli.distributed.gather import all_gather
from switchcli.distributed.lost import explain_lost_ranks
from switchcli.distributed.mesh import CommDtype, RankGroup, to_comm_dtype
from switchcli.model.layers import compute_dtype
from switchcli.model.moe.dispatch import filled_slots, weighted_scatter_add
from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.moe.router import Routing


class AllToAllMeta(NamedTuple):
    """What this rank sent, and what it needs to have it back."""

    source_S: torch.Tensor
    """int64: which of the G * N tokens each row is, all groups end to end."""
    weight_S: torch.Tensor
    """What its output is multiplied by, in the router's precision."""
    end_E: torch.Tensor
    """int32 [L]: the end of each of this rank's experts' rows."""
    parts: "SplitSizes"
    order_A: torch.Tensor | None
    """int64: the place of each row in what arrived; None where that is [R, L, rows] of equal size."""


class SplitSizes(NamedTuple):
    """How many rows go to each rank of the group, and come from it; None: as many to and from each."""

    sent: list[int] | None
    received: list[int] | None

    def swapped(self) -> "SplitSizes":
        return SplitSizes(self.received, self.sent)


class AllToAllDispatcher:
    """The way there and back when the experts lie on the ranks of a group."""

    def __init__(self, ranks: RankGroup, num_experts: int, comm_dtype: CommDtype) -> None:
        self._ranks, self._comm_dtype = ranks, comm_dtype
        self._num_local = num_experts // ranks.size

    def dispatch(self, x_GND: torch.Tensor, routing: Routing, learns: bool) -> tuple[torch.Tensor, AllToAllMeta]:
        """The rows of this rank's experts, those of the first before those of the second, from all ranks: [A, D]."""
        N, C = x_GND.shape[1], routing.token_GEC.shape[2]
        # Outside training the ranks' batches may differ in size: then the parts do.
        sent = self._by_slots(routing, N) if learns and C < N else self._by_rows(routing, N)
        x_SD = x_GND.to(compute_dtype(x_GND)).flatten(0, 1).index_select(0, sent.source_S)
        return self._arrange(exchange(x_SD, sent.parts, self._ranks, self._comm_dtype), sent), sent

    def expand_mask(self, mask_BF: torch.Tensor, sent: AllToAllMeta, length: int) -> torch.Tensor:
        """The mask of each row's sequence: [A, F]. `mask_BF` is that of this rank's sequences, of `length` each."""
        R, B = self._ranks.size, len(mask_BF)
        masks_ZF = mask_BF.new_empty(R * B, mask_BF.shape[1])
        all_gather(masks_ZF, mask_BF.contiguous(), self._ranks.group)
        sequence_S = sent.source_S // length + B * self._ranks.rank
        sequence_A = self._arrange(exchange(sequence_S, sent.parts, self._ranks, self._comm_dtype), sent)
        return masks_ZF.index_select(0, sequence_A)

    def combine(self, y_AO: torch.Tensor, sent: AllToAllMeta, x_GND: torch.Tensor) -> torch.Tensor:
        """Each row's output times its weight, added to its token: [G, N, O]; a token in no slot stays exactly zero."""
        G, N, _D = x_GND.shape
        R, L, O = self._ranks.size, self._num_local, y_AO.shape[1]  # noqa: E741 (the legend's letter)
        if sent.order_A is None:
            y_AO = y_AO.view(L, R, -1, O).transpose(0, 1).reshape(-1, O)
        else:
            y_AO = torch.empty_like(y_AO).index_copy(0, sent.order_A, y_AO)
        y_SO = exchange(y_AO, sent.parts.swapped(), self._ranks, self._comm_dtype)
        return weighted_scatter_add(y_SO, sent.weight_S, sent.source_S, G * N).view(G, N, O)

    def _by_slots(self, routing: Routing, group_size: int) -> AllToAllMeta:
        """Every slot, filled or not."""
        token_EGC = routing.token_GEC.transpose(0, 1)
        _, G, C = token_EGC.shape
        first_G1 = torch.arange(G, device=token_EGC.device).unsqueeze(1) * group_size
        others_C = torch.arange(C, device=token_EGC.device) % group_size  # what empty slots carry: not all the same
        source_S = (token_EGC.where(token_EGC < group_size, others_C) + first_G1).flatten()
        rows = self._ranks.size * G * C
        end_E = torch.arange(rows, rows * self._num_local + 1, rows, device=source_S.device, dtype=torch.int32)
        return AllToAllMeta(source_S, routing.weight_GEC.transpose(0, 1).flatten(), end_E, SplitSizes(None, None), None)

    def _by_rows(self, routing: Routing, group_size: int) -> AllToAllMeta:
        """The filled slots alone; waits for the device."""
        rows = filled_slots(routing, group_size, exact=True)
        count_RL = rows.end_E.diff(prepend=rows.end_E.new_zeros(1)).long().view(self._ranks.size, self._num_local)
        theirs_RL = torch.empty_like(count_RL)
        with explain_lost_ranks():
            dist.all_to_all_single(theirs_RL, count_RL, group=self._ranks.group)
        expert_A = torch.arange(self._num_local, device=theirs_RL.device).repeat(self._ranks.size)
        order_A = expert_A.repeat_interleave(theirs_RL.flatten()).argsort(stable=True)
        parts = SplitSizes(count_RL.sum(1).tolist(), theirs_RL.sum(1).tolist())
        return AllToAllMeta(rows.source_A, rows.weight_A, theirs_RL.sum(0).cumsum(0).int(), parts, order_A)

    def _arrange(self, x_AD: torch.Tensor, sent: AllToAllMeta) -> torch.Tensor:
        """What arrived, by rank, put by expert."""
        if sent.order_A is not None:
            return x_AD.index_select(0, sent.order_A)
        rest = x_AD.shape[1:]
        return x_AD.view(self._ranks.size, self._num_local, -1, *rest).transpose(0, 1).reshape(-1, *rest)


def exchange(x_SD: torch.Tensor, parts: SplitSizes, ranks: RankGroup, comm_dtype: CommDtype) -> torch.Tensor:
    """All-to-all: the first rows to the first rank of the group, and so on; the gradient goes the same way back."""
    received: torch.Tensor = _Exchange.apply(x_SD, parts, ranks, comm_dtype)  # type: ignore[no-untyped-call]
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SD: torch.Tensor, parts: SplitSizes, ranks: RankGroup, comm_dtype: CommDtype
    ) -> torch.Tensor:
        ctx.parts, ctx.ranks, ctx.comm_dtype = parts, ranks, comm_dtype
        return _all_to_all(x_SD, parts, ranks, comm_dtype)

    @staticmethod
    def backward(ctx: Any, gradient_AD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(gradient_AD, ctx.parts.swapped(), ctx.ranks, ctx.comm_dtype), None, None, None


def _all_to_all(x_SD: torch.Tensor, parts: SplitSizes, ranks: RankGroup, comm_dtype: CommDtype) -> torch.Tensor:
    sent_SD = x_SD.to(to_comm_dtype(x_SD, comm_dtype)).contiguous()
    received_AD = sent_SD.new_empty(len(x_SD) if parts.received is None else sum(parts.received), *x_SD.shape[1:])
    with explain_lost_ranks():
        dist.all_to_all_single(received_AD, sent_SD, parts.received, parts.sent, group=ranks.group)
    return received_AD.to(x_SD.dtype)


def shard_experts(model: nn.Module, ranks: RankGroup, comm_dtype: CommDtype) -> None:
    """Keep this rank's slice of every stacked expert weight of `model`, in place, and send tokens to the others'."""
    for layer in model.modules():
        if isinstance(layer, SwitchLayer):
            layer.dispatcher = AllToAllDispatcher(ranks, layer.experts.num_experts, comm_dtype)
            layer.experts.keep_slice(ranks.rank, ranks.size)


def local_expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The stacked weights of the experts that are here, by their names in `model`."""
    return {
        f"{prefix}.experts.{name}".lstrip("."): parameter
        for prefix, layer in model.named_modules()
        if isinstance(layer, SwitchLayer)
        for name, parameter in layer.experts.named_parameters()
    }


class ExpertGradients:
    """Averages the gradients of experts that are not sharded, as DistributedDataParallel does those of other weights.

    A rank's experts have met the tokens of all ranks of their group; those of the other replicas are missing. The sum
    over all tokens of all ranks is divided by the number of ranks. Each gradient is sent off as soon as it is complete,
    while the backward pass goes on: a stacked weight is as large as a bucket.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], replicas: RankGroup | None, world: int) -> None:
        """`parameters` that do not learn are left out. `world` counts the ranks of the data axis."""
        self._replicas, self._world = replicas, world
        self._is_last = False
        self._sent: list[tuple[torch.Tensor, dist.Work | None]] = []
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._send)  # type: ignore[no-untyped-call]

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """Around the last backward pass of a step; the gradients are averages when it is left. Collective.

        Raises:
            LostRankError: another rank is gone.
        """
        self._sent.clear()  # of a step that failed
        self._is_last = True
        try:
            with explain_lost_ranks():
                yield
                for _, work in self._sent:
                    if work is not None:
                        work.wait()
        finally:
            self._is_last = False
        if self._sent:
            torch._foreach_div_([gradient for gradient, _ in self._sent], self._world)
        self._sent.clear()

    def _send(self, parameter: torch.Tensor) -> None:
        if self._is_last and parameter.grad is not None:
            work = None
            if self._replicas is not None:
                work = dist.all_reduce(parameter.grad, group=self._replicas.group, async_op=True)
            self._sent.append((parameter.grad, work))
