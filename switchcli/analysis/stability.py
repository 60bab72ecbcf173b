"""Stability of routing over training: how many tokens still go first to the expert that they went to before."""

import torch

from switchcli.analysis.routing_counts import ExpertChoices, StackTokens, observe
from switchcli.data.batch import Batch
from switchcli.metric_names import SAME_EXPERT
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.loss import batch_segment_ids
from switchcli.training.measure import Evaluator
from switchcli.training.metrics import Mean
from switchcli.training.validation import reduce

MAX_ROWS = 32
"""Rows of each held-out text that are compared: thousands of tokens, for a fraction of the time of an evaluation."""


class ChoiceMemory:
    """The first choices of the same held-out tokens, in every sparse layer, when they were last asked for.

    Each rank keeps those of its own rows, two bytes a token and layer in the host's memory. They are in no checkpoint.
    """

    def __init__(self) -> None:
        self._choices: list[torch.Tensor] = []
        """int16 [A]: one for each batch and layer."""

    def metrics(self, model: SwitchTransformer, evaluator: Evaluator) -> dict[str, float]:
        """Return `SAME_EXPERT` over all layers since the last call. Collective.

        It is left out at the first call, so at the first evaluation of a resumed run, and for a dense model.
        """
        context, before, self._choices = evaluator.context, self._choices, []
        for text in evaluator.texts.values() if model.spec.sparse_layer_names() else ():
            for batch in evaluator.batches(model, text._replace(num_rows=min(text.num_rows, MAX_ROWS))):
                on_device = Batch(*context.to_device(batch))
                segments = batch_segment_ids(on_device, text.is_packed)
                with context.eager(), context.autocast():
                    observe(model, on_device, segments, evaluator.capacity, self._remember)
        if not before:
            return {}
        same = sum(int((one == other).sum()) for one, other in zip(before, self._choices, strict=True))
        counts = torch.tensor([same, sum(map(len, before))], dtype=torch.float64, device=context.device)
        return {SAME_EXPERT: float(reduce({SAME_EXPERT: Mean(*counts)}, context)[SAME_EXPERT].value())}

    def _remember(self, layer: str, tokens: StackTokens, choices: ExpertChoices) -> None:
        self._choices.append(first_choices(choices).short().cpu())


def first_choices(choices: ExpertChoices) -> torch.Tensor:
    """Return the most probable of the experts that each token chose, int64 [A]; -1 where it chose none."""
    expert_A = choices.probability_AE.masked_fill(~choices.chosen_AE, -1.0).argmax(1)
    return expert_A.masked_fill(~choices.chosen_AE.any(1), -1)
