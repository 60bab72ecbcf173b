"""The tokenizer of a Hugging Face folder: its own files, a file or folder that it names, the local hub cache."""

import json
import os
import shutil
import string
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import theirs
from messages import lacking
from typer.testing import CliRunner

from switchcli.cli import app
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError, RecipeError

REPOSITORY = "google/some-model"


def spiece() -> bytes:
    """A SentencePiece model with the pieces of `theirs.tokenizer`."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("\u2581", -1.0, 1)]
    pieces += [((string.ascii_letters + string.digits)[index], -2.0 - index, 1) for index in range(36)]
    pieces += [(f"<extra_id_{index}>", 0.0, 4) for index in (2, 1, 0)]
    trainer = field(2, b"\xc0\x02\x02")  # its unk_id is 2
    return trainer + b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))
        for text, score, kind in pieces
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs.save(theirs.switch(), tmp_path_factory.mktemp("made") / "switch")


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model without a tokenizer; the current folder is its parent."""
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(made, tmp_path / "theirs"))
    (copy / "tokenizer.json").unlink()
    return copy


def configure(folder: Path, name: str, **keys: object) -> None:
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **keys}))


def own_spiece(folder: Path) -> None:
    (folder / "spiece.model").write_bytes(spiece())


def vocab_file(folder: Path) -> None:
    (folder / "other.model").write_bytes(spiece())
    configure(folder, "tokenizer_config.json", vocab_file="other.model", tokenizer_file=None)


def absolute_vocab_file(folder: Path) -> None:
    file = folder.parent / "elsewhere.model"
    file.write_bytes(spiece())
    configure(folder, "tokenizer_config.json", vocab_file=str(file))


def local_folder(folder: Path) -> None:
    base = folder.parent / "base"
    base.mkdir()
    (base / "spiece.model").write_bytes(spiece())
    configure(folder, "config.json", _name_or_path=str(base))


def relative_folder(folder: Path) -> None:
    local_folder(folder)
    configure(folder, "config.json", _name_or_path="")
    configure(folder, "tokenizer_config.json", name_or_path="../base")


def hub_cache(folder: Path) -> None:
    snapshot = Path(os.environ["HF_HUB_CACHE"], f"models--{REPOSITORY.replace('/', '--')}")
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs/main").write_text("0" * 40)
    (snapshot / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (snapshot / "snapshots" / ("0" * 40) / "spiece.model").write_bytes(spiece())
    configure(folder, "config.json", _name_or_path=REPOSITORY)


@pytest.fixture
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)


def links_of_the_hubs_cache(folder: Path) -> None:
    """The layout of `snapshot_download`."""
    snapshot = folder.parent / "repository/snapshots/0123"
    (folder.parent / "repository/blobs").mkdir(parents=True)
    own_spiece(folder)
    folder.rename(folder.parent / "files")
    snapshot.mkdir(parents=True)
    for number, file in enumerate((folder.parent / "files").iterdir()):
        file.rename(folder.parent / "repository/blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    folder.symlink_to(snapshot)


WAYS = [own_spiece, vocab_file, hub_cache, links_of_the_hubs_cache]
ELSEWHERE = [absolute_vocab_file, local_folder, relative_folder]


@pytest.mark.usefixtures("own_hub_cache")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_tokenizer_that_a_folder_names_elsewhere_is_not_read(name: Callable[[Path], None], folder: Path) -> None:
    name(folder)
    for arguments in (["convert", "theirs", "ours", "--to", "switchcli"], ["generate", "theirs", "ab"]):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, DataError), done.exception
        assert "--tokenizer" in str(done.exception)
    assert not Path("ours").exists()


@pytest.mark.usefixtures("own_hub_cache")
@pytest.mark.parametrize("give", WAYS)
def test_a_folder_that_has_or_names_its_tokenizer_is_used_as_it_is(give: Callable[[Path], None], folder: Path) -> None:
    give(folder)
    for arguments in (
        ["convert", "theirs", "ours", "--to", "switchcli"],
        ["generate", "theirs", "ab <extra_id_0> c", "--max-tokens", "2"],
        ["data", "tokenizer", "show", "theirs"],
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{arguments}: {done.exception or done.output}"
    wanted = Tokenizer.from_bytes(spiece(), "spiece.model")
    (converted,) = Path("ours").rglob("tokenizer.json")
    assert Tokenizer.read(converted).sha256 == wanted.sha256


def test_without_transformers_a_folder_with_a_spiece_model_alone_is_refused_with_the_command_that_helps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_spiece(folder)
    monkeypatch.setitem(sys.modules, "transformers.convert_slow_tokenizer", None)
    done = CliRunner().invoke(app, ["generate", "theirs", "ab"])
    assert isinstance(done.exception, RecipeError), done.exception
    words = "theirs/spiece.model tokenizer.json pip install transformers protobuf switchcli convert --to switchcli"
    assert not lacking(str(done.exception), words)


@pytest.mark.usefixtures("own_hub_cache")
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"name_or_path": REPOSITORY},
        {"name_or_path": "x" * 300, "vocab_file": "y" * 5000},
        {"name_or_path": 5, "vocab_file": ["a"]},
        {"name_or_path": "a\0b", "vocab_file": "a\0b"},
        {"vocab_file": "/dev/zero", "tokenizer_file": "/dev/stdin"},
    ],
)
def test_a_folder_without_one_is_refused_with_the_option_and_without_the_network(
    keys: dict[str, object], folder: Path
) -> None:
    configure(folder, "tokenizer_config.json", **keys)
    done = CliRunner().invoke(app, ["convert", "theirs", "ours", "--to", "switchcli"])
    assert isinstance(done.exception, DataError), done.exception
    assert "--tokenizer" in str(done.exception)
    assert "spiece.model" in str(done.exception)
    assert not Path("ours").exists()


def test_the_own_file_comes_first(folder: Path) -> None:
    local_folder(folder)
    (folder / "tokenizer.json").write_text(theirs.tokenizer(30))
    done = CliRunner().invoke(app, ["data", "tokenizer", "show", "theirs", "--json"])
    assert json.loads(done.output)["vocab_size"] == 33
