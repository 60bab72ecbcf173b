"""Trackers: TensorBoard writes what it is given; a package that is missing is said so."""

from pathlib import Path

import pytest

from switchcli.errors import RecipeError
from switchcli.training.trackers import Trackers, check_usable


def test_tensorboard_writes_each_figure_at_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Trackers(("tensorboard",), tmp_path)
    for step in (10, 20):
        board.log({"step": step, "neg_log_perplexity": -step / 10, "held_out/neg_log_perplexity": -1.5})
    board.close()
    (file,) = (tmp_path / "tensorboard").rglob("events*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"neg_log_perplexity", "held_out/neg_log_perplexity"}
    assert [(one.step, one.value) for one in events.Scalars("neg_log_perplexity")] == [(10, -1.0), (20, -2.0)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_a_recipe_error_with_the_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"accelerate.utils.is_{name}_available", lambda: False)
    with pytest.raises(RecipeError, match=rf"log.trackers: {name} .*pip install 'switchcli\[{name}\]'") as raised:
        check_usable((name,))
    assert raised.value.exit_code == 2
