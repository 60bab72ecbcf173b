"""Only regular files are opened; a pipe or a device is refused at once, in words."""

import os
from pathlib import Path

import pytest

from switchcli.data.sources.files import FilesCorpus
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError, RecipeError
from switchcli.recipe import resolve
from switchcli.system.user_files import open_regular, read_regular


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "file", 7) == read_regular(tmp_path / "link", 7) == b"content"
    with open_regular(tmp_path / "file", follow_links=False) as file:
        assert file.read() == b"content"
    with pytest.raises(OSError, match="link"):
        open_regular(tmp_path / "link", follow_links=False)
    with pytest.raises(OSError, match=r"\b6 bytes\b"):
        read_regular(tmp_path / "file", 6)


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(pipe: Path) -> None:
    (pipe.parent / "link").symlink_to("pipe")
    for path, kind in (
        (pipe, "pipe"),
        (pipe.parent / "link", "pipe"),
        (Path("/dev/zero"), "device"),
        (Path("/"), "folder"),
    ):
        with pytest.raises(OSError, match=kind):
            open_regular(path)


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/dev/null"])
def test_every_file_that_a_recipe_names_must_be_regular(name: str, pipe: Path) -> None:
    path = pipe.parent / name
    with pytest.raises(DataError, match=r"\ba (pipe|device)\b"):
        FilesCorpus(paths=(str(path),)).source_shards()
    with pytest.raises(DataError, match=r"\ba (pipe|device)\b"):
        Tokenizer.read(path)
    with pytest.raises(RecipeError, match=r"\ba (pipe|device)\b"):
        resolve.load(str(path))
    child = pipe.parent / "child.yaml"
    child.write_text(f"extends: {path}\n")
    with pytest.raises(RecipeError, match=r"\ba (pipe|device)\b"):
        resolve.load(str(child))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a**/*.txt", r"a\*/\*\*/\*\.txt"),
        ("https://a**/*.txt", r"a\*/\*\*/\*\.txt"),
        ("n" * 300, "too long"),
        ("loop", r"\bloop: .*\bpath\b"),
    ],
)
def test_a_path_that_the_system_refuses_is_an_error_of_the_data(
    path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match=words):
        FilesCorpus(paths=(path,)).source_shards()
    with pytest.raises(DataError):
        Tokenizer.read(Path(path))
