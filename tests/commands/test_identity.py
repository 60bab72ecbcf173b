"""The identity of a checkpoint: runs and teacher caches of earlier versions recorded it, and must find it again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from switchcli.model.config import ModelSpec
from switchcli.model.moe.router import Router, SwitchRouter, TopKRouter
from switchcli.runs.loading import CheckpointHandle

RECORDED = "ccdbf1c8d7cf10d084e8dd62ee6920f8ba61ddef5bce7aa2d3d420967e269bcc"
"""The digest of `model(TopKRouter())` without weights, as version 0.1 recorded it."""


def identity(router: Router) -> str:
    model = ModelSpec(vocab_size=64, d_model=8, d_ff=16, num_heads=2, num_layers=2, num_experts=4, router=router)
    recipe: Any = SimpleNamespace(model=model, train=SimpleNamespace(precision="float32"))
    tokenizer: Any = None
    return CheckpointHandle(Path("x"), 0, recipe, tokenizer, dict, None).identity()


def test_the_identity_of_a_model_is_that_of_earlier_versions() -> None:
    assert identity(TopKRouter()) == RECORDED
    assert identity(SwitchRouter()) != RECORDED
