"""Models whose answers vary, inputs for them, transformers' answers, and decoding without a cache."""

from typing import Any

import torch
import torch.nn.functional as F
from weights import OURS, copy_weights, switch, t5

from switchcli.model.config import ModelSpec
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.model.init import initialize
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD

# As many slots as tokens: nothing overflows, whatever the group. Few pieces, so that some answers end early.
ROOMY = SwitchRouter(eval_capacity_factor=4.0)
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
NAMES = ("t5-1.0", "t5-1.1", "switch")


@torch.no_grad()
def a_model(spec: ModelSpec = SPEC, seed: int = 0) -> SwitchTransformer:
    """Initial layers are so small beside the embedding that answers repeat one token: these are larger, and vary."""
    model = SwitchTransformer(spec).eval()
    initialize(model, seed)
    for name, parameter in model.named_parameters():
        if name != "embedding" and "norm" not in name:
            parameter.mul_(4.0)
    return model


def model_and_inputs_that_end(
    rows: int, decoding: Decoding, spec: ModelSpec = SPEC
) -> tuple[SwitchTransformer, torch.Tensor]:
    """A model, and inputs whose answers end at different steps: from the third on, and before `decoding.max_tokens`.

    They are looked for among many, as what torch draws from a seed differs between its versions.
    """
    for seed in range(2, 50):
        model, inputs_BS = a_model(spec, seed), some_inputs(60, 7)
        ends = [row.index(EOS) if EOS in row else 0 for row in generate(model, inputs_BS, decoding).tolist()]
        good = sorted(
            (number for number, end in enumerate(ends) if 1 < end < decoding.max_tokens - 10), key=ends.__getitem__
        )
        inputs_BS = inputs_BS[[*good[: rows - 1], *good[-1:]]]
        if len(inputs_BS) < rows or ends[good[0]] == ends[good[-1]]:
            continue
        if generate(model, inputs_BS, decoding).shape[1] < decoding.max_tokens - 4:  # a search may go on for longer
            return model, inputs_BS
    raise AssertionError("no model has such answers")


def some_inputs(rows: int, seed: int, vocab_size: int = SPEC.vocab_size) -> torch.Tensor:
    """Rows of 1 to 9 tokens, padded to 9."""
    generator = torch.Generator().manual_seed(seed)
    inputs_BS = torch.randint(2, vocab_size, (rows, 9), generator=generator)
    length_B1 = torch.randint(1, 10, (rows, 1), generator=generator)
    return inputs_BS.masked_fill(torch.arange(9) >= length_B1, PAD)


@torch.no_grad()
def twins(name: str, seed: int) -> tuple[SwitchTransformer, Any]:
    """A model and transformers' with its weights; a loud EOS, so that answers end after few tokens or many."""
    build, arguments, changes = {
        "t5-1.0": (t5, ("relu", True), {}),
        "t5-1.1": (t5, ("gated-gelu", False), {"activation": "geglu", "tie_embeddings": False}),
        "switch": (switch, (5,), {"num_layers": 4, "num_experts": 5, "router": SwitchRouter(eval_capacity_factor=5.0)}),
    }[name]
    theirs = build(*arguments).eval()
    ours = a_model(ModelSpec(**{**OURS, **changes}), seed)
    (ours.embedding if ours.head is None else ours.head.weight)[EOS].mul_(3.0)
    copy_weights(ours, theirs)
    return ours, theirs


def their_answers(theirs: Any, inputs_BS: torch.Tensor, max_tokens: int, beams: int) -> list[list[int]]:
    """transformers' answers up to their end; of beam search those with the best sum of log probabilities."""
    search = {"length_penalty": 0.0, "early_stopping": "never"} if beams > 1 else {}
    answers_BT = theirs.generate(
        input_ids=inputs_BS,
        attention_mask=(inputs_BS != PAD).long(),
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=beams,
        eos_token_id=EOS,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
        **search,
    )[:, 1:]
    return [up_to_the_end(row) for row in answers_BT.tolist()]


def up_to_the_end(answer: list[int]) -> list[int]:
    return answer[: answer.index(EOS) + 1] if EOS in answer else answer


@torch.no_grad()
def log_p(model: SwitchTransformer, inputs_S: torch.Tensor, prefixes: list[list[int]]) -> torch.Tensor:
    """[prefixes, V]: of the token after each prefix, by passes over the whole of it, the input's padding cut off."""
    encoded = model.encode(inputs_S[inputs_S != PAD].unsqueeze(0))
    rows = []
    for prefix in prefixes:
        ids_1T = torch.tensor([[PAD, *prefix]])
        hidden_1TD, _ = model.decoder(model.embed(ids_1T), torch.ones_like(ids_1T, dtype=torch.bool), encoded)
        hidden_1TD, vocabulary = model.vocabulary(hidden_1TD)
        rows.append(F.linear(hidden_1TD, vocabulary.weight_VD)[0, -1].log_softmax(-1))
    return torch.stack(rows)
