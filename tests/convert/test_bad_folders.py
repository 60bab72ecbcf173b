"""Folders and options that are not what they should be: one line with the way out, and nothing left behind."""

import json
import os
import pickle
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import theirs
import torch
from doubles import NoWarnings
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from switchcli.cli import app
from switchcli.convert import config as configs
from switchcli.errors import CheckpointError, DataError, NumericsError, RecipeError, SwitchError
from switchcli.runs.inputs.loading import load_checkpoint

WI = "encoder.block.1.layer.1.mlp.experts.expert_1.wi.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder."""
    return theirs.save(theirs.switch(), tmp_path_factory.mktemp("made") / "sound")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(made, tmp_path / "theirs"))


def refused(*arguments: object, kind: type[SwitchError] = CheckpointError) -> str:
    """What `switchcli convert` says when it refuses: one line."""
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert type(done.exception) is kind or isinstance(done.exception, kind), done.exception
    said = str(done.exception)
    assert "\n" not in said
    return said


def missing(words: Sequence[str], said: str) -> list[str]:
    """Return the names, numbers, options and commands that a message does not hold, each as a whole word."""
    return [word for word in words if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", said)]


def reweigh(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change the tensors of model.safetensors; None takes one out. Dots are written `__`."""
    weights = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    return lambda folder: reweigh(folder, **{name.replace(".", "__"): tensor})


def configure(**keys: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return write


def without(key: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return write


def write(file: str, content: bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return act


def claim_more(folder: Path) -> None:
    """A header longer than the file."""
    path = folder / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])


def shard(weight_map: Callable[[dict[str, str]], object], twice: bool = False) -> Callable[[Path], None]:
    """Two shards with an index that `weight_map` makes of the right one."""

    def act(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
        for file in set(files.values()):
            part = {name: tensor for name, tensor in weights.items() if files[name] == file}
            save_file(part | ({"shared.weight": weights["shared.weight"]} if twice else {}), folder / file)
        index = {"metadata": {}, "weight_map": weight_map(files)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return act


def special(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """The index names one file that is a pipe or a device."""

    def act(folder: Path) -> None:
        shard(lambda files: files)(folder)
        path = folder / "model-00002-of-00002.safetensors"
        path.unlink()
        make(path)

    return act


def pickled(folder: Path) -> None:
    theirs.as_version_4(folder, pickled=True)


CASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing expert": (change(WI, None), (WI, "[40, 24]", "config.json", "save_pretrained")),
    "extra expert": (
        change(WI.replace("expert_1", "expert_3"), torch.zeros(40, 24)),
        ("model.safetensors", WI.replace("expert_1", "expert_3"), "config.json"),
    ),
    "other type": (change(WI, torch.zeros(40, 24, dtype=torch.int8)), (WI, "I8", "float32, bfloat16")),
    "other shape": (change(WI, torch.zeros(41, 24)), (WI, "[41, 24]", "[40, 24]", "config.json")),
    "unknown tensor": (change("encoder.extra.weight", torch.zeros(1)), ("encoder.extra.weight", "config.json")),
    "head that is not tied": (change("lm_head.weight", torch.zeros(61, 24)), ("lm_head.weight", "shared.weight")),
    "biased router": (configure(router_bias=True), ("config.json", "router_bias", "False", "True")),
    "gated experts": (configure(dense_act_fn="gated-gelu"), ("dense_act_fn", "'relu'", "'gated-gelu'")),
    "router in bfloat16": (configure(router_dtype="bfloat16"), ("router_dtype", "'float32'", "'bfloat16'")),
    "one expert": (configure(num_experts=1), ("num_experts", "2", "1")),
    "buckets": (configure(relative_attention_num_buckets=30), ("relative_attention_num_buckets", "4", "30")),
    "far buckets": (
        configure(relative_attention_max_distance=9),
        ("relative_attention_max_distance (9)", "16", "relative_attention_num_buckets (32)", "64"),
    ),
    "wrong type": (configure(d_model="24"), ("config.json", "d_model", "integer", "'24'")),
    "not finite": (configure(layer_norm_epsilon=float("nan")), ("layer_norm_epsilon", "finite", "nan")),
    "experts": (configure(num_experts=10**7), ("config.json", "num_experts", "1,048,576", "10000000")),
    "capacity": (
        configure(expert_capacity=10**400),
        ("config.json", "expert_capacity", "1,048,576", "save_pretrained"),
    ),
    "experts in all": (
        configure(num_experts=16384, num_layers=100, num_decoder_layers=None),
        ("num_experts", "16384", "200", "131,072"),
    ),
    "just within": (
        configure(num_experts=16384, num_layers=1, num_decoder_layers=1, encoder_sparse_step=1, decoder_sparse_step=0),
        ("router.classifier.weight", "[16384, 24]", "config.json"),
    ),
    "missing key": (without("d_ff"), ("config.json", "d_ff", "save_pretrained")),
    "other model": (configure(model_type="bert"), ("model_type", "'bert'", "T5ForConditionalGeneration")),
    "umT5": (configure(model_type="umt5"), ("model_type", "'umt5'", "position bias", "google/mt5-small")),
    "not JSON": (write("config.json", b"{"), ("config.json", "JSON")),
    "long header": (claim_more, ("model.safetensors", "copy")),
    "git-lfs": (
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("model.safetensors", "`git lfs pull`"),
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ("model.safetensors", "config.json", "save_pretrained"),
    ),
    "path in index": (
        shard(lambda files: {**files, WI: "../outside.safetensors"}),
        ("model.safetensors.index.json", "'../outside.safetensors'"),
    ),
    "device in index": (
        special(lambda path: path.symlink_to("/dev/zero")),
        ("model-00002-of-00002.safetensors", "device", "save_pretrained"),
    ),
    "missing shard": (
        shard(lambda files: {**files, WI: "model-3.safetensors"}),
        ("model-3.safetensors", "No such file", "save_pretrained"),
    ),
    "in two shards": (
        shard(lambda files: files, twice=True),
        ("shared.weight", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ),
    "wrong shard": (
        shard(lambda files: {**files, "shared.weight": min({*files.values()} - {files["shared.weight"]})}),
        ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "shared.weight", "save_pretrained"),
    ),
    "pickle": (pickled, ("pickle", "pytorch_model.bin", "switchcli convert", "--to switchcli --unpickle")),
    "large tokenizer": (
        write("tokenizer.json", theirs.tokenizer(60).encode()),
        ("tokenizer.json", "62", "config.json", "61", "--tokenizer"),
    ),
}


LARGE = "just within"
"""Its shapes, without weights, take seconds to build."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.nightly if case == LARGE else ()) for case in CASES]
)
def test_what_is_not_whole_is_refused_and_nothing_is_written(case: str, folder: Path) -> None:
    spoil, words = CASES[case]
    spoil(folder)
    said = refused(folder, folder.parent / "ours", "--to", "switchcli")
    assert not missing(words, said), said
    assert [path.name for path in folder.parent.iterdir()] == ["theirs"]
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(folder, torch.device("cpu"), NoWarnings())
    assert not missing(words, str(refusal.value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused_and_nothing_is_written(value: float, folder: Path) -> None:
    change(WI, torch.full((40, 24), value))(folder)
    said = refused(folder, folder.parent / "ours", "--to", "switchcli", kind=NumericsError)
    assert not missing(("model.safetensors", WI, "NaN or infinity"), said), said
    assert [path.name for path in folder.parent.iterdir()] == ["theirs"]


@pytest.mark.parametrize("content", [None, b"{", b"\xff"])
def test_no_tokenizer(content: bytes | None, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    if content:
        (folder / "tokenizer.json").write_bytes(content)
    said = refused(folder, folder.parent / "ours", "--to", "switchcli", kind=DataError)
    assert "tokenizer.json" in said
    (folder.parent / "mine.json").write_text(theirs.tokenizer())
    options = ["--tokenizer", str(folder.parent / "mine.json")]
    done = CliRunner().invoke(app, ["convert", str(folder), str(folder.parent / "ours"), "--to", "switchcli", *options])
    assert done.exit_code == 0


class Runs:
    """What a pickle may do when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


Pair = namedtuple("Pair", "one two")
PICKLES: dict[str, Callable[[Path], object]] = {
    "code": lambda path: torch.save({"shared.weight": Runs()}, path),
    "code, bare": lambda path: path.write_bytes(pickle.dumps(Runs())),
    "no dict": lambda path: torch.save([torch.zeros(1)], path),
    "no tensor": lambda path: torch.save({"shared.weight": 3}, path),
    "no pickle": lambda path: path.write_bytes(b"hello"),
    "empty": lambda path: path.write_bytes(b""),
    "zip": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "a class": lambda path: torch.save({"shared.weight": Pair(1, 2)}, path),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_of_anything_but_tensors_is_refused_and_not_run(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "model.safetensors").unlink()
    PICKLES[case](folder / "pytorch_model.bin")
    said = refused(folder, "ours", "--to", "switchcli", "--unpickle")
    assert re.search(r"pytorch_model\.bin: .*\btensors\b", said)
    assert [path.name for path in folder.parent.iterdir()] == ["theirs"]


def test_an_index_of_pickles_that_names_a_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"shared.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    os.mkfifo(folder / "pytorch_model-00001-of-00001.bin")
    said = refused(folder, folder.parent / "ours", "--to", "switchcli", "--unpickle")
    assert not missing(("pytorch_model-00001-of-00001.bin", "pipe"), said)


def test_destinations(folder: Path, tmp_path: Path) -> None:
    within = (f"source {folder}", "DESTINATION")
    assert not missing(within, refused(folder, folder / "ours", "--to", "switchcli"))
    assert not missing(within, refused(folder, folder, "--to", "switchcli"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert not missing((str(full), "already", "DESTINATION"), refused(folder, full, "--to", "switchcli"))
    assert not missing((f"{full}/file", "already"), refused(folder, full / "file", "--to", "switchcli"))
    empty = tmp_path / "empty"
    empty.mkdir()
    done = CliRunner().invoke(app, ["convert", str(folder), str(empty), "--to", "switchcli", "--json"])
    assert json.loads(done.stdout)["destination"] == str(empty)
    assert f"source {empty}: " in refused(empty, empty / "theirs", "--to", "huggingface")
    said = refused(folder, tmp_path / "x", "--to", "huggingface")
    assert not missing((str(folder), "Hugging Face", "--to switchcli"), said)
    assert not missing((str(empty), "config.json"), refused(empty, tmp_path / "x", "--to", "switchcli"))
    trainer = shutil.copytree(folder, tmp_path / "trainer" / "checkpoint-1000").parent
    shutil.copytree(folder, trainer / "checkpoint-500")
    assert not missing(("Trainer", f"{trainer}/checkpoint-1000"), refused(trainer, tmp_path / "x", "--to", "switchcli"))
    said = refused(tmp_path / "nowhere", tmp_path / "x", "--to", "huggingface")
    assert not missing((f"{tmp_path}/nowhere", "checkpoints/step-*"), said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "theirs", "trainer"]


def test_a_name_that_belongs_to_a_step(folder: Path, tmp_path: Path) -> None:
    said = refused(folder, tmp_path / "step-00000007", "--to", "switchcli")
    assert not missing(("step-00000007", "step 0", "DESTINATION"), said)
    for source, name, to in [(folder, "step-7", "switchcli"), (tmp_path / "step-7", "step-00000007", "huggingface")]:
        done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / name), "--to", to])
        assert done.exit_code == 0
        assert load_checkpoint(tmp_path / name, torch.device("cpu"), NoWarnings()).handle.step == 0


def test_options_of_one_layout_alone(folder: Path, tmp_path: Path) -> None:
    CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "ours"), "--to", "switchcli"])
    for options, names in [
        (["--unpickle"], "--unpickle: "),
        (["--tokenizer", "a.json", "--revision", "abc"], "--tokenizer: "),
    ]:
        said = refused(tmp_path / "ours", tmp_path / "x", "--to", "huggingface", *options, kind=RecipeError)
        assert said.startswith(names)
        assert "--to switchcli" in said
    for to, license_ in [("switchcli", "mit"), ("huggingface", "mit: yes")]:
        options = ["--to", to, "--license", license_]
        assert refused(tmp_path / "ours", tmp_path / "x", *options, kind=RecipeError).startswith("--license")


@pytest.mark.parametrize("to", ["switchcli", "huggingface"])
def test_a_full_disk(to: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder
    if to == "huggingface":
        source = folder.parent / "ours"
        CliRunner().invoke(app, ["convert", str(folder), str(source), "--to", "switchcli"], catch_exceptions=False)
    before = sorted(folder.parent.iterdir())
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    said = refused(source, folder.parent / "new", "--to", to)
    assert re.search(r"\b[\d,]{5,} bytes\b", said), "as many as are needed"
    assert not missing(("1,000 free", "DESTINATION"), said)
    assert sorted(folder.parent.iterdir()) == before


def test_a_name_on_the_hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, str, list[str]]] = []

    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(made)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    arguments = ["convert", "google/switch-base-8", "ours", "--to", "switchcli", "--revision", "abc", "--unpickle"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [(name, revision) for name, revision, _ in asked] == [("google/switch-base-8", "abc")]
    assert not any("bin" in pattern for pattern in asked[0][2])
    files = ["config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors"]
    files += ["model.safetensors.index.json", "model.fp16.safetensors", "model_2.safetensors", "spiece.model"]
    wanted = [*files[:5], "spiece.model"]
    assert [file for file in files if any(fnmatch(file, pattern) for pattern in asked[0][2])] == wanted
    assert load_checkpoint(Path("ours"), torch.device("cpu"), NoWarnings()).handle.step == 0


def test_pickles_of_the_hub_are_downloaded_only_when_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs.as_version_4(folder, pickled=True)
    asked: list[list[str]] = []

    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert not missing(("pickle", "--unpickle"), refused("google/switch-base-8", "ours", "--to", "switchcli"))
    assert not any("bin" in pattern for patterns in asked for pattern in patterns)
    arguments = ["convert", "google/switch-base-8", "ours", "--to", "switchcli", "--unpickle"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "pytorch_model*.bin" in asked[-1]


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        raise OSError("no route for secret-of-the-user\nat all")

    monkeypatch.setenv("HF_TOKEN", "secret-of-the-user")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said = refused("google/no-such", tmp_path / "ours", "--to", "switchcli")
    assert said.startswith("google/no-such: ")
    assert not missing(("(no route for [token])", "--revision", "network"), said)


KEYS = [*configs.SwitchConfig.model_fields, *configs.T5Config.model_fields, "architectures"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_config_is_read_or_refused_in_one_line(made: Path, keys: dict[str, Any]) -> None:
    before = json.loads((made / "config.json").read_text())
    folder = made.parent / "any"
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**before, **keys}))
    said = ""
    try:
        configs.to_model_spec(configs.read_config(path), configs.StackLengths(512, 114), path)
    except CheckpointError as refusal:
        said = str(refusal)
    assert not said or said.startswith(f"{path}: ")
    assert "\n" not in said


def test_keys_of_config_json_that_are_no_sizes_are_ignored(folder: Path) -> None:
    """Trainers write keys of their own, whose names a recipe may bound, such as `seed`."""
    before = configs.read_config(folder / "config.json")
    configure(seed=0, steps=0, count=-1, batch_tokens=0)(folder)
    assert configs.read_config(folder / "config.json") == before
