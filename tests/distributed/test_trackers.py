"""Trackers: TensorBoard writes what it is given; a package that is missing is said so."""

from pathlib import Path

from switchcli.training.trackers import Trackers


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
