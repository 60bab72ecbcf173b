"""`switchcli report --routing`: a run, languages, tasks; what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from messages import lacking
from tiny_run import WORDS, SwitchCLI

LINES = "data.corpora=[{kind: files, paths: ['{language}.txt'], sample_by: line, languages: [de, fr]}]"


@pytest.fixture
def languages(recipe: str, text: Path, switchcli: SwitchCLI) -> Path:
    """A run on two languages that share no word."""
    lines = text.read_text()
    Path("de.txt").write_text(lines)
    Path("fr.txt").write_text(lines.upper())
    mixed = (LINES, "data.mixture.kind=weighted", "model.sparse=both")
    assert switchcli("pretrain", recipe, *mixed, "--out", "run", "--quiet").code == 0
    return Path("run")


def survey(switchcli: SwitchCLI, *arguments: object) -> dict[str, Any]:
    done = switchcli("report", "--routing", *arguments, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["routing"]
    assert isinstance(found, dict)
    return found


def test_a_run_is_shown_on_its_own_held_out_text(trained: Path, tmp_path: Path, switchcli: SwitchCLI) -> None:
    found = survey(switchcli, trained)
    assert found["sequences"] == {"text": 8}
    assert found["rare"] == 10
    assert (found["step"], found["capacity"], found["num_experts"]) == (2, "paper", 4)
    measured = json.loads(switchcli("eval", trained, "--out", tmp_path, "--json").out)["passes"][0]["held_out"]["text"][
        "layers"
    ]
    assert list(found["layers"]) == list(measured)
    for name, layer in found["layers"].items():
        assert layer["load"] == measured[name]["load"]
        for figure in ("dropped_fraction", "confidence", "entropy"):
            assert layer[figure] == pytest.approx(measured[name][figure], rel=1e-5)
        assert "<extra_id_0>" in layer["sentinels"]
        assert layer["texts"] == {"text": layer["load"]}
        pieces = {one["piece"].strip("\u2581") for expert in layer["experts"] for one in expert["by_count"]}
        assert pieces & set(WORDS)
    shown = switchcli("report", "--routing", trained)
    assert shown.code == 0
    assert "tokens by lift" in shown.out
    assert "measuring" in shown.err
    assert switchcli("report", "--routing", trained, "--quiet") == (0, shown.out, "")


def test_it_is_a_section_of_the_report_of_the_runs_dense_ones_included(
    trained: Path, dense: Path, tmp_path: Path, switchcli: SwitchCLI
) -> None:
    page = tmp_path / "page.html"
    done = switchcli("report", "--routing", dense, trained, "text.sequences=2", "--html", page, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert len(found["series"]) == 2
    assert found["routing"]["checkpoint"].startswith(f"{trained}/")
    sections = re.findall('<section id="([^"]+)"', page.read_text(encoding="utf-8"))
    assert {"overview", "quality", "expert-load", "experts", "runs"} <= {*sections}
    assert json.loads(switchcli("report", dense, trained, "--json").out) == {**found, "routing": None}


def test_what_is_measured_can_be_named(trained: Path, switchcli: SwitchCLI) -> None:
    found = survey(switchcli, trained, "text.sequences=3", "eval.capacity=[dropless]")
    assert found["sequences"] == {"text": 3}
    assert found["capacity"] == "dropless"
    assert {layer["dropped_fraction"] for layer in found["layers"].values()} == {0.0}


def test_a_checkpoint_whose_path_looks_like_a_key_can_be_named(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rt-lr=0.1").symlink_to(trained)
    found = survey(switchcli, "rt-lr=0.1", "text.sequences=1")
    assert found["sequences"] == {"text": 1}
    assert found["checkpoint"].startswith("rt-lr=0.1/")


@pytest.mark.integration
def test_languages_are_told_apart(languages: Path, switchcli: SwitchCLI) -> None:
    found = survey(switchcli, languages)
    assert found["sequences"] == {"de": 8, "fr": 8}
    layers = found["layers"]
    assert len(layers) == 4
    for layer in layers.values():
        assert list(layer["texts"]) == ["de", "fr"]
        assert [sum(pair) for pair in zip(*layer["texts"].values(), strict=True)] == layer["load"]
    shown = switchcli("report", "--routing", languages).out
    assert not lacking(shown, "most text's tokens")
    done = switchcli("report", "--routing", languages, "--html", "page.html", "--figures", "figures", "--quiet")
    assert done == (0, shown, "")
    assert Path("page.html").read_text().count("By text") == 8  # a caption and a name for each layer
    assert Path("figures/text_encoder_blocks_1_feed_forward.csv").read_text().startswith("text,expert,share\nde,")


@pytest.mark.integration
def test_a_fine_tuned_run_is_shown_on_its_tasks(tuned: Path, switchcli: SwitchCLI) -> None:
    found = survey(switchcli, tuned)
    assert set(found["sequences"]) == {"colour", "last"}
    assert found["step"] == 2


@pytest.mark.integration
def test_a_folder_in_the_hugging_face_layout_is_shown_on_text_that_is_named(
    trained: Path, text: Path, tmp_path: Path, switchcli: SwitchCLI
) -> None:
    theirs = tmp_path / "theirs"
    assert switchcli("convert", trained, theirs, "--to", "huggingface").code == 0
    alone = switchcli("report", "--routing", theirs)
    assert (alone.code, lacking(alone.err, f"{theirs} tasks=[rte] text.corpora=[...]")) == (2, [])
    named = (f"text.corpora=[{{kind: files, paths: [{text}], sample_by: line}}]", "text.held_out_fraction=0.1")
    keys = (*named, "text.sequences=8", "data.inputs_length=32", "eval.capacity=[dropless]")
    assert json.loads(switchcli("report", "--routing", theirs, *keys, "--json").out)["series"] == []
    assert survey(switchcli, theirs, *keys)["layers"] == survey(switchcli, trained, *keys)["layers"]


@pytest.mark.integration
def test_what_has_no_routing_is_refused_in_one_line(trained: Path, dense: Path, switchcli: SwitchCLI) -> None:
    cases: list[tuple[list[object], int, str]] = [
        ([dense], 4, f"{dense}/checkpoints/step-00000002 dense experts"),
        ([trained, "text.sequences=3", "nowhere"], 4, "nowhere checkpoint checkpoints/step-*"),
        ([trained, trained], 2, "--routing 2"),
        (["text.sequences=3"], 2, "--routing 0"),
        ([trained, "text.sequencs=3"], 2, "text.sequencs sequences"),
        ([trained, "eval.capacity=[paper, dropless]"], 2, "eval.capacity paper dropless one"),
        ([trained, "--baseline", dense], 2, f"--baseline {dense} none"),
        ([trained, "text.sequences=1", "--html", trained / "recipe.yaml/page.html"], 4, "page.html file --html"),
        ([trained, "text.sequences=1", "--figures", trained / "recipe.yaml"], 4, "recipe.yaml folder --figures"),
    ]
    for arguments, code, words in cases:
        done = switchcli("report", "--routing", *arguments)
        assert (done.code, done.out) == (code, ""), done.err
        assert not lacking(done.err, words)
        assert done.err.count("error: ") == 1
        assert "Traceback" not in done.err
