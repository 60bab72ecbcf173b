"""The vocabulary: the matrix of embeddings or of the softmax, or the rows of it that are here.

Legend: V the rows that are here, D model, C targets of a chunk, K tokens of each, R rows of hidden states.

Where the rows are divided among processes, what is summed over the vocabulary is summed here over the rows that are:
`Axis.leave` makes it whole.
"""

from typing import NamedTuple, final

import torch
import torch.nn.functional as F

from switchcli.model.axis import SINGLE_PROCESS, ModelAxis


class LocalTokens(NamedTuple):
    """Where tokens are among the rows that are here."""

    row: torch.Tensor
    """int64: some row for those that are elsewhere."""
    is_local: torch.Tensor | None
    """bool; None: all are."""

    def zero_others(self, x: torch.Tensor) -> torch.Tensor:
        """x for the tokens that are here, 0 for the others."""
        return x if self.is_local is None else x * self.is_local


@final
class VocabularyShard:
    """Rows of the vocabulary. No tuple, no dataclass: who looks through those for the tensors of a model's output, as
    torch's hooks do, would find the weight, and leave something on it at every step."""

    __slots__ = ("axis", "weight_VD")

    def __init__(self, weight_VD: torch.Tensor, axis: ModelAxis = SINGLE_PROCESS) -> None:
        self.weight_VD, self.axis = weight_VD, axis

    def locate(self, ids: torch.Tensor) -> LocalTokens:
        """Where the tokens `ids` are."""
        if self.axis.size == 1:
            return LocalTokens(ids, None)
        rows = len(self.weight_VD)
        row = ids - self.axis.rank * rows
        return LocalTokens(row.clamp(0, rows - 1), (row >= 0) & (row < rows))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The row of each token: [..., D]."""
        row, is_here = self.locate(ids)
        x_D = F.embedding(row, self.weight_VD)
        return x_D if is_here is None else self.axis.all_reduce(x_D * is_here.unsqueeze(-1))

    def log_softmax(self, logits_CV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """log softmax(logits / temperature) over the whole vocabulary, of the rows here; float32 at least. No gradient
        where the rows are divided."""
        exact = at_least_float32(logits_CV)
        if temperature != 1.0:
            logits_CV = logits_CV.to(exact) / temperature
        if self.axis.size == 1:
            return torch.log_softmax(logits_CV, -1, dtype=exact)
        exact_CV = logits_CV.to(exact)
        log_sum_C1 = self.logsumexp(exact_CV).unsqueeze(1)
        return exact_CV - log_sum_C1 if exact_CV is logits_CV else exact_CV.sub_(log_sum_C1)

    def logsumexp(self, x_CV: torch.Tensor) -> torch.Tensor:
        """log sum exp over the whole vocabulary: [C]. No gradient where the rows are divided."""
        if self.axis.size == 1:
            return x_CV.logsumexp(1)
        largest_C1 = self.axis.all_reduce_max(x_CV.amax(1, keepdim=True))
        return self.axis.all_reduce((x_CV - largest_C1).exp_().sum(1)).log_() + largest_C1.squeeze(1)


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    """What softmaxes and sums are taken in."""
    return torch.promote_types(x.dtype, torch.float32)
