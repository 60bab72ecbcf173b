"""The fraction of tokens that keep their expert: against a loop over tokens, and on any number of ranks."""

import pytest
import torch
from doubles import text_evaluator
from ranks import MESHES, model_of, on_ranks
from tiny_model import DENSE, SPARSE, a_model, rows

from switchcli.analysis import stability
from switchcli.analysis.routing_counts import ExpertChoices, StackTokens, observe
from switchcli.analysis.stability import ChoiceMemory, first_choices
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.metric_names import SAME_EXPERT
from switchcli.model.config import ModelSpec
from switchcli.model.init import initial_weights
from switchcli.model.moe.router import ExpertChoiceRouter, TopKRouter
from switchcli.model.packing import segment_ids
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.loss import packed_cross_entropy
from switchcli.training.measure import Evaluator
from switchcli.training.validation import HeldOutText

ROWS = 6
ROUTERS = {
    "switch": SPARSE,
    "top_k": SPARSE.model_copy(update={"router": TopKRouter(min_capacity=1)}),
    "expert_choice": SPARSE.model_copy(
        update={"router": ExpertChoiceRouter(min_capacity=1), "decoder_router": SPARSE.router}
    ),
}


def on_texts(context: DistributedContext, rows_each: int = 2) -> Evaluator:
    """Two texts, one of packed rows, the other shorter than the batches of several ranks."""
    texts = {
        "one": HeldOutText(lambda first, count: rows(9, first, count), ROWS, None, packed_cross_entropy),
        "other": HeldOutText(lambda first, count: rows(8, first, count), 3),
    }
    return text_evaluator(context, texts, rows_each)


def by_token(model: SwitchTransformer) -> list[int]:
    """The first choice of each token of the texts of `on_texts` in each layer, by a loop; -1 for none."""
    found: list[int] = []

    def look(name: str, tokens: StackTokens, choices: ExpertChoices) -> None:
        for probabilities, chosen in zip(choices.probability_AE.tolist(), choices.chosen_AE.tolist(), strict=True):
            experts = [expert for expert, is_chosen in enumerate(chosen) if is_chosen]
            found.append(max(experts, key=lambda expert: probabilities[expert], default=-1))

    for step, num_rows, packed in ((9, ROWS, True), (8, 3, False)):
        for row in range(num_rows):
            batch = rows(step, row, 1)
            observe(model, batch, segment_ids(*batch) if packed else None, "paper", look)
    return found


@pytest.mark.parametrize("router", ROUTERS)
def test_it_is_that_of_a_loop_over_tokens(router: str) -> None:
    models = [a_model(ROUTERS[router], seed).eval() for seed in (0, 0, 1)]
    evaluator, memory = on_texts(DistributedContext("cpu", "float32")), ChoiceMemory()
    found = [memory.metrics(model, evaluator) for model in models]
    before, after = by_token(models[1]), by_token(models[2])
    same = sum(one == other for one, other in zip(before, after, strict=True))
    assert found == [{}, {SAME_EXPERT: 1.0}, {SAME_EXPERT: pytest.approx(same / len(after))}]
    assert 0 < same < len(after)
    assert (-1 in after) == (router == "expert_choice")


def test_first_choices_are_the_most_probable_of_those_that_were_chosen() -> None:
    probability_AE = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [1.0, 0.0, 0.0]])
    chosen_AE = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]]).bool()
    assert first_choices(ExpertChoices(probability_AE, chosen_AE, chosen_AE)).tolist() == [0, 1, -1, 2]


def test_few_rows_of_a_text_are_looked_at_and_a_dense_model_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, memory = on_texts(DistributedContext("cpu", "float32")), ChoiceMemory()
    assert [memory.metrics(a_model(DENSE), evaluator) for _ in range(2)] == [{}, {}]
    monkeypatch.setattr(stability, "MAX_ROWS", 4)
    asked: list[int] = []

    def counted(first: int, count: int) -> object:
        asked.append(first + count)
        return rows(9, first, count)

    texts = {"one": HeldOutText(counted, ROWS)}  # type: ignore[arg-type]
    memory.metrics(a_model(), evaluator._replace(texts=texts))
    assert max(asked) == 4


def _stability(spec: ModelSpec, parallel: ParallelSpec) -> list[dict[str, float]]:
    context = DistributedContext("cpu", "float32", parallel)
    model, weights = model_of(spec, context)
    evaluator, memory = on_texts(context), ChoiceMemory()
    found = [memory.metrics(model, evaluator)]
    for seed in (0, 1):
        context.reshard(model)  # else the gathered weights would stay as they were
        weights.load_full(initial_weights(spec, seed, weights.experts))
        found.append(memory.metrics(model, evaluator))
    return found


@pytest.mark.integration
@pytest.mark.parametrize(
    "mesh",
    [
        *("data 2", "expert 2", "zero3 2"),
        *(pytest.param(mesh, marks=pytest.mark.nightly) for mesh in ("data 4", "expert 4", "zero2 2")),
    ],
)
def test_ranks_say_what_one_process_does(mesh: str) -> None:
    alone = _stability(SPARSE, ParallelSpec())
    assert alone[:2] == [{}, {SAME_EXPERT: 1.0}]
    world, parallel = MESHES[mesh]
    assert on_ranks(world, _stability, SPARSE, parallel) == [alone] * world
