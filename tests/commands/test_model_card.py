"""The card of a converted model: figures of the run, a valid header, and nothing that is not for publication."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from tiny_run import SwitchCLI

from switchcli.checkpoint.documents import RECIPE
from switchcli.runs.inputs.loading import open_model
from switchcli.runs.inputs.new_folder import trained_documents
from switchcli.runs.models.upcycling import with_experts
from switchcli.terminal.console import silent
from switchcli.terminal.safe_text import markdown_text

EVIL = "x | y\n---\nlicense: mit\n# [a](https://a.example) ![b](//b.example/c.png) <script>d</script> `e` www.e.example"
SHAPES = {"link_open", "image", "html_inline", "html_block", "code_inline", "hr"}


def parsed(card: str) -> tuple[dict[str, Any], set[str], list[str]]:
    """Return the header, the kinds of all Markdown tokens of the body, and its headings."""
    _, header, body = card.split("---\n", 2)
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    kinds = {token.type for block in blocks for token in (block, *(block.children or []))}
    titles = [blocks[number + 1].content for number, block in enumerate(blocks) if block.type == "heading_open"]
    return yaml.safe_load(header), kinds, titles


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def card_of(here: Path, switchcli: SwitchCLI) -> Any:
    def convert(run: Path, *options: str) -> str:
        shutil.rmtree("served", ignore_errors=True)
        done = switchcli("convert", run, "served", "--to", "huggingface", *options)
        assert done.code == 0, done.err
        return Path("served/README.md").read_text()

    return convert


@pytest.fixture
def copied(trained: Path, here: Path) -> Path:
    shutil.copytree(trained, "copied")
    return Path("copied")


def test_a_card_has_the_figures_of_the_run(trained: Path, card_of: Any) -> None:
    card = card_of(trained, "--license", "apache-2.0")
    result = json.loads((trained / "result.json").read_text())
    assert f"{result['held_out/loss']:.4f}" in card
    assert f"{result['parameters']:,}" in card
    header, kinds, titles = parsed(card)
    assert (header["license"], header["library_name"]) == ("apache-2.0", "transformers")
    assert {"switchcli", "switch_transformers"} <= set(header["tags"])
    assert titles == ["served", "Model", "Training", "Data", "Results", "Limitations", "Use"]
    assert "table_open" in kinds
    assert "fence" in kinds


def test_a_card_names_no_path_and_quotes_no_text_and_says_that_there_is_no_license(trained: Path, card_of: Any) -> None:
    card = card_of(trained)
    assert parsed(card)[0]["license"] == "other"
    assert "No license" in card
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    paths = [path for corpus in recipe["data"]["corpora"] for path in corpus.get("paths", [])]
    result = json.loads((trained / "result.json").read_text())
    texts = [text for sample in result["samples"] for text in sample.values() if text.strip()]
    assert paths
    assert texts
    secret = [*paths, *texts, str(trained), str(Path.cwd()), result["run"]]
    assert [text for text in secret if text in card] == []


def test_a_model_with_other_experts_does_not_name_the_one_that_it_was_made_of(trained: Path) -> None:
    handle = open_model(trained, silent())
    documents = trained_documents(handle, with_experts(handle.model_file, handle.path, 4).model, Path("new"))
    assert str(trained) not in documents[RECIPE].decode()


def test_text_of_a_stranger_is_shown_as_it_is(copied: Path, card_of: Any) -> None:
    result = json.loads((copied / "result.json").read_text())
    result["hardware"]["device"] = EVIL
    result["tasks"] = {EVIL: {"score": {"value": 1.0, "low": EVIL, "high": None}, "chance": [], "num_examples": EVIL}}
    result["distillation"] = {"metric": EVIL, "teacher": {"metrics": {EVIL: 1.0}, "parameters": EVIL}}
    result["seconds"] = EVIL
    (copied / "result.json").write_text(json.dumps(result))
    header, kinds, titles = parsed(card_of(copied))
    assert header["license"] == "other"
    assert not kinds & SHAPES
    assert titles == ["served", "Model", "Training", "Data", "Results", "Limitations", "Use"]


def test_a_result_that_cannot_be_used_is_left_out(copied: Path, card_of: Any) -> None:
    for content in ("[]", "{" * 10_000, '{"step": null, "seconds": 5}'):
        (copied / "result.json").write_text(content)
        assert "No result of step" in card_of(copied)
    (copied / "result.json").unlink()
    assert "No result of step" in card_of(copied)


@pytest.mark.integration
def test_a_converted_checkpoint_says_nothing_of_its_training(trained: Path, here: Path, switchcli: SwitchCLI) -> None:
    assert switchcli("convert", trained, "theirs", "--to", "hf").code == 0
    assert switchcli("convert", "theirs", "back", "--to", "switchcli").code == 0
    assert switchcli("convert", "back", "again", "--to", "hf").code == 0
    card = Path("again/README.md").read_text()
    assert "not known" in card
    assert "seed |" not in card


@pytest.mark.parametrize(
    "text",
    [
        EVIL,
        "https://user:secret@host/x",
        "\x1b[31m\u202e",
        "a@b.example",
        "1. x",
        "$x$",
        "- x",
        "__a__ _b_c_",
        "a\n---",
    ],
)
def test_escaped_text_has_no_markup(text: str) -> None:
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown_text(text))
    assert [block.type for block in blocks] == ["paragraph_open", "inline", "paragraph_close"]
    assert {child.type for child in blocks[1].children or []} <= {"text", "text_special"}
    assert "secret" not in markdown_text(text)
