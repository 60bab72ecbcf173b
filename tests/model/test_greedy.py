"""Greedy decoding against re-running the decoder on the whole prefix, and against transformers' generate."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from weights import OURS, copy_weights, switch, t5

from switchcli.model.decoding import Decoding
from switchcli.model.generate import generate
from switchcli.model.initialise import initialise
from switchcli.model.moe import SwitchLayer, evaluating
from switchcli.model.routing import Switch
from switchcli.model.spec import ModelSpec
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD

# As many slots as tokens: nothing overflows, whatever the group. Few pieces, so that some answers end early.
ROOMY = Switch(eval_capacity_factor=4.0)
SPEC = ModelSpec(
    vocab_size=8,
    d_model=16,
    d_ff=24,
    d_kv=5,
    num_heads=2,
    num_layers=2,
    tie_embeddings=False,
    num_experts=4,
    router=ROOMY,
)
NAMES = {"t5-1.0": (t5, "relu", True), "t5-1.1": (t5, "gated-gelu", False), "switch": (switch, 5)}


@torch.no_grad()
def a_model(spec: ModelSpec, seed: int) -> SwitchTransformer:
    """Initial layers are so small beside the embedding that answers repeat one token: these are larger, and vary."""
    model = SwitchTransformer(spec).eval()
    initialise(model, seed)
    for name, parameter in model.named_parameters():
        if name != "embedding" and "norm" not in name:
            parameter.mul_(4.0)
    return model


def some_inputs(rows: int, seed: int, vocab_size: int) -> torch.Tensor:
    """Rows of 1 to 9 tokens, padded to 9."""
    generator = torch.Generator().manual_seed(seed)
    inputs_BS = torch.randint(2, vocab_size, (rows, 9), generator=generator)
    length_B1 = torch.randint(1, 10, (rows, 1), generator=generator)
    return inputs_BS.masked_fill(torch.arange(9) >= length_B1, PAD)


@torch.no_grad()
def uncached(model: SwitchTransformer, inputs_S: torch.Tensor, max_tokens: int) -> list[int]:
    """The answer to one input, each token from a forward pass over all tokens before it."""
    inputs_1S = inputs_S[inputs_S != PAD].unsqueeze(0)  # without its padding too
    encoded = model.encode(inputs_1S)
    prefix, answer = [PAD], []
    while len(answer) < max_tokens and EOS not in answer:
        real_1T = torch.ones(1, len(prefix), dtype=torch.bool)
        hidden_1TD, _ = model.decoder(model.embed(torch.tensor([prefix])), real_1T, encoded)
        answer.append(int(F.linear(*model.vocabulary(hidden_1TD))[0, -1].argmax()))
        prefix = [PAD, *answer]
    return answer + [PAD] * (max_tokens - len(answer))


@given(
    rows=st.integers(1, 5),
    group_sequences=st.integers(1, 3),
    tied=st.booleans(),
    dense=st.booleans(),
    max_tokens=st.integers(1, 12),
    seed=st.integers(0, 2**20),
)
def test_the_cache_changes_no_token(
    rows: int, group_sequences: int, tied: bool, dense: bool, max_tokens: int, seed: int
) -> None:
    changes = {
        "router": ROOMY.model_copy(update={"group_sequences": group_sequences}),
        "tie_embeddings": tied,
        "num_experts": 1 if dense else 4,
    }
    model = a_model(SPEC.model_copy(update=changes), seed)
    inputs_BS = some_inputs(rows, seed, SPEC.vocab_size)
    found_BT = generate(model, inputs_BS, Decoding(max_tokens=max_tokens))
    assert found_BT.dtype == torch.int64
    alone = a_model(SPEC.model_copy(update={**changes, "router": ROOMY}), seed)
    expected = [uncached(alone, inputs_S, max_tokens) for inputs_S in inputs_BS]
    assert F.pad(found_BT, (0, max_tokens - found_BT.shape[1])).tolist() == expected


def test_answers_end_early_and_are_padded_after_their_end() -> None:
    """Over many models the answers have all lengths, and decoding takes the steps of the longest one."""
    lengths: set[int] = set()
    for seed in range(20):
        model = a_model(SPEC, seed)
        steps: list[int] = []
        model.decoder.register_forward_hook(lambda *_, steps=steps: steps.append(1))
        answers = generate(model, some_inputs(4, seed, SPEC.vocab_size), Decoding(max_tokens=30)).tolist()
        ends = [row.index(EOS) + 1 if EOS in row else 30 for row in answers]
        assert len(steps) == len(answers[0]) == max(ends)
        for row, end in zip(answers, ends, strict=True):
            assert set(row[end:]) <= {PAD}
        lengths |= set(ends)
    assert len(lengths) > 5


def test_an_input_of_padding_has_no_answer() -> None:
    inputs_BS = some_inputs(3, 0, SPEC.vocab_size)
    inputs_BS[1] = PAD
    answers_BT = generate(a_model(SPEC, 3), inputs_BS, Decoding(max_tokens=6))
    assert (answers_BT[1] == PAD).all()
    assert (answers_BT[0] != PAD).any()


def test_a_decoding_step_routes_no_row_that_has_ended_or_fills_a_group() -> None:
    grouped = ROOMY.model_copy(update={"group_sequences": 3})
    model = a_model(SPEC.model_copy(update={"router": grouped}), 7)
    routed: list[int] = []
    for module in model.decoder.modules():
        if isinstance(module, SwitchLayer):
            module.register_forward_hook(lambda _, __, output: routed.append(int(output.report.tokens)))
    inputs_BS = some_inputs(5, 7, SPEC.vocab_size)  # of 6 rows in 2 groups
    inputs_BS[0] = PAD
    answers = generate(model, inputs_BS, Decoding(max_tokens=30)).tolist()[1:]
    ends = [row.index(EOS) + 1 if EOS in row else 30 for row in answers]
    assert len(set(ends)) > 1
    assert routed == [sum(step < end for end in ends) for step in range(max(ends))]


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_those_of_transformers(name: str) -> None:
    build, *arguments = NAMES[name]
    theirs = build(*arguments).eval()
    changes = {
        "t5-1.0": {},
        "t5-1.1": {"activation": "geglu", "tie_embeddings": False},
        "switch": {"num_layers": 4, "num_experts": 5, "router": Switch(eval_capacity_factor=5.0)},
    }[name]
    ours = a_model(ModelSpec(**{**OURS, **changes}), seed=5)
    copy_weights(ours, theirs)
    inputs_BS = some_inputs(12, 1, 61)
    theirs_BT = theirs.generate(
        input_ids=inputs_BS,
        attention_mask=(inputs_BS != PAD).long(),
        max_new_tokens=15,
        do_sample=False,
        num_beams=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
    )
    ours_BT = generate(ours, inputs_BS, Decoding(max_tokens=15))
    assert len({tuple(row) for row in ours_BT.tolist()}) > 1
    assert ours_BT.tolist() == theirs_BT[:, 1:].tolist()


def test_without_a_capacity_one_sequence_is_decoded_alone_whatever_the_groups() -> None:
    grouped = ROOMY.model_copy(update={"group_sequences": 3})
    model = a_model(SPEC.model_copy(update={"router": grouped}), 7)
    rows: list[int] = []
    model.encoder.register_forward_hook(lambda _, arguments, __: rows.append(len(arguments[0])))
    inputs_BS = some_inputs(1, 7, SPEC.vocab_size)
    with evaluating(model, "dropless"):
        alone = generate(model, inputs_BS, Decoding(max_tokens=5))
    with evaluating(model, "paper"):
        filled_up = generate(model, inputs_BS, Decoding(max_tokens=5))
    assert rows == [1, 3]
    assert torch.equal(alone, filled_up)
