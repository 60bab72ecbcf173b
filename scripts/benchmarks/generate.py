"""Answers from a sparse model against transformers' `generate` on the same weights, and where a step's time goes.

Both read the same memory at every step: the weights that it meets, and the keys and values of the source.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import peers
import torch
from contestants import Contestant, prepare, sizes_of
from machine import HEADS, PRECISIONS, SIZES, SOURCE, VOCABULARY, Clock, Job, Result, Sizes, plain, shape
from torch import nn

from switchcli.convert.weight_names import EMBEDDINGS, HEAD, transformers_names
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate as decode
from switchcli.model.moe.layer import SwitchLayer, evaluating
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import CrossAttention, FeedForwardSublayer, SelfAttention, SwitchTransformer
from switchcli.spec import EOS, PAD
from switchcli.training.checkpointer import logical_tensors

LAYERS, EXPERTS, TOKENS = 4, 64, 64


def generate(job: Job) -> Result:
    """Seconds of whole answers and of the encoder, in turn, ours and theirs; the parts of one of our steps.

    No answer ends early, and no token is dropped on either side, so that the work is equal.
    """
    device = plain(job)
    width = job["d_model"]
    sizes = SIZES["base"]._replace(
        d_model=width, heads=HEADS * width // 768, d_ff=2048 if width == 768 else 4 * width, batch=job["batch"]
    )
    job = {"experts": EXPERTS, **job}
    clock, model = Clock(device), our_model(job, sizes, device)
    theirs = their_model(job, sizes, model)
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


def our_model(job: Job, sizes: Sizes, device: torch.device) -> SwitchTransformer:
    """Weights by which tokens differ and go to different experts, and by which EOS never comes."""
    router = SwitchRouter(eval_capacity_factor="dropless")
    spec = shape(job["experts"], sizes, num_layers=LAYERS, dropout=0.0, router=router)
    with torch.device("meta"):
        model = SwitchTransformer(spec).to(PRECISIONS[job["precision"]])
    model = model.to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.05)
    model.embedding[EOS] = 0.0
    return model


def their_model(job: Job, sizes: Sizes, model: SwitchTransformer) -> Any:
    """transformers' of that shape, in the same memory."""
    tokens = {"decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": EOS}
    with torch.device("meta"):
        theirs = peers.their_model(job, sizes, LAYERS, **tokens)
    their_name = transformers_names("t5" if job["experts"] == 1 else "switch_transformers", gated=False)
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


def generate_against_others(job: Job) -> Contestant:
    """Greedy answers of one contestant, of as many tokens as the shape's targets, all by the same weights."""
    device, _, _ = prepare(job)
    sizes = sizes_of(job)
    ours = our_model(job, sizes, device)
    generator = torch.Generator().manual_seed(1)
    inputs_BS = torch.randint(2, sizes.vocabulary, (sizes.batch, sizes.source), generator=generator).to(device)
    notes: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in ours.parameters())}
    if job["who"] == "switchcli":
        decoding = Decoding(max_tokens=sizes.target, beams=1, length_penalty=0.0)

        def answers() -> torch.Tensor:
            with evaluating(ours, "dropless"):
                return decode(ours, inputs_BS, decoding)

    else:
        theirs = their_model(job, sizes, ours)
        search = {"max_new_tokens": sizes.target, "do_sample": False, "num_beams": 1}
        if "cache" in job:
            search["cache_implementation"] = job["cache"]
        if job.get("compile"):
            theirs.forward = torch.compile(theirs.forward)

        def answers() -> torch.Tensor:
            return theirs.generate(input_ids=inputs_BS, **search)[:, 1:]

    @torch.no_grad()
    def turn() -> None:
        notes["answers"] = answers().tolist()

    return Contestant(turn, notes)
