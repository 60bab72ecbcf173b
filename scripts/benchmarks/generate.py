"""Answers from a sparse model against transformers' `generate` on the same weights, and where a step's time goes.

Both read the same memory at every step: the weights that it meets, and the keys and values of the source.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from machine import HEADS, PRECISIONS, SOURCE, VOCABULARY, Clock, Job, Result, plain, shape
from torch import nn

from switchcli.convert.weight_names import EMBEDDINGS, HEAD, transformers_names
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate as decode
from switchcli.model.moe.layer import SwitchLayer, evaluating
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import CrossAttention, FeedForwardSublayer, SelfAttention, SwitchTransformer
from switchcli.spec import EOS, PAD
from switchcli.train.checkpointer import logical_tensors

LAYERS, EXPERTS, TOKENS = 4, 64, 64


def generate(job: Job) -> Result:
    """Seconds of whole answers and of the encoder, in turn, ours and theirs; the parts of one of our steps.

    No answer ends early, and no token is dropped on either side, so that the work is equal.
    """
    device = plain(job)
    clock, model = Clock(device), our_model(job, device)
    theirs = their_model(model)
    inputs_BS = torch.randint(2, VOCABULARY, (job["batch"], SOURCE), device=device)
    decoding = Decoding(max_tokens=TOKENS, beams=job["beams"], length_penalty=0.0)
    search: dict[str, Any] = {"num_beams": job["beams"], "do_sample": False}
    if job["beams"] > 1:
        search |= {"length_penalty": 0.0, "early_stopping": "never"}
    answers: dict[str, torch.Tensor] = {}

    def ours() -> None:
        answers["ours"] = decode(model, inputs_BS, decoding)

    def transformers() -> None:
        answers["transformers"] = theirs.generate(input_ids=inputs_BS, max_new_tokens=TOKENS, **search)[:, 1:]

    encoders = {
        "our encoder": lambda: model.encode(inputs_BS),
        "their encoder": lambda: theirs.get_encoder()(inputs_BS),
    }
    with torch.no_grad(), evaluating(model, "dropless"):
        seconds = clock.in_turn({"ours": ours, "transformers": transformers, **encoders}, job["rounds"])
        parts = parts_of_a_step(model, ours, clock)
    same = (answers["ours"] == answers["transformers"]).float().mean()
    return {"seconds": seconds, "parts": parts, "same": float(same), "tokens": TOKENS}


def our_model(job: Job, device: torch.device) -> SwitchTransformer:
    """Weights by which tokens differ and go to different experts, and by which EOS never comes."""
    width = job["d_model"]
    head = {"num_heads": HEADS * width // 768, "d_model": width, "d_ff": 2048 if width == 768 else 4 * width}
    spec = shape(EXPERTS, **head, num_layers=LAYERS, dropout=0.0, router=SwitchRouter(eval_capacity_factor="dropless"))
    with torch.device("meta"):
        model = SwitchTransformer(spec).to(PRECISIONS[job["precision"]])
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.05)
    model.embedding[EOS] = 0.0
    return model


def their_model(model: SwitchTransformer) -> Any:
    """transformers' of that shape, in the same memory."""
    import transformers

    spec = model.spec
    config = transformers.SwitchTransformersConfig(
        vocab_size=spec.vocab_size,
        d_model=spec.d_model,
        d_kv=spec.head_width,
        d_ff=spec.d_ff,
        num_heads=spec.num_heads,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_sparse_encoder_layers=len(spec.sparse_layers("encoder")),
        num_sparse_decoder_layers=len(spec.sparse_layers("decoder")),
        num_experts=EXPERTS,
        expert_capacity=10**9,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    with torch.device("meta"):
        theirs = transformers.SwitchTransformersForConditionalGeneration(config)
    their_name = transformers_names("switch_transformers", gated=False)
    tensors = {their_name(name): tensor for name, tensor in logical_tensors(model).items()}
    tensors |= dict.fromkeys((*EMBEDDINGS, HEAD), model.embedding)
    theirs.load_state_dict(tensors, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


def parts_of_a_step(model: SwitchTransformer, ours: Callable[[], None], clock: Clock) -> dict[str, float]:
    """Seconds of each kind of part in a step, all of its blocks together: the mean over the steps of one call."""
    seconds: dict[str, float] = defaultdict(float)
    hooks: list[Any] = []

    def watch(module: nn.Module, name: str) -> None:
        def add(sign: float) -> None:
            clock(lambda: None)
            seconds[name] += sign * time.perf_counter()

        hooks.append(module.register_forward_pre_hook(lambda *_: add(-1.0)))
        hooks.append(module.register_forward_hook(lambda *_: add(1.0)))

    watch(model.encoder, "encoder")
    watch(model.decoder, "decoder")
    for module in model.decoder.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            watch(module, "self-attention" if isinstance(module, SelfAttention) else "cross-attention")
        elif isinstance(module, FeedForwardSublayer):
            watch(module, "sparse" if isinstance(module.layer, SwitchLayer) else "dense")
    whole = clock(ours)
    for hook in hooks:
        hook.remove()
    rest = whole - seconds.pop("encoder") - seconds.pop("decoder")
    return {name: second / TOKENS for name, second in {**seconds, "vocabulary and choice": rest}.items()}
