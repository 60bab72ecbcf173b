"""Routing counts: they are those of a loop, of the reports, of a router by hand; the model is as it was."""

from collections import Counter
from typing import NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import GROUPED, SPARSE, a_model, rows

from switchcli.analysis.routing_counts import (
    ExpertChoices,
    ExpertCounts,
    StackTokens,
    count_choices,
    count_routing,
    observe,
    stack_tokens,
)
from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.attention import segment_ids
from switchcli.model.config import ModelSpec
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.moe.router import (
    ExpertChoiceRouter,
    NoTokenLeftBehindRouter,
    Policy,
    Router,
    SwitchRouter,
    TopKRouter,
)
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD

BOTH = SPARSE.model_copy(update={"sparse": "both"})


@pytest.fixture(scope="module")
def context() -> DistributedContext:
    return DistributedContext("cpu", "float32")


def as_counter(pairs: ExpertCounts, num_experts: int) -> Counter[tuple[int, int]]:
    keys = pairs.key_X.tolist()
    assert keys == sorted(set(keys))
    counts = pairs.count_X.tolist()
    return Counter({divmod(key, num_experts): count for key, count in zip(keys, counts, strict=True)})


@st.composite
def looked_at(draw: st.DrawFn, num_experts: int) -> tuple[StackTokens, ExpertChoices]:
    num = draw(st.integers(0, 12))
    masks = st.lists(st.lists(st.booleans(), min_size=num_experts, max_size=num_experts), min_size=num, max_size=num)
    chosen, held = (torch.tensor(draw(masks)).bool().reshape(num, num_experts) for _ in range(2))
    id_A = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=num, max_size=num))).long()
    logits = torch.randn(num, num_experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    return StackTokens(torch.ones(1, num).bool(), id_A), ExpertChoices(logits.softmax(-1), chosen, held)


@given(st.data(), st.integers(1, 5))
def test_counts_are_those_of_a_loop_over_tokens_and_add_up(data: st.DataObject, num_experts: int) -> None:
    batches = [data.draw(looked_at(num_experts)) for _ in range(2)]
    one, other = (count_choices(*each) for each in batches)
    counts = one + other
    tokens: Counter[tuple[int, int]] = Counter()
    chose, away = ([0] * num_experts for _ in range(2))
    probability, dropped, confidence = [0.0] * num_experts, 0, 0.0
    for places, choices in batches:
        for place, token in enumerate(places.id_A.tolist()):
            for expert in range(num_experts):
                chosen, held = bool(choices.chosen_AE[place, expert]), bool(choices.in_slot_AE[place, expert])
                if chosen:
                    tokens[token, expert] += 1
                    probability[expert] += float(choices.probability_AE[place, expert])
                chose[expert] += chosen
                away[expert] += chosen and not held
            dropped += not any(choices.in_slot_AE[place].tolist())
            confidence += max(choices.probability_AE[place].tolist())
    assert as_counter(counts.tokens, num_experts) == tokens
    assert counts.chosen_E.tolist() == chose
    assert counts.turned_away_E.tolist() == away
    assert counts.probability_E.tolist() == pytest.approx(probability)
    assert int(counts.num_tokens) == sum(len(places.id_A) for places, _ in batches)
    assert int(counts.dropped) == dropped
    assert float(counts.confidence) == pytest.approx(confidence)


def test_padding_is_not_counted_and_a_decoder_reads_its_targets_one_later(context: DistributedContext) -> None:
    batch = rows(0, 0, 8)
    encoder, decoder = stack_tokens(batch, None).values()
    assert encoder.id_A.tolist() == [token for row in batch.inputs_BS.tolist() for token in row if token != PAD]
    shifted = [
        (read, token) for row in batch.targets_BT.tolist() for read, token in zip([PAD, *row], row, strict=False)
    ]
    assert decoder.id_A.tolist() == [read for read, token in shifted if token != PAD]
    found = count_routing(a_model().eval(), [batch], False, context, "paper")
    assert [int(one.num_tokens) for one in found.values()] == [len(encoder.id_A), len(decoder.id_A)]


def test_each_example_of_a_packed_row_begins_anew() -> None:
    batch = Batch(torch.tensor([[5, 6, EOS, 7, EOS, PAD]]), torch.tensor([[8, EOS, 9, 4, EOS]]))
    encoder, decoder = stack_tokens(batch, segment_ids(*batch)).values()
    assert encoder.id_A.tolist() == [5, 6, EOS, 7, EOS]
    assert decoder.id_A.tolist() == [PAD, 8, PAD, 9, 4]


def by_hand(spec: ModelSpec) -> SwitchTransformer:
    """A model whose routers send token t to expert t mod E: the embedding says which, and nothing else moves x."""
    model = a_model(spec)
    E = spec.num_experts
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.copy_(torch.eye(E, spec.d_model))
            elif name == "embedding":
                parameter.copy_(torch.eye(spec.d_model)[torch.arange(spec.vocab_size) % E])
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.zero_()
    return model.eval()


@pytest.mark.parametrize("spec", [BOTH, GROUPED])
def test_a_router_that_sends_token_t_to_expert_t_mod_e_is_shown_to_do_so(
    spec: ModelSpec, context: DistributedContext
) -> None:
    found = count_routing(by_hand(spec), [rows(0, 0, 8), rows(0, 8, 8)], False, context, "dropless")
    assert len(found) == len(spec.sparse_layer_names())
    for name, counts in found.items():
        assert {token % 4 == expert for token, expert in as_counter(counts.tokens, 4)} == {True}
        read: Counter[int] = Counter()
        for first in (0, 8):
            read.update(
                stack_tokens(rows(0, first, 8), None)["encoder" if "encoder" in name else "decoder"].id_A.tolist()
            )
        assert Counter({token: n for (token, _), n in as_counter(counts.tokens, 4).items()}) == read


def test_the_model_is_as_it_was_and_nobody_watches_it_afterwards(context: DistributedContext) -> None:
    model = a_model(BOTH).train()
    batch = rows(0, 0, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    alone = model(*batch).logits_BTV
    model.train()

    def fails(name: str, places: StackTokens, choices: ExpertChoices) -> NoReturn:
        raise KeyError(name)

    count_routing(model, [batch], False, context, 0.5)
    with pytest.raises(KeyError):
        observe(model, batch, None, "paper", fails)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(layer.policy == "paper" for layer in sparse_layers(model).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    seen: list[str] = []
    model.eval()
    observe(model, batch, None, "paper", lambda name, places, choices: seen.append(name))
    assert seen == list(BOTH.sparse_layer_names())
    assert torch.equal(model(*batch).logits_BTV, alone)
    assert len(seen) == 4  # not told of the pass that nobody watched


ROUTERS: dict[str, tuple[Router, Router | None]] = {
    "switch": (SwitchRouter(eval_capacity_factor=0.5, min_capacity=1), None),
    "batch-prioritised": (
        SwitchRouter(eval_capacity_factor=0.5, min_capacity=1, overflow="probability"),
        SwitchRouter(),
    ),
    "grouped": (SwitchRouter(eval_capacity_factor=0.5, min_capacity=1, group_sequences=2), None),
    "top_k": (TopKRouter(eval_capacity_factor=0.5, min_capacity=1), None),
    "no_token_left_behind": (NoTokenLeftBehindRouter(eval_capacity_factor=0.5, min_capacity=1, k=2), None),
    "expert_choice": (ExpertChoiceRouter(min_capacity=1, group_sequences=4), SwitchRouter()),
}


def routed_by(router: Router, decoder: Router | None, sparse: str = "both") -> ModelSpec:
    changes = {"router": router, "decoder_router": decoder, "sparse": sparse, "sparse_every": 1}
    return ModelSpec(**{**SPARSE.model_dump(exclude={"router", "decoder_router"}), **changes})


@pytest.mark.parametrize(
    ("kind", "policy"),
    [*((kind, "paper") for kind in ROUTERS), ("top_k", "dropless"), ("no_token_left_behind", 0.7)],
)
def test_the_counts_are_those_of_the_reports(kind: str, policy: Policy, context: DistributedContext) -> None:
    model, batch = a_model(routed_by(*ROUTERS[kind])).eval(), rows(0, 0, 8)
    found = count_routing(model, [batch], False, context, policy)
    for layer in sparse_layers(model).values():
        layer.policy = policy
    with torch.no_grad():
        reports = dict(zip(model.spec.sparse_layer_names(), model(*batch).router_stats, strict=True))
    assert list(found) == list(reports)
    assert len(found) == 8
    for name, report in reports.items():
        counts = found[name]
        assert int(counts.num_tokens) == int(report.tokens)
        assert int(counts.dropped) == int(report.dropped)
        assert float(counts.confidence) == pytest.approx(float(report.confidence), rel=1e-5)
        assert float(counts.entropy) == pytest.approx(float(report.entropy), rel=1e-5)
        if kind != "no_token_left_behind":  # whose report counts the tries after the first
            assert counts.chosen_E.tolist() == report.load_E.tolist()
        assert int(counts.tokens.count_X.sum()) == int(counts.chosen_E.sum())
        if policy == "dropless":
            assert int(counts.turned_away_E.sum()) == 0
    assert policy == "dropless" or kind == "expert_choice" or any(int(one.dropped) for one in found.values())
