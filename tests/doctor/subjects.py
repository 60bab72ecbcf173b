"""Subjects small enough for any test, and what the probes find of them."""

import torch

from switchcli.doctor.probes import PROBES, Finding, run_probes
from switchcli.doctor.subject import Subject
from switchcli.doctor.switchcli_subject import SwitchcliSubject, initial_model
from switchcli.doctor.transformers_subject import TransformersSubject
from switchcli.model.config import ModelSpec

SHAPE = {"vocab_size": 211, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "sparse_every": 1}


def ours(**settings: object) -> SwitchcliSubject:
    """A fresh one of this project's models, with four experts unless `settings` says otherwise."""
    return initial_model(
        ModelSpec.model_validate({**SHAPE, "num_experts": 4, **settings}, strict=False),
        seed=0,
        router_dtype=torch.float32,
    )


def theirs(**settings: object) -> TransformersSubject:
    """A SwitchTransformers with transformers' own initial weights, wide enough for its router to saturate."""
    import transformers

    config = transformers.SwitchTransformersConfig(
        **{
            "vocab_size": 211,
            "d_model": 768,
            "d_kv": 16,
            "d_ff": 32,
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_heads": 2,
            "num_experts": 8,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "expert_capacity": 8,
            "decoder_start_token_id": 0,
            **settings,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    return TransformersSubject(model, initialized=True)


def findings(subject: Subject) -> dict[str, Finding]:
    return {finding.probe: finding for finding in run_probes(subject)}


def result(subject: Subject, name: str) -> Finding:
    """What one probe finds, with the draws that it has among all probes."""
    (probe,) = (probe for probe in PROBES if probe.name == name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return probe.run(subject)
