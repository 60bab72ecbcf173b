"""No recipe, archive or data set sends a secret of the environment to a host: fsspec would, by a URL of reference://."""

import io
import json
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import urlopen

import fsspec
import pytest
from fsspec.registry import _registry
from pydantic import TypeAdapter, ValidationError
from tiny_run import RECIPE, SwitchCLI

from switchcli.data.sources.corpus import _open_dataset
from switchcli.errors import DataError, RecipeError
from switchcli.spec import PROTOCOLS, PathOrUrl

SECRET = "c4n4ry"
PLACES = [
    "data.corpora=[{{kind: files, paths: ['{}']}}]",
    "data.corpora=[{{kind: files, paths: [text.txt, '{}']}}]",
    "data.corpora=[{{kind: files, paths: ['{{language}}'], languages: ['{}']}}]",
    "data.corpora=[{{kind: hub, path: '{}'}}]",
    "data.corpora=[{{kind: hub, path: json, data_files: '{}'}}]",
    "data.corpora=[{{kind: hub, path: json, data_files: [rows.jsonl, '{}']}}]",
    "data.tokenizer={{kind: file, path: '{}'}}",
    "data.tokenizer={{kind: hub, path: '{}'}}",
]
"""Overrides that name a place."""
CHAINS = [
    "reference://a.txt::http://HOST/refs.json",
    "reference://a.txt::file://refs.json",
    "reference://*::refs.json",
    "reference::refs.json",
    "zip://a.txt::reference://a.txt::http://HOST/refs.json",
    "gzip::reference::http://HOST/refs.json",
]


class Http(fsspec.AbstractFileSystem):
    """A stand-in for fsspec's own, which needs aiohttp."""

    protocol = "http"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.cat_file(path)), "type": "file"}

    def _open(self, path: str, *_: Any, **options: Any) -> io.BytesIO:
        return io.BytesIO(urlopen(path).read())


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that a host was asked for, which holds references that lead back to it, with a secret in the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SWITCHCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(_registry, "http", Http)
    monkeypatch.delitem(_registry, "reference", raising=False)
    _open_dataset.cache_clear()
    asked = list[str]()

    class Host(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = Path("refs.json").read_bytes() if self.path == "/refs.json" else b'{"text": "a"}\n'
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        url = f"http://{host}/{{{{u.__globals__[os].environ[HF_TOKEN]}}}}"
        Path("refs.json").write_text(json.dumps({"version": 1, "templates": {"u": "{{c}}"}, "refs": {"a.txt": [url]}}))
        Path("host").write_text(host)
        Path("text.txt").write_text("one\n\ntwo\n")
        Path("mine.yaml").write_text(RECIPE)
        yield asked
        server.shutdown()


@pytest.mark.parametrize("chain", CHAINS)
def test_a_recipe_with_a_reference_is_refused_and_nothing_is_asked_for(
    chain: str, requests: list[str], switchcli: SwitchCLI
) -> None:
    chain = chain.replace("HOST", Path("host").read_text())
    commands = [
        ("recipes", "validate", "mine.yaml"),
        ("pretrain", "mine.yaml", "--dry-run"),
        ("data", "prepare", "mine.yaml"),
    ]
    for place in PLACES:
        for command in commands:
            done = switchcli(*command, place.format(chain))
            assert (done.code, requests) == (RecipeError.exit_code, []), done.err
            assert "reference://" in done.err


@pytest.mark.parametrize(
    "member", ["a.jsonl::reference::refs.json", "d/a.jsonl::reference://a.txt::http://HOST/refs.json"]
)
def test_a_file_of_an_archive_whose_name_is_a_chain_is_not_opened_as_one(
    member: str, requests: list[str], switchcli: SwitchCLI
) -> None:
    Path("set").mkdir()
    with zipfile.ZipFile("set/archive.zip", "w") as archive:
        archive.writestr("b.jsonl", '{"text": "b"}\n')
        archive.writestr(member.replace("HOST", Path("host").read_text()), '{"text": "a"}\n')
    for corpus in (
        "{kind: files, paths: ['zip://**::set/archive.zip']}",
        "{kind: hub, path: json, data_files: 'zip://**::set/archive.zip'}",
        "{kind: hub, path: set}",
    ):
        done = switchcli("data", "prepare", "mine.yaml", f"data.corpora=[{corpus}]")
        assert done.code in (0, DataError.exit_code), done.err
        assert SECRET not in "".join(requests)


def test_a_card_of_the_hub_that_names_a_reference_sends_nothing(
    requests: list[str], switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` looks for the files that a card names before it refuses those that are not the data set's own."""

    def load_dataset(path: str, *_: Any, **options: Any) -> Any:
        with fsspec.open(CHAINS[0].replace("HOST", Path("host").read_text())) as file:
            return [{"text": file.read().decode()}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    done = switchcli("data", "prepare", "mine.yaml", "data.corpora=[{kind: hub, path: some/name}]")
    assert done.code == DataError.exit_code
    assert SECRET not in "".join(requests)


def test_every_protocol_but_those_that_are_listed_is_refused_wherever_it_stands() -> None:
    place = TypeAdapter(PathOrUrl)
    shapes = [
        *("{}://a/*.txt", "{}://a.txt::http://h/b", "zip://a.txt::{}://h/b", "zip://a.txt::{}://h/b::http://h/c"),
        *("{}::http://h/b", "zip://a::{}::http://h/b", "zip://a::http://h/b::{}", "gzip::{}::zip://a::b.zip"),
    ]
    known = {*fsspec.available_protocols(), "unknown", "memory", "REFERENCE", "Http", " reference", "{reference,zip}"}
    assert len(known) > 50
    for shape in shapes:
        for protocol in known - {*PROTOCOLS}:
            if "://" in shape.split("{}")[1][:3] or protocol.isidentifier():  # other words of a chain are paths
                with pytest.raises(ValidationError, match="not supported"):
                    place.validate_python(shape.format(protocol))
        for protocol in PROTOCOLS:
            place.validate_python(shape.format(protocol))
    with pytest.raises(ValidationError, match="not supported"):
        place.validate_python("data:text/plain,a")


def test_the_pages_list_the_protocols() -> None:
    for page in ("SECURITY.md", "docs/how-to/own-text.md"):
        text = (Path(__file__).parents[2] / page).read_text()
        assert all(f"`{protocol}`" in text for protocol in PROTOCOLS), page
