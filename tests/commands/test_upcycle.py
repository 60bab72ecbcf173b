"""`switchcli upcycle`: a dense run, or a T5 of another system, into a Switch model of its figure."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.checkpoint.documents import RECIPE
from switchcli.model.surgery.upcycle import UpcycledWeights
from switchcli.recipe import yaml_nodes
from switchcli.runs.inputs.loading import open_model
from switchcli.runs.inputs.new_folder import trained_documents
from switchcli.runs.models.upcycling import with_experts
from switchcli.terminal.console import silent


@pytest.fixture
def here(dense: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dense run `dense`, in which nothing is written."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "dense").symlink_to(dense)
    monkeypatch.chdir(folder)
    return folder


def measured(switchcli: SwitchCLI, checkpoint: Path | str, out: Path) -> dict[str, Any]:
    done = switchcli("eval", checkpoint, "eval.capacity=[dropless]", "--out", out, "--json")
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
    correction = {"wo": wo, "router": small, "exact": True, "exact_without_noise": True}
    assert all(one == correction for one in result["corrections"].values())
    assert not lacking(done.err, "encoder 1 layers 3 experts")
    sparse = measured(switchcli, tmp_path / "sparse", tmp_path / "a")
    dense = measured(switchcli, "dense", tmp_path / "b")
    assert sparse["neg_log_perplexity"] == pytest.approx(dense["neg_log_perplexity"], abs=1e-5)
    assert len(sparse["layers"]) == 2


def test_the_recipe_is_the_dense_runs_with_the_new_model(here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    keys = ("model.sparse_every=1", "model.router.group_sequences=2")
    assert switchcli("upcycle", "dense", tmp_path / "sparse", "--experts", 4, *keys).code == 0
    before, after = (yaml.safe_load(Path(path, "recipe.yaml").read_text()) for path in ("dense", tmp_path / "sparse"))
    assert after["model"]["router"].pop("group_sequences") == 2
    assert before["model"]["router"].pop("group_sequences") == 1
    assert {key for key in before["model"] if before["model"][key] != after["model"][key]} == {
        *("size", "num_experts", "sparse_every")
    }
    assert {key for key in before if before[key] != after[key]} == {"description", "model", "start"}


def test_a_t5_in_the_hugging_face_layout(here: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    assert switchcli("convert", "dense", tmp_path / "t5", "--to", "huggingface").code == 0
    done = switchcli("upcycle", tmp_path / "t5", tmp_path / "sparse", "--experts", 2, "--noise", "0.01", "--json")
    assert done.code == 0, done.err
    assert not any(one["exact"] for one in json.loads(done.out)["corrections"].values())
    words = "pretrain finetune RECIPE --model start.keep=weights"  # its own says nothing of its training
    assert not lacking(json.loads(done.out)["next"], words)
    assert switchcli("convert", tmp_path / "t5", tmp_path / "back", "--to", "switchcli").code == 0
    assert not (tmp_path / "back/recipe.yaml").exists()
    assert switchcli("generate", tmp_path / "sparse", "a <extra_id_0>", "--max-tokens", 2).code == 0


def test_parts_begin_as_the_dense_run_with_the_keys_that_are_named(
    here: Path, switchcli: SwitchCLI, tmp_path: Path
) -> None:
    command = ("upcycle", "dense", tmp_path / "parts", "--experts", 12, "model.expert_d_ff=16", "--json")
    group = "model.router.group_sequences=4"
    refused = switchcli(*command, group)
    assert refused.code == 2
    keys = re.findall(r"model\.router\.\w+=\S+", json.loads(refused.out)["error"])
    done = switchcli(*command, group, *keys)
    assert done.code == 0, done.err
    assert json.loads(done.out)["parts"] == 4
    assert all(one["exact"] for one in json.loads(done.out)["corrections"].values())
    parts, dense = (
        measured(switchcli, model, tmp_path / f"of-{Path(model).name}") for model in (tmp_path / "parts", "dense")
    )
    assert parts["neg_log_perplexity"] == pytest.approx(dense["neg_log_perplexity"], abs=1e-5)


REFUSED = {
    "sparse": (["runs", "--experts", "8"], 4, "4 dense"),
    "one expert": (["dense", "--experts", "1"], 2, "--experts 1 2"),
    "shape": (["dense", "--experts", "4", "model.d_model=64"], 2, "model.d_model 32 dense"),
    "attention": (["dense", "--experts", "4", "model.sparse=both"], 2, "model.sparse both model.sparse=feed_forward"),
    "part of a part": (
        ["dense", "--experts", "4", "model.expert_d_ff=60"],
        2,
        "model.expert_d_ff 60 model.d_ff 64 try 32",
    ),
    "one copy": (["dense", "--experts", "4", "model.expert_d_ff=16"], 2, "--experts 4 multiple parts try 8"),
    "parts left over": (["dense", "--experts", "7", "model.expert_d_ff=16"], 2, "--experts 7 multiple 4 parts try 8"),
    "raw gates": (
        [
            "dense",
            "--experts",
            "8",
            "model.expert_d_ff=32",
            "model.router.kind=top_k",
            "model.router.renormalize=false",
        ],
        2,
        "model.router 1 2 top_k model.router.k=2",
    ),
    "one part": (["dense", "--experts", "8", "model.expert_d_ff=32"], 2, "model.router 1 2 top_k model.router.k=2"),
    "biases": (
        ["dense", "--experts", "8", "model.router.balance=bias"],
        2,
        "model.router.balance bias model.router.balance=loss",
    ),
    "shared": (["dense", "--experts", "8", "model.shared_d_ff=32"], 2, "model.shared_d_ff 32 0"),
    "capacity": (["dense", "--experts", "50"], 2, "group_sequences=2"),
    "data": (["dense", "--experts", "4", "data.held_out_fraction=0.5"], 2, "data model"),
    "noise": (["dense", "--experts", "4", "--noise", "nan"], 2, "--noise nan finite"),
    "much noise": (["dense", "--experts", "4", "--noise", "1.1"], 2, "--noise 1.1 0 1"),
    "nothing": (["none", "--experts", "4"], 4, "none checkpoint checkpoints/step-*"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, here: Path, trained: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    (source, *rest), code, words = REFUSED[case]
    done = switchcli("upcycle", trained if source == "runs" else source, tmp_path / "new", *rest)
    assert (done.code, lacking(done.err, words)) == (code, []), done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("experts", "expert_axis"), [(3, 1), (6, 2), (8, 4)])
def test_ranks_that_divided_the_experts_divide_the_new_ones_too(trained: Path, experts: int, expert_axis: int) -> None:
    handle = open_model(trained, silent())
    assert handle.recipe is not None
    changed = handle._replace(recipe=re.sub(rb"(?m)^( +)expert: \d+$", rb"\1expert: 4", handle.recipe))
    file = with_experts(handle.model_file, handle.path, experts)
    recipe = yaml_nodes.read_bytes(trained_documents(changed, file.model, Path("new"))[RECIPE], RECIPE)
    assert recipe.stated("parallel.expert") == expert_axis


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
