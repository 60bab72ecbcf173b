"""Subjects small enough for any test, and what the probes find of them."""

import torch

from switchcli.doctor.probes import PROBES, Finding, run_probes
from switchcli.doctor.subject import Subject, initial_model
from switchcli.model.config import ModelSpec

SHAPE = {"vocab_size": 211, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "sparse_every": 1}


def ours(**settings: object) -> Subject:
    """A fresh model, with four experts unless `settings` says otherwise."""
    return initial_model(
        ModelSpec.model_validate({**SHAPE, "num_experts": 4, **settings}, strict=False),
        seed=0,
        router_dtype=torch.float32,
    )


def findings(subject: Subject) -> dict[str, Finding]:
    return {finding.probe: finding for finding in run_probes(subject)}


def result(subject: Subject, name: str) -> Finding:
    """What one probe finds, with the draws that it has among all probes."""
    (probe,) = (probe for probe in PROBES if probe.name == name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return probe.run(subject)
