"""The vocabulary matrix, for embedding and softmax, or this process's rows of it.

Legend: V rows in this process, D model, C targets of a chunk.

Where the rows are divided among processes, sums over the vocabulary are computed over the local rows and completed by
`ModelAxis.all_reduce`.
"""

from typing import NamedTuple, final

import torch
import torch.nn.functional as F

from switchcli.model.layers import SINGLE_PROCESS, ModelAxis


class LocalTokens(NamedTuple):
    """The local rows of tokens."""

    row: torch.Tensor
    """int64: the row of each local token; some valid row for the others."""
    is_local: torch.Tensor | None
    """bool: tokens whose row is in this process; None if all are."""

    def zero_others(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, with 0 for the tokens that are not local."""
        return x if self.is_local is None else x * self.is_local


@final
class VocabularyShard:
    """This process's rows of the vocabulary matrix.

    It is neither a tuple nor a dataclass. torch's hooks search those for the tensors of a model's output: they would
    find the weight and attach a hook to it at every step.
    """

    __slots__ = ("axis", "weight_VD")

    def __init__(self, weight_VD: torch.Tensor, axis: ModelAxis = SINGLE_PROCESS) -> None:
        self.weight_VD, self.axis = weight_VD, axis

    def locate(self, ids: torch.Tensor) -> LocalTokens:
        """Return the local rows of the tokens `ids`."""
        if self.axis.size == 1:
            return LocalTokens(ids, None)
        # Rank r has the rows from r * V to (r + 1) * V.
        num_rows = len(self.weight_VD)
        row = ids - self.axis.rank * num_rows
        return LocalTokens(row.clamp(0, num_rows - 1), (row >= 0) & (row < num_rows))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embedding of each token: [..., D]."""
        row, is_local = self.locate(ids)
        x_D = F.embedding(row, self.weight_VD)
        # Exactly one process has the row of a token; the others add zeros.
        return x_D if is_local is None else self.axis.all_reduce(x_D * is_local.unsqueeze(-1))

    def log_softmax(self, logits_CV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Return log softmax(logits / temperature) over the full vocabulary, for the local rows: [C, V].

        The result is at least float32. It has no gradient if the rows are divided.
        """
        dtype = at_least_float32(logits_CV)
        if temperature != 1.0:
            logits_CV = logits_CV.to(dtype) / temperature
        if self.axis.size == 1:
            return torch.log_softmax(logits_CV, -1, dtype=dtype)
        exact_CV = logits_CV.to(dtype)
        # log sum exp(x) = log sum exp(x - max) + max, where max is over all processes, so that no exp overflows.
        max_C1 = self.axis.all_reduce_max(exact_CV.amax(1, keepdim=True))
        logsumexp_C1 = self.axis.all_reduce((exact_CV - max_C1).exp_().sum(1, keepdim=True)).log_() + max_C1
        # In place where exact_CV is a copy; the caller's tensor must not change.
        return exact_CV - logsumexp_C1 if exact_CV is logits_CV else exact_CV.sub_(logsumexp_C1)


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of softmaxes and sums over x: float32, or float64 if x is."""
    return torch.promote_types(x.dtype, torch.float32)
