"""How deep a run is: a reader goes through few functions from the command line, and the Python API, to the model."""

import sys
import traceback
from pathlib import Path

import pytest

import switchcli
from switchcli import cli
from switchcli.model.transformer import SwitchTransformer

PACKAGE = Path(switchcli.__file__).parent


class Reached(BaseException):
    """Raised in the model's forward pass."""


def test_six_functions_lie_between_main_and_the_forward_pass(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = SwitchTransformer.forward

    def reached(model: SwitchTransformer, *inputs: object) -> object:
        if model.training:
            raise Reached
        return forward(model, *inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(SwitchTransformer, "forward", reached)
    monkeypatch.setattr(sys, "argv", ["switchcli", "pretrain", recipe, "--quiet", "--out", "run"])
    with pytest.raises(Reached) as raised:
        cli.main()
    frames = [frame for frame in traceback.extract_tb(raised.tb) if Path(frame.filename).is_relative_to(PACKAGE)]
    names = [frame.name for frame in frames]
    assert names[0] == "main"
    assert len(names[1:]) <= 6, names
