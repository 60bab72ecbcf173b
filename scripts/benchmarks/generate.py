"""Answers from a model against transformers' `generate` on the same weights.

No answer ends early and no token is dropped on either side, so that the work is equal: both read the weights that a
step meets, and the keys and values of the source.
"""

from typing import Any

import torch
from contestants import Contestant, prepare
from machine import PRECISIONS, Job, batch_of, sizes_of, spec_of
from models import their_model, without_values
from peers import implementations

from switchcli.checkpoint.model_weights import logical_tensors
from switchcli.convert.weight_files import EMBEDDINGS, HEAD, transformers_names
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate as decode
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS


def generate_against_others(job: Job) -> Contestant:
    """Answers of one contestant, of as many tokens as the shape's targets, all by the same weights."""
    device, _ = prepare(job)
    beams, max_tokens = job.get("beams", 1), sizes_of(job).target
    model = our_model(job, device)
    inputs_BS = batch_of(job).inputs_BS.to(device)
    notes: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    if job["who"] == "switchcli":
        decoding = Decoding(max_tokens=max_tokens, beams=beams, length_penalty=0.0)

        def answers() -> torch.Tensor:
            with evaluating(model, "dropless"):
                return decode(model, inputs_BS, decoding)

    else:
        theirs = with_weights_of(model, job)
        search: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": False, "num_beams": beams}
        if beams > 1:
            search |= {"length_penalty": 0.0, "early_stopping": "never"}
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


def our_model(job: Job, device: torch.device) -> SwitchTransformer:
    """Return a model by whose weights tokens differ and go to different experts, and by which EOS never comes."""
    spec = spec_of(job, dropout=0.0, router=SwitchRouter(eval_capacity_factor="dropless"))
    model = without_values(spec, device, PRECISIONS[job["precision"]]).eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.05)
    model.embedding[EOS] = 0.0
    return model


def with_weights_of(model: SwitchTransformer, job: Job) -> Any:
    """Return transformers' model with the same weights, in the same memory."""
    with torch.device("meta"):
        theirs = their_model(model.spec, implementations(job))
    their_name = transformers_names("t5" if job["experts"] == 1 else "switch_transformers", gated=False)
    tensors = {their_name(name): tensor for name, tensor in logical_tensors(model).items()}
    tensors |= dict.fromkeys((*EMBEDDINGS, HEAD), model.embedding)
    theirs.load_state_dict(tensors, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)
