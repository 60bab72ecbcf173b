"""Whole models on a CUDA device against the CPU: loss, gradients, packed rows, and answers.

Rows for `cpu` compare the CPU with itself (tests/devices.py). Bounds are those of test_gpu_layer.py; a gradient that
has come through all layers under autocast is rounded more often, by about 2**-9 a product: 0.15 of the largest entry.
Answers are compared token for token in float32: logits differ by about 1e-6, so that an answer can differ only where
the best two tokens are as close, and a test first makes sure on the CPU that none of its steps has such a tie.
"""

import pytest
import torch
from answers import SPEC, a_model, some_inputs
from devices import DEVICES, on_devices
from tiny_model import SHAPE, rows, step_total
from tiny_model import a_model as a_trainable_model

from switchcli.data.batch import Batch
from switchcli.model.block_execution import compile_blocks, recompute_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, SwitchRouter, TopKRouter
from switchcli.training.loss import Objective, cross_entropy, packed_cross_entropy

BARE = {"jitter": 0.0, "min_capacity": 1, "capacity_factor": 0.6}
SPARSE = ModelSpec(**SHAPE, dropout=0.0, num_experts=4, router=SwitchRouter(**BARE))
CHANGES = {
    "dense": {"num_experts": 1},
    "dense geglu untied": {"num_experts": 1, "activation": "geglu", "tie_embeddings": False},
    "switch": {},
    "switch dropless": {"router": SwitchRouter(jitter=0.0, capacity_factor="dropless")},
    "switch attention": {"sparse": "both"},
    "top_k": {"router": TopKRouter(**BARE, keep_threshold=0.0)},
    "no_token_left_behind": {"router": NoTokenLeftBehindRouter(**BARE)},
    "expert_choice": {"router": ExpertChoiceRouter(**BARE), "decoder_router": SwitchRouter(**BARE)},
}
MODELS = {name: SPARSE.model_copy(update=changes) for name, changes in CHANGES.items()}
RELATIVE = {False: 1e-4, True: 0.15}


def gradients(
    spec: ModelSpec, device: str, autocast: bool, objective: Objective, batch: Batch, again: bool
) -> list[torch.Tensor]:
    """The loss, and the gradient of every parameter."""
    model = a_trainable_model(spec).to(device).train()
    if again:
        recompute_blocks(model)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = objective(model, Batch(*(ids.to(device) for ids in batch)))
    step_total(loss).backward()
    return [loss.target_sum.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("device", "name"), on_devices(MODELS, on_cpu=["dense"]))
def test_loss_and_every_gradient_are_the_cpus(device: str, autocast: bool, name: str) -> None:
    """The gradients' errors are compared with the largest gradient of the model: some are zero but for rounding."""
    arguments = (cross_entropy, rows(0, 0, 4), name == "dense")
    expected = gradients(MODELS[name], "cpu", autocast, *arguments)
    found = gradients(MODELS[name], device, autocast, *arguments)
    assert_equal_within(found, expected, RELATIVE[autocast])


@pytest.mark.parametrize(
    ("device", "name"), on_devices(["dense", "switch dropless", "switch attention"], on_cpu=["switch attention"])
)
def test_packed_rows_have_the_cpus_loss_and_gradients(device: str, name: str) -> None:
    one, other = rows(0, 4, 4), rows(1, 4, 4)  # each row here: one example after another, of those without padding
    batch = Batch(*(pack(first, second) for first, second in zip(one, other, strict=True)))
    expected = gradients(MODELS[name], "cpu", False, packed_cross_entropy, batch, False)
    found = gradients(MODELS[name], device, False, packed_cross_entropy, batch, False)
    assert_equal_within(found, expected, RELATIVE[False])
    apart = gradients(MODELS[name], "cpu", False, cross_entropy, batch, False)
    assert float(apart[0]) != pytest.approx(float(expected[0]), rel=1e-3)  # packing makes a difference here


WIDE = MODELS["switch"].model_copy(update={"d_kv": 16})


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_packed_blocks_with_flex_attention_have_the_cpus_gradients(device: str, autocast: bool) -> None:
    """The rows for `cpu` compile nothing and use no flex_attention, which has no gradient there."""
    one, other = rows(0, 4, 4), rows(1, 4, 4)
    batch = Batch(*(pack(first, second) for first, second in zip(one, other, strict=True)))
    expected = gradients(WIDE, "cpu", autocast, packed_cross_entropy, batch, False)
    model = a_trainable_model(WIDE).to(device).train()
    is_cuda = device == "cuda"
    compile_blocks(model, "inductor" if is_cuda else "eager", fullgraph=True, flex=is_cuda)
    assert model.encoder.uses_flex == is_cuda
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = packed_cross_entropy(model, Batch(*(ids.to(device) for ids in batch)))
    step_total(loss).backward()
    found = [loss.target_sum.detach(), *(parameter.grad for parameter in model.parameters())]
    assert_equal_within(found, expected, RELATIVE[autocast])


def pack(one_BL: torch.Tensor, other_BL: torch.Tensor) -> torch.Tensor:
    """Put the tokens of the second batch's rows after those of the first's."""
    joined = [torch.cat([one[one != 0], other[other != 0]]) for one, other in zip(one_BL, other_BL, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True)


def assert_equal_within(found: list[torch.Tensor], expected: list[torch.Tensor], relative: float) -> None:
    (loss, *ours), (expected_loss, *theirs) = found, expected
    assert float(loss) == pytest.approx(float(expected_loss), rel=relative)
    scale = max(float(gradient.abs().max()) for gradient in theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.float().cpu(), other.float(), rtol=0, atol=relative * scale)


ROOMY = {"jitter": 0.0, "eval_capacity_factor": 4.0}
ANSWERING = {
    "dense": SPEC.model_copy(update={"num_experts": 1}),
    "switch": SPEC,
    "groups": SPEC.model_copy(update={"router": SwitchRouter(**ROOMY, group_sequences=3)}),
    "top_k": SPEC.model_copy(update={"router": TopKRouter(**ROOMY, keep_threshold=0.0)}),
    "no_token_left_behind": SPEC.model_copy(update={"router": NoTokenLeftBehindRouter(**ROOMY)}),
    "expert_choice": SPEC.model_copy(update={"router": ExpertChoiceRouter(), "decoder_router": SwitchRouter(**ROOMY)}),
}
DECODING = {
    "greedy": Decoding(max_tokens=12),
    "beams": Decoding(max_tokens=12, beams=3, length_penalty=0.0),
    "beams with a penalty": Decoding(max_tokens=12, beams=4, length_penalty=3.0),
    "sampling": Decoding(max_tokens=12, temperature=1.3, seed=1),
    "nucleus": Decoding(max_tokens=12, temperature=1.3, top_p=0.8, seed=1),
}


PAIRS = [f"{name}, {how}" for name in ANSWERING for how in DECODING]


@pytest.mark.parametrize(("device", "case"), on_devices(PAIRS, on_cpu=["groups, greedy", "switch, nucleus"]))
def test_answers_are_the_cpus(device: str, case: str) -> None:
    name, how = case.split(", ")
    model, inputs_BS = a_model(ANSWERING[name], seed=2), some_inputs(6, 4)
    with evaluating(model, "dropless"):
        expected = generate(model, inputs_BS, DECODING[how])
        found = generate(model.to(device), inputs_BS.to(device), DECODING[how])
    assert found.cpu().tolist() == expected.tolist()
    if how != "beams":  # without a length penalty EOS alone may win everywhere: the weights are drawn by torch
        assert len({tuple(row) for row in expected.tolist()}) > 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", ANSWERING)
def test_no_choice_of_those_answers_is_a_near_tie(name: str) -> None:
    """Weights moved by 1e-5 of their size, far more than another order of sums moves a logit, change no answer."""
    inputs_BS = some_inputs(6, 4)
    for how in DECODING.values():
        answers = []
        for size in (0.0, 1e-5):
            model, generator = a_model(ANSWERING[name], seed=2), torch.Generator().manual_seed(9)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1 + size * torch.randn(weight.shape, generator=generator))
            with evaluating(model, "dropless"):
                answers.append(generate(model, inputs_BS, how).tolist())
        assert answers[1] == answers[0]
