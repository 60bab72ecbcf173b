"""Files damaged by chance, or written on purpose, are used as they are or refused in words."""

import bz2
import copy
import gzip
import io
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiny_checkpoint import reseal

from switchcli.checkpoint import manifest
from switchcli.checkpoint.checkpoint import Checkpoint, newest
from switchcli.checkpoint.documents import RECIPE
from switchcli.convert.weight_files import is_hugging_face_folder
from switchcli.data.sources.files import FilesCorpus
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import SwitchError
from switchcli.report import run_report
from switchcli.report.html_page import page
from switchcli.report.run_comparison import compare_runs
from switchcli.runs.inputs import loading
from switchcli.runs.inputs.trained_recipe import read_recipe
from switchcli.terminal.console import silent
from switchcli.training.state import TrainState

CPU = torch.device("cpu")
TEXTS = [
    "red <extra_id_0> green",
    "caf\u00e9 e\u0301\u00a0\u2028 \u202e\0 \U0001f600",
    "",
    " \n\t ",
    "a" * 5000,
    "</s>\u2581",
]
NASTY: list[Any] = [
    *(None, True, 0, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "0", "\x1b[2J\u202e", "\0", "../../x", "/etc/passwd", "x" * 100_000, "<unk>", "\u2581"),
    *([], {}, [[]], [None], {"": None}, {"type": "x"}, [0] * 1000, [["a", 0.0]], {"a": 2**31}),
]
BYTES = [b"\0", b"\n", b"\xff\xfe", b"\xed\xa0\x80", b'"', b"{", b"- -", b"&a *a", b"!!binary aGk="]


@st.composite
def any_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with bytes flipped, cut, doubled, zeroed or put in."""
    at, length = draw(st.integers(0, len(content))), draw(st.sampled_from([0, 1, 8, 64, len(content)]))
    before, hit, after = content[:at], content[at : at + length], content[at + length :]
    flipped = bytes(byte ^ 1 for byte in hit)
    return before + draw(st.sampled_from([b"", hit + hit, flipped, bytes(len(hit)), *BYTES])) + after


@st.composite
def any_json(draw: st.DrawFn, content: bytes) -> bytes:
    """JSON with a value replaced, at any depth, a key removed or renamed, or bytes changed."""
    if draw(st.integers(0, 4)) == 0:
        return draw(any_bytes(content))
    root = [json.loads(content)]
    inner: Any = root
    key: Any = 0
    while isinstance(inner[key], dict | list) and inner[key] and draw(st.booleans()):
        inner = inner[key]
        key = draw(st.sampled_from([*inner] if isinstance(inner, dict) else range(len(inner))))
    what = draw(st.sampled_from(["replace", "remove", "rename"]))
    if what == "replace" or inner is root:
        inner[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    else:
        value = inner.pop(key)
        if what == "rename" and isinstance(inner, dict):
            inner[draw(st.sampled_from(["", f"{key}_", "\ud800"]))] = value
    return json.dumps(root[0]).encode("utf-8", "surrogatepass")


@st.composite
def any_header(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with another header."""
    end = 8 + int.from_bytes(content[:8], "little")
    if draw(st.booleans()):
        return draw(any_bytes(content[: end + 64])) + content[end + 64 :]
    header = draw(any_json(content[8:end]))
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def use_tokenizer(run: Path) -> None:
    tokenizer = Tokenizer.from_bytes((run / "tokenizer.json").read_bytes(), "tokenizer.json")
    for text in TEXTS:
        tokenizer.decode(tokenizer.encode(text))
        tokenizer.pieces(tokenizer.encode(text))
    for ids in tokenizer.encode_batch(TEXTS):
        assert 0 <= ids.min(initial=0) <= ids.max(initial=0) < tokenizer.vocab_size


def use_state(run: Path) -> None:
    found = newest(run / "checkpoints", warn=lambda text: None)
    state = TrainState()
    state.restore(found.document("state.json"), CPU, with_metrics=True)
    assert state.step == found.step
    state.record_evaluation({"held_out/neg_log_perplexity": -1.0})
    state.to_json(state.metrics_since_log)


def use_tensors(run: Path) -> None:
    found = Checkpoint.open(run / STEP)
    found.tensor_specs("optimizer")
    read_recipe(found.document(RECIPE), found.path)
    loading.open_model(found.path, silent()).weights()


def use_report(run: Path) -> None:
    found = compare_runs([run], silent())
    page("damaged", run_report.parts(found)).encode()
    json.dumps(run_report.to_json(found), allow_nan=False)


def use_hugging_face(folder: Path) -> None:
    if is_hugging_face_folder(folder):
        loading.load_model(loading.open_model(folder, silent()), CPU)


def use_text(file: Path) -> None:
    for sample_by in ("line", "paragraph", "document"):
        list(FilesCorpus(paths=(str(file),), sample_by=sample_by).documents())


def use_model(run: Path) -> None:
    loading.open_model(run, silent())


STEP = "checkpoints/step-00000002"
Strategy = Callable[[bytes], st.SearchStrategy[bytes]]
KINDS: list[tuple[str, Strategy, Callable[[Path], None]]] = [
    ("tokenizer.json", any_json, use_tokenizer),
    ("result.json", any_json, use_report),
    ("recipe.yaml", any_bytes, use_report),
    (f"{STEP}/state.json", any_json, use_state),
    (f"{STEP}/data.json", any_json, use_model),
    (f"{STEP}/tokenizer.json", any_json, use_model),
    (f"{STEP}/recipe.yaml", any_bytes, use_model),
    (f"{STEP}/model-00000.safetensors", any_header, use_tensors),
    (f"{STEP}/optimizer-00000.safetensors", any_header, use_tensors),
    ("theirs/config.json", any_json, lambda run: use_hugging_face(run / "theirs")),
    ("theirs/tokenizer.json", any_json, lambda run: use_hugging_face(run / "theirs")),
    ("theirs/model.safetensors", any_header, lambda run: use_hugging_face(run / "theirs")),
]
"""A file of a run or beside it, its damage, and what reads it."""


def assert_used_or_refused(use: Callable[[Path], None], path: Path) -> None:
    try:
        use(path)
    except SwitchError as error:
        assert error.exit_code in (2, 3, 4, 5), error  # noqa: PT017  # any other end is an error of this test


@pytest.fixture(scope="module")
def run(trained: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and in its folder `theirs` the same in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(trained, folder)
    shutil.copytree(converted, folder / "theirs")
    return folder


A_FEW = settings(max_examples=settings().max_examples // 4)
"""A quarter of the examples: a file takes longer than the example of another test."""


@A_FEW
@given(data=st.data())
@pytest.mark.parametrize(("name", "damage", "use"), KINDS, ids=[name for name, _, _ in KINDS])
def test_a_damaged_file_is_used_or_refused_in_words(
    name: str, damage: Strategy, use: Callable[[Path], None], data: st.DataObject, run: Path
) -> None:
    """The manifest of a checkpoint vouches for it, as an enemy's would."""
    file = run / name
    sound, vouched = file.read_bytes(), (run / STEP / manifest.NAME).read_bytes()
    file.write_bytes(data.draw(damage(sound)))
    if file.parent == run / STEP:
        reseal(run / STEP)
    try:
        assert_used_or_refused(use, run)
    finally:
        file.write_bytes(sound)
        (run / STEP / manifest.NAME).write_bytes(vouched)


@A_FEW
@given(data=st.data())
def test_any_damage_to_a_checkpoint_is_found(data: st.DataObject, run: Path) -> None:
    file = data.draw(st.sampled_from(sorted((run / STEP).iterdir())))
    sound = file.read_bytes()
    damaged = data.draw(any_bytes(sound))
    file.write_bytes(damaged)
    try:
        if damaged != sound:
            with pytest.raises(manifest.DamagedError):
                Checkpoint.open(run / STEP)
    finally:
        file.write_bytes(sound)


LINES = [f"{word} walks over the {word}" for word in ("red", "green", "blue")] * 5
TEXT = "\n".join(LINES).encode()
JSON_LINES = b"".join(json.dumps({"text": line, "n": 1}).encode() + b"\n" for line in LINES)


def as_parquet() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": LINES}), file, row_group_size=4)
    return file.getvalue()


PACKED = {
    ".txt": TEXT,
    ".jsonl": JSON_LINES,
    ".parquet": as_parquet(),
    ".txt.gz": gzip.compress(TEXT),
    ".jsonl.gz": gzip.compress(JSON_LINES),
    ".txt.bz2": bz2.compress(TEXT),
    ".txt.xz": lzma.compress(TEXT),
    ".txt.zst": pyarrow.compress(TEXT, codec="zstd", asbytes=True),
}


@A_FEW
@given(data=st.data())
@pytest.mark.parametrize("ending", PACKED)
def test_a_damaged_text_is_read_or_refused_in_words(
    ending: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / f"damaged{ending}"
    file.write_bytes(data.draw(any_bytes(PACKED[ending])))
    assert_used_or_refused(use_text, file)
