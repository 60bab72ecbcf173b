"""`switchcli upcycle`: a dense run, or a T5 of another system, into a Switch model that begins with its figure."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.model.surgery.upcycle import UpcycledWeights


@pytest.fixture
def here(dense: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dense run `dense`, in which nothing is written."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "dense").symlink_to(dense)
    monkeypatch.chdir(folder)
    return folder


def measured(switchcli: SwitchCLI, checkpoint: Path | str, out: Path) -> dict[str, Any]:
    done = switchcli("eval", checkpoint, "capacities=[dropless]", "--out", out, "--json")
    assert done.code == 0, done.err
    (one,) = json.loads(done.out)["passes"]
    figures: dict[str, Any] = one["held_out"]["text"]
    return figures


@pytest.mark.unit("switch")
@pytest.mark.parametrize("router", ["switch", "top_k"])
def test_it_is_measured_as_the_dense_run_is(router: str, here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    done = switchcli("upcycle", "dense", tmp_path / "sparse", "--experts", 3, f"model.router.kind={router}", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    wo, small = (3.0, 1e-8) if router == "switch" else (1.0, 1.0)
    assert list(result["corrections"]) == ["encoder", "decoder"]
    assert all(one == {"wo": wo, "router": small, "exact": True} for one in result["corrections"].values())
    assert not lacking(done.err, "encoder 1 layers 3 experts")
    sparse = measured(switchcli, tmp_path / "sparse", tmp_path / "a")
    dense = measured(switchcli, "dense", tmp_path / "b")
    assert sparse["neg_log_perplexity"] == pytest.approx(dense["neg_log_perplexity"], abs=1e-5)
    assert len(sparse["layers"]) == 2


def test_the_recipe_is_the_dense_runs_with_the_new_model(here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    keys = ("model.sparse_every=1", "model.router.group_sequences=2", "train.steps=7")
    assert switchcli("upcycle", "dense", tmp_path / "sparse", "--experts", 4, *keys).code == 0
    before, after = (yaml.safe_load(Path(path, "recipe.yaml").read_text()) for path in ("dense", tmp_path / "sparse"))
    assert after["model"]["router"].pop("group_sequences") == 2
    assert before["model"]["router"].pop("group_sequences") == 1
    assert {key for key in before["model"] if before["model"][key] != after["model"][key]} == {
        *("size", "num_experts", "sparse_every")
    }
    assert {key for key in before if before[key] != after[key]} == {"description", "model", "start", "train"}


def test_a_t5_in_the_hugging_face_layout(here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    assert switchcli("convert", "dense", tmp_path / "t5", "--to", "huggingface").code == 0
    done = switchcli("upcycle", tmp_path / "t5", tmp_path / "sparse", "--experts", 2, "--noise", "0.01", "--json")
    assert done.code == 0, done.err
    assert not any(one["exact"] for one in json.loads(done.out)["corrections"].values())
    assert switchcli("generate", tmp_path / "sparse", "a <extra_id_0>", "--max-tokens", 2).code == 0


REFUSED = {
    "sparse": (["runs", "--experts", "4"], 4, "4 experts already"),
    "one expert": (["dense", "--experts", "1"], 2, "--experts 1 2"),
    "shape": (["dense", "--experts", "4", "model.d_model=64"], 2, "model.d_model 32 dense"),
    "size": (["dense", "--experts", "4", "model.size=small"], 2, "model.size custom dense"),
    "attention": (["dense", "--experts", "4", "model.sparse=both"], 2, "model.sparse both model.sparse=feed_forward"),
    "capacity": (["dense", "--experts", "50"], 2, "group_sequences=2"),
    "data": (["dense", "--experts", "4", "data.held_out_fraction=0.5"], 2, "data.held_out_fraction 0.1 dense"),
    "noise": (["dense", "--experts", "4", "--noise", "nan"], 2, "--noise nan 0 1"),
    "nothing": (["none", "--experts", "4"], 4, "none checkpoint checkpoints/step-*"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, here: Path, trained: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    (source, *rest), code, words = REFUSED[case]
    done = switchcli("upcycle", trained if source == "runs" else source, tmp_path / "new", *rest)
    assert (done.code, lacking(done.err, words)) == (code, []), done.err
    assert not list(tmp_path.iterdir())


def test_a_destination_that_is_not_free(here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    for place, words in [
        ("dense/new", "within dense"),
        (tmp_path, "already DESTINATION"),
        (tmp_path / "step-00000001", "DESTINATION name"),
    ]:
        done = switchcli("upcycle", "dense", place, "--experts", 2)
        assert (done.code, lacking(done.err, f"{place} {words}")) == (4, []), done.err


def test_whole_or_not_at_all(here: Path, switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UpcycledWeights, "__getitem__", lambda *_: signal.raise_signal(signal.SIGTERM))
    done = switchcli("upcycle", "dense", tmp_path / "new", "--experts", 2)
    assert (done.code, lacking(done.err, "SIGTERM same command again")) == (130, [])
    assert not list(tmp_path.iterdir())
