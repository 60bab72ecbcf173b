"""`switchcli doctor`: the verdict on recipes, trained runs and Hugging Face folders, for people and for scripts."""

import json
import re
import shutil
from pathlib import Path

import pytest
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.doctor.probes import PROBES

CHECKPOINT = 4
FILES = "--checkpoint-files"


@pytest.mark.integration
def test_the_shipped_recipe_is_sound(switchcli: SwitchCLI) -> None:
    done = switchcli("doctor", "quickstart/switch")
    assert done.code == 0
    head, *lines, end = done.out.splitlines()
    assert head.startswith("quickstart/switch: ")
    assert not lacking(head, "4 sparse layers 8 experts initial")
    verdicts = ["skip" if probe.name == "routing of text" else "pass" for probe in PROBES]  # it has no vocabulary yet
    assert [line.split("  ")[:2] for line in lines] == [
        [verdict, probe.name] for verdict, probe in zip(verdicts, PROBES, strict=True)
    ]
    assert re.fullmatch(rf"sound: 0 of {len(PROBES)} .*\b0 .*warning", end)
    assert "\x1b" not in done.out


def test_the_dense_recipe_is_said_to_be_dense(switchcli: SwitchCLI) -> None:
    done = switchcli("doctor", "quickstart/dense")
    assert done.code == 0
    head, *lines, _ = done.out.splitlines()
    assert head.startswith("quickstart/dense: ")
    assert not lacking(head, "dense initial")
    routers = [line for line in lines if not lacking(line, "dense router")]
    assert len(routers) == sum(probe.needs_routers for probe in PROBES)


def test_a_trained_run_is_sound(trained: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("doctor", trained)
    assert done.code == 0
    assert not lacking(done.out, f"{trained} trained")
    assert done.out.splitlines()[-1].startswith("sound: ")
    (text,) = (line for line in done.out.splitlines() if "routing of text" in line)
    assert re.fullmatch(
        r"(pass|warn)  routing of text .* highest load \d+\.\d times .* r -?[01]\.\d+\), .* loads [01]\.\d\d .*", text
    )
    refused = switchcli("doctor", trained, "model.num_experts=2")
    assert (refused.code, refused.out) == (2, "")
    assert not lacking(refused.err, f"{trained} KEY=VALUE model.num_experts")


@pytest.mark.integration
def test_a_hugging_face_folder_routes_text_as_its_run_does(trained: Path, tmp_path: Path, switchcli: SwitchCLI) -> None:
    folder = tmp_path / "theirs"
    assert switchcli("convert", trained, folder, "--to", "huggingface").code == 0
    ours, theirs = (json.loads(switchcli("doctor", name, "--json").out) for name in (trained, folder))
    assert theirs["sound"]
    of_text = [
        finding for found in (ours, theirs) for finding in found["findings"] if finding["probe"] == "routing of text"
    ]
    assert of_text[0] == of_text[1]


def test_json_is_one_object(trained: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("doctor", trained, "--json")
    assert (done.code, done.out.count("\n")) == (0, 1)
    found = json.loads(done.out)
    findings = found.pop("findings")
    assert found == {"model": str(trained), "initialized": False, "layers": 2, "experts": 4, "sound": True}
    assert [finding["probe"] for finding in findings] == [probe.name for probe in PROBES]
    for finding in findings:
        assert finding.keys() == {"probe", "verdict", "measured", "value", "advice"}
        assert finding["verdict"] in ("pass", "warn", "fail", "skip")
        assert isinstance(finding["value"], int | float | None)
        assert bool(finding["advice"]) == (finding["verdict"] in ("warn", "fail"))


def test_what_is_no_model(switchcli: SwitchCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "bert"}')
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    Path("list.yaml").write_text("[]")
    for name, code, words in [
        ("empty", 4, "empty checkpoint checkpoints/step-*"),
        ("other", 4, "other/config.json model_type switch_transformers 'bert'"),
        ("adapter", 4, "adapter LoRA merge_and_unload().save_pretrained(FOLDER"),
        ("nowhere", 2, "nowhere folder recipe"),
        ("google/switch-base-8", 2, "`switchcli convert google/switch-base-8 FOLDER --to switchcli`"),
        ("none.yaml", 2, "none.yaml file switchcli recipes list"),
        ("list.yaml", 2, "list.yaml:1 mapping"),
    ]:
        done = switchcli("doctor", name)
        assert (done.code, done.out) == (code, "")
        assert done.err.startswith("error: ")
        assert not lacking(done.err, words)
        assert done.err.count("\n") == 1


def test_a_model_too_large_for_the_machine(switchcli: SwitchCLI) -> None:
    done = switchcli("doctor", "quickstart/switch", "model.d_ff=1048576", "model.d_model=131072")
    assert (done.code, done.out) == (1, "")
    assert not lacking(done.err, "73,668,398,942,208 bytes model.num_experts=8 model.num_layers=2")
    assert done.err.count("\n") == 1


def ends(shown: str) -> list[tuple[str, str]]:
    """The first word of each line and its last."""
    return [(line.split()[0], line.split()[-1]) for line in shown.splitlines()]


@pytest.mark.integration
def test_the_files_of_a_run_are_verified_as_loading_does(begun: str, switchcli: SwitchCLI) -> None:
    assert switchcli("pretrain", begun, "train.steps=3", "--out", "a", "-q").code == 0
    two, three = (f"a/checkpoints/step-0000000{step}" for step in (2, 3))
    done = switchcli("doctor", FILES, "a")
    assert done.code == 0
    assert ends(done.out) == [("complete", three), ("complete", two), ("loading", three)]

    file = Path(three, "optimizer-00000.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = switchcli("doctor", FILES, "a")
    assert done.code == CHECKPOINT
    first, *others = done.out.splitlines()
    damage = first.removeprefix("damaged  ")
    assert damage.startswith(f"{file}: ")
    assert not lacking(damage, "SHA-256 checkpoint")
    assert ends("\n".join(others)) == [("complete", two), ("loading", two)]
    done = switchcli("doctor", FILES, "a", "--json")
    assert (done.code, json.loads(done.out)) == (
        CHECKPOINT,
        {"folder": "a", "complete": False, "loaded": two, "damage": {three: damage, two: None}},
    )
    assert switchcli("doctor", FILES, two).code == 0
    one = switchcli("doctor", FILES, three)
    assert one.code == CHECKPOINT
    lines = one.out.splitlines()
    assert (lines[0], len(lines), lacking(lines[1], "none complete")) == (f"damaged  {damage}", 2, [])
    assert switchcli("eval", three, "--out", "scores").err == f"error: {damage}\n"

    again = switchcli("pretrain", begun, "train.steps=3", "--out", "a")
    assert f"warning: {damage} " in again.err
    assert not lacking(again.err, "step 2 3")
    assert switchcli("doctor", FILES, "a").code == 0


@pytest.mark.integration
def test_files_without_a_manifest_and_no_files(trained: Path, switchcli: SwitchCLI, tmp_path: Path) -> None:
    lost = tmp_path / "checkpoints/step-00000002"
    shutil.copytree(trained / "checkpoints/step-00000002", lost)
    (lost / "MANIFEST").unlink()
    for name in (lost, tmp_path):
        done = switchcli("doctor", FILES, name)
        assert done.code == CHECKPOINT
        assert done.out.startswith(f"damaged  {lost}/MANIFEST: No such file")
    assert switchcli("eval", lost, "--out", tmp_path / "scores").err.startswith(f"error: {lost}/MANIFEST: No such file")
    for name in ("nowhere", "quickstart/switch"):
        done = switchcli("doctor", FILES, name)
        assert (done.code, done.out) == (CHECKPOINT, "")
        assert done.err.startswith(f"error: {name}: ")
        assert not lacking(done.err, "checkpoint checkpoints/step-*")
    refused = switchcli("doctor", FILES, trained, "model.num_experts=2")
    assert (refused.code, refused.out) == (2, "")
