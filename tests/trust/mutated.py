"""Files of every kind that switchcli reads, damaged by chance and on purpose, read as the commands read them.

What is accepted is used: a tokenizer cuts texts, a state trains on, a run is drawn. All that may be raised is a
SwitchError.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow
import torch
from forked import faults, refused
from mutations import mutate_bytes, mutate_json, mutate_text
from pyarrow import parquet
from table import Row

from switchcli.checkpoint import manifest
from switchcli.checkpoint.checkpoint import Checkpoint, latest_read_only
from switchcli.convert.weight_files import is_hugging_face_folder
from switchcli.data.sources.files import FilesCorpus
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.recipe.schema import resolve_standalone
from switchcli.report import run_report
from switchcli.report.charts import write_files
from switchcli.report.console import silent
from switchcli.report.html_page import page
from switchcli.runs import loading
from switchcli.runs.run_comparison import compare_runs
from switchcli.runs.transformers_checkpoint import meta_model
from switchcli.training.checkpointer import logical_tensors
from switchcli.training.state import TrainState

CPU = torch.device("cpu")
TEXTS = [
    "red <extra_id_0> green",
    "caf\u00e9 e\u0301\u00a0\u2028 \u202e\0 \U0001f600",
    "",
    " \n\n\t ",
    "a" * 5000,
    "</s><pad><unk>\u2581",
]


class Base(NamedTuple):
    """Sound files to damage."""

    run: Path
    """A pre-trained run of two steps."""
    hugging_face: Path
    """The same in that layout."""
    text: bytes
    recipe: bytes


def rows(base: Base, folder: Path, long: bool) -> list[Row]:
    """A row for each kind of file."""
    found = []
    for what, (_, short, many) in KINDS.items():
        work = folder / what.replace(" ", "-")
        work.mkdir()
        count = many if long else short
        wrong = tried(what, base, work, count)
        found.append(Row("f", f"{what} mutated", count, len(wrong), wrong[0] if wrong else ""))
    return found


def tried(what: str, base: Base, work: Path, count: int) -> list[str]:
    """What went wrong with so many of a kind."""
    return faults(count, lambda number: KINDS[what][0](base, work, random.Random(number)))


def _tokenizer(base: Base, folder: Path, draw: random.Random) -> str:
    content = mutate_json((base.run / "tokenizer.json").read_bytes(), draw)

    def use() -> None:
        tokenizer = Tokenizer.from_bytes(content, "tokenizer.json")
        for text in TEXTS:
            tokenizer.decode(tokenizer.encode(text))
            tokenizer.pieces(tokenizer.encode(text))
        for ids in tokenizer.encode_batch(TEXTS):
            assert ids.min(initial=0) >= 0
            assert ids.max(initial=0) < tokenizer.vocab_size

    return refused(use)


def _state(base: Base, folder: Path, draw: random.Random) -> str:
    path = _copied(base, folder)
    _seal(path, "state.json", mutate_json((path / "state.json").read_bytes(), draw))

    def use() -> None:
        found = latest_read_only(folder / "run/checkpoints", warn=lambda text: None)
        state = TrainState()
        state.restore(found.document("state.json"), CPU, with_metrics=True)
        assert state.step == found.step
        state.record_evaluation({"held_out/neg_log_perplexity": -1.0})
        state.to_json(state.metrics_since_log)

    return refused(use)


def _documents(base: Base, folder: Path, draw: random.Random) -> str:
    path = _copied(base, folder)
    name = draw.choice(["data.json", "recipe.yaml", "tokenizer.json"])
    mutate = mutate_text if name == "recipe.yaml" else mutate_json
    _seal(path, name, mutate((path / name).read_bytes(), draw))
    return refused(partial(loading.open_model, folder / "run", silent()))


def _bytes(base: Base, folder: Path, draw: random.Random) -> str:
    """Without a new manifest: every change is noticed."""
    path = _copied(base, folder)
    file = draw.choice(sorted(path.iterdir()))
    before = file.read_bytes()
    after = mutate_bytes(before, draw)
    file.write_bytes(after)
    noticed = []

    def use() -> None:
        try:
            Checkpoint.open(path)
        except manifest.DamagedError:
            noticed.append(True)

    return refused(use) or ("" if noticed or before == after else f"{file.name}: not noticed")


def _tensors(base: Base, folder: Path, draw: random.Random) -> str:
    path = _copied(base, folder)
    name = draw.choice([file.name for file in path.glob("*.safetensors")])
    _seal(path, name, _safetensors((path / name).read_bytes(), draw))

    def use() -> None:
        found = Checkpoint.open(path)
        found.tensor_specs("optimizer")
        recipe, _ = loading.read_documents(found)
        for tensor in found.read("model", logical_tensors(meta_model(recipe.model))).values():
            assert tensor.shape is not None

    return refused(use)


def _hugging_face(base: Base, folder: Path, draw: random.Random) -> str:
    copy = folder / "theirs"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base.hugging_face, copy)
    file = draw.choice([copy / name for name in ("config.json", "tokenizer.json", "model.safetensors")])
    mutate = _safetensors if file.suffix == ".safetensors" else mutate_json
    file.write_bytes(mutate(file.read_bytes(), draw))

    def use() -> None:
        if is_hugging_face_folder(copy):
            opened = loading.open_model(copy, silent())
            loading.load_model(opened, CPU)

    return refused(use)


def _run(base: Base, folder: Path, draw: random.Random) -> str:
    """What `report` reads: a run that is there, or was."""
    run = folder / "reported"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for name in ("metrics.jsonl", "result.json", "recipe.yaml", "tokenizer.json"):
        shutil.copy(base.run / name, run / name)
    file = run / draw.choice(["metrics.jsonl", "result.json", "recipe.yaml"])
    content = file.read_bytes()
    if file.name == "metrics.jsonl":
        content = _a_line(content, draw)
    else:
        content = (mutate_text if file.name == "recipe.yaml" else mutate_json)(content, draw)
    file.write_bytes(content)

    def use() -> None:
        found = compare_runs([run], silent())
        page("mutated", run_report.parts(found)).encode()
        json.dumps(run_report.to_json(found), allow_nan=False)
        scores = found._replace(comparison=None)
        write_files(run_report.every_figure(scores), run_report.every_table(scores), folder / "figures")

    return refused(use)


def _recipe(base: Base, folder: Path, draw: random.Random) -> str:
    file = folder / "mutated.yaml"
    file.write_bytes(mutate_text(base.recipe, draw))
    return refused(lambda: resolve_standalone(str(file)))


def _data(base: Base, folder: Path, draw: random.Random) -> str:
    ending = draw.choice([*PACKED])
    content = PACKED[ending](base.text)
    content = _a_line(content, draw) if ending == ".jsonl" else mutate_bytes(content, draw)
    file = folder / f"text{ending}"
    file.write_bytes(content)
    sample_by = draw.choice(["line", "paragraph", "document"])
    return refused(lambda: [*FilesCorpus(paths=(str(file),), sample_by=sample_by).documents()])


def _a_line(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines()
    place = draw.randrange(len(lines))
    lines[place] = mutate_json(lines[place], draw)
    return b"\n".join(lines)


def _safetensors(content: bytes, draw: random.Random) -> bytes:
    """Its header as JSON, or its first bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    if draw.random() < 0.3:
        return mutate_bytes(content[: end + 64], draw) + content[end + 64 :]
    header = mutate_json(content[8:end], draw)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _copied(base: Base, folder: Path) -> Path:
    """The checkpoint of a copy of the run."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.copytree(base.run / "checkpoints", folder / "run/checkpoints")
    return next((folder / "run/checkpoints").iterdir())


def _seal(path: Path, name: str, content: bytes) -> None:
    """A file, and a manifest that vouches for it: what an author writes who means harm."""
    (path / name).write_bytes(content)
    before = manifest.load(path)
    entry = manifest.Entry(name, len(content), hashlib.sha256(content).hexdigest())
    entries = tuple(entry if one.name == name else one for one in before.entries)
    (path / manifest.NAME).write_bytes(manifest.Manifest(before.step, entries).encode())


def _json_lines(text: bytes) -> bytes:
    return b"".join(json.dumps({"text": line, "n": 1}).encode() + b"\n" for line in text.decode().splitlines())


def _parquet(text: bytes) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": text.decode().splitlines()}), file, row_group_size=20)
    return file.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".txt": bytes,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".txt.gz": gzip.compress,
    ".jsonl.gz": lambda text: gzip.compress(_json_lines(text)),
    ".txt.bz2": bz2.compress,
    ".txt.xz": lzma.compress,
    ".txt.zst": lambda text: pyarrow.compress(text, codec="zstd", asbytes=True),
}
Trial = Callable[[Base, Path, random.Random], str]
KINDS: dict[str, tuple[Trial, int, int]] = {
    "tokenizer.json": (_tokenizer, 40, 2000),
    "state.json": (_state, 30, 1000),
    "documents of a checkpoint": (_documents, 20, 500),
    "bytes of a checkpoint": (_bytes, 30, 1000),
    "safetensors headers": (_tensors, 40, 2000),
    "Hugging Face folders": (_hugging_face, 20, 1000),
    "metrics, results of runs": (_run, 20, 500),
    "recipe.yaml": (_recipe, 40, 2000),
    "text, JSON Lines, Parquet, packed": (_data, 60, 2000),
}
"""Each with how many are tried in short and in long."""
