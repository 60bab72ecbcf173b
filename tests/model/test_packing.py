"""Examples packed into rows against the same examples each alone: logits, loss and every gradient; and transformers'.

Routing is without a capacity and nothing is random: what packed examples share by right is left out.
"""

from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import OURS

from switchcli.data.batch import Batch
from switchcli.model.attention import segment_ids
from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.router import NoTokenLeftBehindRouter, SwitchRouter, TopKRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD
from switchcli.training.config import DistillSpec
from switchcli.training.distillation import DistillationLoss, Teacher
from switchcli.training.loss import cross_entropy, packed_cross_entropy

RELATIVE = 1e-5
FREE = {"capacity_factor": "dropless", "eval_capacity_factor": "dropless", "jitter": 0.0}
SPARSE = {"num_experts": 5, "router": SwitchRouter(**FREE)}
MODELS = {
    "dense": {},
    "untied": {"tie_embeddings": False},
    "feed_forward": SPARSE,
    "attention": {**SPARSE, "sparse": "attention"},
    "both by top_k": {**SPARSE, "sparse": "both", "router": TopKRouter(**FREE, keep_threshold=0.0)},
    "both by no_token_left_behind": {**SPARSE, "sparse": "both", "router": NoTokenLeftBehindRouter(**FREE, k=2)},
}
Example = tuple[int, int]
"""How many tokens the inputs have, and the targets, EOS included."""
lengths = st.tuples(st.integers(1, 12), st.integers(1, 8))


def a_model(changes: dict[str, object], seed: int = 3) -> SwitchTransformer:
    model = SwitchTransformer(ModelSpec(**{**OURS, "num_layers": 4, **changes})).train()
    initialize(model, seed)
    return model


def texts(rows: list[list[Example]]) -> list[list[Batch]]:
    """An example of one row for each pair of lengths: random tokens, then EOS."""
    generator = torch.Generator().manual_seed(len(rows))

    def ids(length: int) -> torch.Tensor:
        return F.pad(torch.randint(2, OURS["vocab_size"], (1, length - 1), generator=generator), (0, 1), value=EOS)

    return [[Batch(ids(source), ids(target)) for source, target in row] for row in rows]


def packed(rows: list[list[Batch]], tail: int) -> Batch:
    """Rows of examples end to end, with at least `tail` of padding behind each."""
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    joined = [[torch.cat([nothing, *side], dim=1) for side in ([e[i] for e in row] for i in (0, 1))] for row in rows]
    widths = [max(row[i].shape[1] for row in joined) + tail for i in (0, 1)]
    padded = [[F.pad(ids, (0, widths[i] - ids.shape[1]), value=PAD) for i, ids in enumerate(row)] for row in joined]
    return Batch(*(torch.cat(side) for side in zip(*padded, strict=True)))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str, least: float = 1e-30) -> None:
    """Relative to the largest entry, or to `least` where that is more: what cancels leaves rounding alone."""
    torch.testing.assert_close(
        ours,
        theirs,
        rtol=0.0,
        atol=RELATIVE * max(theirs.detach().abs().max().item(), least),
        msg=lambda text: f"{what}: {text}",
    )


def assert_packed_is_alone(model: SwitchTransformer, rows: list[list[Example]], tail: int) -> None:
    examples = texts(rows)
    batch = packed(examples, tail)
    every = [example for row in examples for example in row]
    logits_BTV = model(*batch, segment_ids(*batch)).logits_BTV
    assert logits_BTV.isfinite().all()
    alone = [model(*example).logits_BTV[0] for example in every]
    assert_close(logits_BTV[batch.targets_BT != PAD], torch.cat(alone), "logits")

    parameters = dict(model.named_parameters())
    together = packed_cross_entropy(model, batch)
    apart = [cross_entropy(model, example) for example in every]
    total = reduce(torch.add, [loss.target_sum for loss in apart])
    assert together.target_sum.item() == pytest.approx(total.item(), rel=RELATIVE)
    assert together.metrics["neg_log_perplexity"].weight == sum(example.targets_BT.numel() for example in every)
    ours, theirs = (
        torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        for loss in (together.target_sum, total)
    )
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for name, our, their in zip(parameters, ours, theirs, strict=True):
        assert_close(our, their, f"gradient of {name}", largest / 10)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] * (name in ("untied", "feed_forward"))) for name in MODELS],
)
@settings(max_examples=8)
@given(
    rows=st.lists(st.lists(lengths, max_size=5), min_size=1, max_size=4).filter(any),
    tail=st.integers(0, 5),
    seed=st.integers(0, 9),
)
@pytest.mark.unit("both by top_k")
def test_packed_examples_are_the_examples_alone(name: str, rows: list[list[Example]], tail: int, seed: int) -> None:
    """With GELU: at the kink of a ReLU rounding decides about a gradient, and some example would find it."""
    assert_packed_is_alone(a_model({**MODELS[name], "activation": "geglu"}, seed), rows, tail)


def test_a_student_and_its_teacher_see_packed_examples_alone() -> None:
    student, teacher = a_model(MODELS["dense"]), Teacher(a_model(MODELS["dense"], seed=4).eval(), "float32")
    rows = texts([[(7, 4), (5, 3)], [(4, 6)]])
    together, alone = (DistillationLoss(DistillSpec(teacher="t"), teacher, packed=packed) for packed in (True, False))
    total = sum(alone(student, example).target_sum.item() for row in rows for example in row)
    assert together(student, packed(rows, 1)).target_sum.item() == pytest.approx(total, rel=RELATIVE)


def test_without_segments_packed_examples_would_see_one_another() -> None:
    model, ((first, second),) = a_model(SPARSE), texts([[(9, 6), (8, 7)]])
    batch = packed([[first, second]], 0)
    blind = model(*batch).logits_BTV[0, 6:]
    assert (blind - model(*second).logits_BTV[0]).abs().max() > 1e-3


def test_one_example_a_row_without_segments_is_the_plain_model_bit_by_bit() -> None:
    """Pre-training's rows are of this kind; segments change nothing in them but how padding sees."""
    model, rows = a_model(SPARSE), texts([[(9, 6)], [(9, 6)]])
    batch = packed(rows, 0)
    assert torch.equal(model(*batch).logits_BTV, model(*batch, segment_ids(*batch)).logits_BTV)


def test_segments_count_the_ends_before_a_position() -> None:
    inputs_BS = torch.tensor([[5, 6, EOS, EOS, 7, EOS, PAD], [PAD] * 7])
    targets_BT = torch.tensor([[EOS, 8, EOS, 9, EOS], [PAD] * 5])
    segments = segment_ids(inputs_BS, targets_BT)
    assert segments.source_BS.tolist() == [[0, 0, 0, 1, 2, 2, 3], [0] * 7]
    assert segments.target_BT.tolist() == [[0, 1, 1, 2, 2], [0] * 5]
