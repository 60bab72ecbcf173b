"""Expert parallelism: every rank stores a slice of the experts, and tokens travel to them (paper section 5, eq. 7).

Legend: G groups, N tokens in a group, E experts, C slots of an expert, D model, O outputs, F hidden, R ranks that
together hold all experts, L = E / R experts of one rank, B sequences of a rank, Z = R * B sequences of all ranks,
S rows that this rank sends, A rows that its experts receive.

Rank r stores experts r * L to (r + 1) * L - 1. Two exchanges are used:

- With a capacity C < N, every slot is sent, filled or not. The buffer [E, G, C, D] has the same size on every rank, so
  one all-to-all of equal splits suffices: no sizes are agreed on first, and the device is not waited for. The buffer
  does not grow with E, because C shrinks as 1 / E, down to the router's `min_capacity`. An empty slot carries the row
  of some token; its weight on the way back is 0, and so is its gradient.
- Without a capacity (dropless, C = N) the buffer would grow with E. Only filled slots are sent, after an all-to-all of
  the numbers of rows.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from switchcli.distributed.collectives import all_gather, explain_lost_ranks
from switchcli.distributed.mesh import RankGroup
from switchcli.model.layers import compute_dtype
from switchcli.model.moe.dispatch import all_slots, equal_ends, filled_slots, products_wait, weighted_scatter_add
from switchcli.model.moe.layer import SwitchLayer, sparse_layers
from switchcli.model.moe.router import Routing


class SplitSizes(NamedTuple):
    """Numbers of rows that an all-to-all sends to, and receives from, each rank of the group; None for equal splits."""

    sent: list[int] | None
    received: list[int] | None

    def reversed(self) -> "SplitSizes":
        """Return the sizes of the all-to-all that brings the rows back."""
        return SplitSizes(self.received, self.sent)


class AllToAllMeta(NamedTuple):
    """What `dispatch` did: the rows that this rank sent, and the order of those that it received."""

    source_S: torch.Tensor
    """int64: the token of each sent row, as its index among the G * N tokens of this rank."""
    weight_S: torch.Tensor
    """Weight of each sent row's output, in the router's precision; 0 for an empty slot."""
    end_E: torch.Tensor
    """int32 [L]: end of the rows of each local expert among the A received rows, sorted by expert."""
    splits: SplitSizes
    order_A: torch.Tensor | None
    """int64: index, among the rows as they were received, of each row sorted by expert. None where the received rows
    are [R, L, G * C] with equal splits, so that a transpose sorts them."""
    equal_rows: bool
    """See `DispatchMeta`."""


class AllToAllDispatcher:
    """Dispatcher for experts that are divided among the ranks of a group; every method is collective."""

    def __init__(self, ranks: RankGroup, num_experts: int) -> None:
        self._ranks = ranks
        self._num_local = num_experts // ranks.size

    def dispatch(self, x_GND: torch.Tensor, routing: Routing, equal_batches: bool) -> tuple[torch.Tensor, AllToAllMeta]:
        """Return the rows of this rank's experts from all ranks, sorted by expert: [A, D], in the dtype of products."""
        N, C = x_GND.shape[1], routing.token_GEC.shape[2]
        # Sending every slot gives equal splits if the ranks' batches have equal size. If C = N, most slots are empty.
        send_all = equal_batches and C < N
        if send_all:
            meta = self._send_all_slots(routing, N, equal_rows=products_wait(x_GND))
        else:
            meta = self._send_filled_slots(routing, N)
        x_SD = x_GND.to(compute_dtype(x_GND)).flatten(0, 1).index_select(0, meta.source_S)
        return self._sort_by_expert(self._exchange(x_SD, meta.splits), meta), meta

    def expand_mask(self, mask_BF: torch.Tensor, meta: AllToAllMeta, length: int) -> torch.Tensor:
        """Return the mask of each received row's sequence: [A, F].

        `mask_BF` has a mask for each of this rank's sequences, which have `length` positions each.
        """
        R, B = self._ranks.size, len(mask_BF)
        masks_ZF = mask_BF.new_empty(R * B, mask_BF.shape[1])
        all_gather(masks_ZF, mask_BF.contiguous(), self._ranks.group)
        # Global number of each sent row's sequence: sequences of a rank follow those of the ranks before it. Groups are
        # whole sequences, so the G * N tokens are B * length positions in the same order.
        sequence_S = meta.source_S // length + B * self._ranks.rank
        # The numbers take the way of the rows, so that each arrives beside its row.
        sequence_A = self._sort_by_expert(self._exchange(sequence_S, meta.splits), meta)
        return masks_ZF.index_select(0, sequence_A)

    def combine(self, y_AO: torch.Tensor, meta: AllToAllMeta, x_GND: torch.Tensor) -> torch.Tensor:
        """Send each output back, and add it times its weight to its token: [G, N, O]. A token in no slot stays 0."""
        G, N, _D = x_GND.shape
        R, L, O = self._ranks.size, self._num_local, y_AO.shape[1]  # noqa: E741 (the legend's letter)
        # Undo `_sort_by_expert`: back to the order in which the rows were received, by rank.
        if meta.order_A is None:
            y_AO = y_AO.view(L, R, -1, O).transpose(0, 1).reshape(-1, O)
        else:
            y_AO = torch.empty_like(y_AO).index_copy(0, meta.order_A, y_AO)
        y_SO = self._exchange(y_AO, meta.splits.reversed())
        return weighted_scatter_add(y_SO, meta.weight_S, meta.source_S, G * N).view(G, N, O)

    def _send_all_slots(self, routing: Routing, group_size: int, equal_rows: bool) -> AllToAllMeta:
        """Plan to send every slot, filled or not: S = E * G * C rows, sorted by expert and so by rank."""
        source_S, weight_S = all_slots(routing, group_size)
        # Each local expert receives G * C rows from each rank: as many rows as this rank sends, S.
        end_E = equal_ends(self._num_local, source_S)
        return AllToAllMeta(source_S, weight_S, end_E, SplitSizes(None, None), None, equal_rows)

    def _send_filled_slots(self, routing: Routing, group_size: int) -> AllToAllMeta:
        """Plan to send the filled slots only, sorted by expert and so by rank. Waits for the device."""
        rows = filled_slots(routing, group_size, exact=True)
        # end_E, the end of each expert's rows, becomes counts [E], and [R, L] by the rank that stores the expert.
        count_E = rows.end_E.diff(prepend=rows.end_E.new_zeros(1)).long()
        sent_RL = count_E.view(self._ranks.size, self._num_local)
        # Row r goes to rank r. Afterwards received_RL[r, l] is the number of rows from rank r for local expert l.
        received_RL = torch.empty_like(sent_RL)
        with explain_lost_ranks():
            dist.all_to_all_single(received_RL, sent_RL, group=self._ranks.group)
        # Rows arrive by rank, and from each rank by expert. Label each with its local expert: 0 0 1 2 | 0 1 1 2 | ...
        expert_RL = torch.arange(self._num_local, device=received_RL.device).repeat(self._ranks.size)
        expert_A = expert_RL.repeat_interleave(received_RL.flatten())
        # A stable sort keeps the order of the ranks within an expert, as in a single process.
        order_A = expert_A.argsort(stable=True)
        end_E = received_RL.sum(0).cumsum(0).int()
        splits = SplitSizes(sent_RL.sum(1).tolist(), received_RL.sum(1).tolist())
        return AllToAllMeta(rows.source_A, rows.weight_A, end_E, splits, order_A, equal_rows=False)

    def _sort_by_expert(self, x_AD: torch.Tensor, meta: AllToAllMeta) -> torch.Tensor:
        """Return the received rows, which are ordered by rank, ordered by expert."""
        if meta.order_A is not None:
            return x_AD.index_select(0, meta.order_A)
        # [R, L, G * C, ...] to [L, R, G * C, ...]. Rows may be vectors or, for sequence numbers, scalars.
        row_shape = x_AD.shape[1:]
        return x_AD.view(self._ranks.size, self._num_local, -1, *row_shape).transpose(0, 1).reshape(-1, *row_shape)

    def _exchange(self, x_SD: torch.Tensor, splits: SplitSizes) -> torch.Tensor:
        return exchange(x_SD, splits, self._ranks)


def exchange(x_SD: torch.Tensor, splits: SplitSizes, ranks: RankGroup) -> torch.Tensor:
    """Send the first rows to the first rank of the group, the next ones to the second, and so on: [A, D]. Collective.

    The gradient goes back the same way.
    """
    received: torch.Tensor = _Exchange.apply(x_SD, splits, ranks)
    return received


class _Exchange(torch.autograd.Function):
    """An all-to-all; its gradient is the all-to-all with sent and received sizes swapped."""

    @staticmethod
    def forward(ctx: Any, x_SD: torch.Tensor, splits: SplitSizes, ranks: RankGroup) -> torch.Tensor:
        ctx.splits, ctx.ranks = splits, ranks
        return _all_to_all(x_SD, splits, ranks)

    @staticmethod
    def backward(ctx: Any, gradient_AD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_to_all(gradient_AD, ctx.splits.reversed(), ctx.ranks), None, None


def _all_to_all(x_SD: torch.Tensor, splits: SplitSizes, ranks: RankGroup) -> torch.Tensor:
    """Return the rows that the ranks send to this one, [A, D]."""
    # The collective needs contiguous buffers; a gradient may be expanded or transposed.
    sent_SD = x_SD.contiguous()
    num_received = len(x_SD) if splits.received is None else sum(splits.received)
    received_AD = sent_SD.new_empty(num_received, *x_SD.shape[1:])
    with explain_lost_ranks():
        dist.all_to_all_single(received_AD, sent_SD, splits.received, splits.sent, group=ranks.group)
    return received_AD


def shard_experts(model: nn.Module, ranks: RankGroup) -> None:
    """Keep this rank's experts of every sparse layer, in place, and dispatch tokens to the other ranks for the rest."""
    for layer in sparse_layers(model).values():
        layer.dispatcher = AllToAllDispatcher(ranks, layer.experts.num_experts)
        layer.experts.keep_slice(ranks.rank, ranks.size)


def local_expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the stacked weights of this rank's experts, by their names in `model`."""
    parameters = {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, SwitchLayer):
            for name, parameter in layer.experts.named_parameters():
                parameters[f"{prefix}.experts.{name}".lstrip(".")] = parameter
    return parameters


class ExpertGradients:
    """Averages the gradients of experts that are not sharded by fully_shard.

    The gradient of an expert already covers the tokens of all ranks of its expert group, because these were dispatched
    to it. Missing are the tokens of the other replicas: gradients are summed over the replicas, then divided by the
    number of ranks of the data axis, as DistributedDataParallel divides the gradients of all other weights.

    The all-reduce of each gradient starts as soon as the gradient is complete, while the backward pass goes on. There
    are no buckets: a stacked weight is as large as one.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], replicas: RankGroup | None, data_size: int) -> None:
        """Register hooks on the parameters that require a gradient.

        Args:
            parameters: the stacked weights of this rank's experts.
            replicas: the ranks with the same experts; None for one replica.
            data_size: the number of ranks of the data axis.
        """
        self._replicas = replicas
        self._data_size = data_size
        self._is_active = False
        self._pending: list[tuple[torch.Tensor, dist.Work | None]] = []
        """Gradients of this backward pass; their all-reduce, or None with a single replica."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._start)

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """Average the gradients of the backward pass in this context: the last one of a step. Collective.

        Raises:
            LostRankError: another rank is gone.
        """
        self._pending.clear()  # left by a step that failed
        self._is_active = True
        try:
            with explain_lost_ranks():
                yield
                for _, work in self._pending:
                    if work is not None:
                        work.wait()
        finally:
            self._is_active = False
        if self._pending:
            torch._foreach_div_([gradient for gradient, _ in self._pending], self._data_size)
        self._pending.clear()

    def _start(self, parameter: torch.Tensor) -> None:
        if self._is_active and parameter.grad is not None:
            work = None
            if self._replicas is not None:
                work = dist.all_reduce(parameter.grad, group=self._replicas.group, async_op=True)
            self._pending.append((parameter.grad, work))
