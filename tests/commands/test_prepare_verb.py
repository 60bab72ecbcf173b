"""`switchcli data prepare`, and runs on its texts: languages mixed and measured apart, streams stopped and resumed."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from messages import lacking
from tiny_run import SwitchCLI, records

from switchcli.data.prepare.prepared_text import TextCounts
from switchcli.data.prepare.store import TOKENS
from switchcli.data.sources.corpus import Corpus
from switchcli.data.streaming import CorpusShards, source_shards_of

MIXED = ("data.corpora=[{kind: files, paths: ['{language}.txt'], sample_by: line, languages: [de, fr]}]",)


@pytest.fixture
def languages(recipe: str, text: Path) -> tuple[str, ...]:
    """A recipe on two texts, and its keys."""
    lines = text.read_text().splitlines(keepends=True)
    Path("de.txt").write_text("".join(lines[:200]))
    Path("fr.txt").write_text("".join(line[::-1].strip() + "\n" for line in lines[100:]))
    return (recipe, *MIXED, "data.mixture={kind: weighted}")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SWITCHCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.integration
def test_what_is_prepared_is_what_the_run_reads(
    languages: tuple[str, ...], switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = switchcli("data", "prepare", *languages, "--processes", 2, "--json")
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    result = json.loads(done.out)
    assert result.keys() == {"recipe", "tokenizer", "texts", "cached", "seconds"}
    assert not result["cached"]
    assert (result["recipe"], result["tokenizer"]["vocab_size"]) == ("tiny.yaml", 512)
    assert [*result["texts"]] == ["de", "fr"]
    for label, found in result["texts"].items():
        assert found.keys() == {"train", "held_out", "dropped", "identity", "folder"}
        assert found["train"].keys() == found["held_out"].keys() == {*TextCounts._fields}
        assert found["train"]["documents"] + found["held_out"]["documents"] == 200
        size = Path(f"{label}.txt").stat().st_size - 200  # without the ends of lines
        assert found["train"]["bytes"] + found["held_out"]["bytes"] == size
        assert (Path(found["folder"]) / "manifest.json").is_file()
    shown = switchcli("data", "prepare", *languages)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.count("documents") == shown.out.count("found in the cache") == 1, "one table of all"
    for label, found in result["texts"].items():
        (row,) = (line.split() for line in shown.out.splitlines() if line.startswith(f"{label} "))
        figures = [found[part][what] for part in ("train", "held_out") for what in ("documents", "tokens")]
        assert row[1:5] == [f"{figure:,}" for figure in figures]
        assert f"{label}:{found['folder']}" in "".join(shown.out.split())
    quiet = switchcli("data", "prepare", *languages, "--quiet")
    assert quiet.out.partition("documents")[2] == shown.out.partition("documents")[2]
    monkeypatch.setattr("switchcli.data.prepare.pipeline.tokenize_shards", None)  # the run finds it made
    assert switchcli("pretrain", *languages, "--out", "run").code == 0


@pytest.mark.integration
def test_a_start_mends_prepared_text_that_is_damaged(recipe: str, switchcli: SwitchCLI) -> None:
    (text,) = json.loads(switchcli("data", "prepare", recipe, "--json").out)["texts"].values()
    tokens = Path(text["folder"]) / "piece-00000" / f"train-000{TOKENS}"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = switchcli("pretrain", recipe, "--out", "run")
    assert done.code == 0
    assert not lacking(done.err, f"warning: {tokens.parent}")
    assert tokens.read_bytes() == whole
    tokens.write_bytes(whole[:-1])
    assert switchcli("data", "prepare", recipe, "--check").code == 0
    assert tokens.read_bytes() == whole


@pytest.mark.parametrize(
    "command", ["pretrain tiny.yaml", "pretrain tiny.yaml data.access=stream", "data prepare tiny.yaml"]
)
def test_a_vocabulary_larger_than_the_models_is_refused_before_any_text_is_cut(
    command: str, recipe: str, trained: Path, own_cache: Path, switchcli: SwitchCLI
) -> None:
    tokenizer = f"data.tokenizer={{kind: file, path: {trained / 'tokenizer.json'}}}"
    done = switchcli(*command.split(), tokenizer, "model.vocab_size=400")
    assert (done.code, done.out) == (2, "")
    assert not lacking(done.err, "error: model.vocab_size 400 512")
    assert "tokenizing" not in done.err
    assert not (own_cache / "tokens").exists()


def test_what_is_prepared_for_a_stream_is_for_others(languages: tuple[str, ...], switchcli: SwitchCLI) -> None:
    done = switchcli("data", "prepare", *languages, "data.access=stream")
    assert done.code == 0
    assert not lacking(done.err, "warning: data.access stream")


def test_by_the_vocabulary_of_a_model(recipe: str, trained: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("data", "prepare", recipe, "--model", trained, "--json")
    assert done.code == 0, done.err
    own = json.loads((trained / "tokenizer.json").read_text())
    cached = Path(next(Path("cache/tokenizers").glob("*/tokenizer.json")))
    assert json.loads(cached.read_text()) == own
    assert switchcli("data", "prepare", recipe, "--model", "none").code == 4


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--processes", "0"], 2, "'--processes' 1"),
        (["data.corpora=[{kind: files, paths: [none.txt]}]"], 3, "data.corpora none.txt no such"),
    ],
)
def test_bad_input(arguments: list[str], code: int, words: str, recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("data", "prepare", recipe, *arguments)
    assert (done.code, done.out) == (code, "")
    assert not lacking(done.err, words)
    assert "Traceback" not in done.err


def test_a_recipe_of_tasks_has_nothing_to_prepare(tuning: str, switchcli: SwitchCLI) -> None:
    done = switchcli("data", "prepare", tuning, "verb=finetune", "start={checkpoint: x}")
    assert (done.code, done.out) == (2, "")
    assert not lacking(done.err, f"{tuning} text pretrain distill")


@pytest.mark.integration
def test_a_run_without_duplicates_is_evaluated_on_what_it_was_trained_beside(
    recipe: str, text: Path, switchcli: SwitchCLI
) -> None:
    lines = text.read_text().splitlines(keepends=True)
    Path("twice.txt").write_text("".join([*lines[:150], *lines[50:250]]))
    keys = ("data.corpora=[{kind: files, paths: [twice.txt], sample_by: line}]", "data.duplicates=drop")
    done = switchcli("pretrain", recipe, *keys, "eval.sequences=500", "--out", "run", "--json")
    assert done.code == 0, done.err
    assert not lacking(done.err, "left out 100 exact duplicates")
    measured = switchcli("eval", "run", "--out", "scores", "--json")
    assert measured.code == 0, measured.err
    (one,) = json.loads(measured.out)["passes"]
    trained = json.loads(done.out)["held_out/neg_log_perplexity"]
    assert one["held_out"]["text"]["neg_log_perplexity"] == pytest.approx(trained, rel=1e-5)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make windows far smaller than the texts."""
    monkeypatch.setattr("switchcli.data.streaming.WINDOW_CHARACTERS", 4000)
    monkeypatch.setattr("switchcli.data.streaming.MIN_WINDOW_CHARACTERS", 1000)


def stream(languages: tuple[str, ...]) -> tuple[str, ...]:
    return (*languages, "data.access=stream", "data.stream_shards=4", "train.steps=9", "train.microbatch_tokens=64")


@pytest.mark.integration
@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("access", ["prepared", "stream"])
def test_languages_are_mixed_measured_and_evaluated_apart(
    access: str, languages: tuple[str, ...], switchcli: SwitchCLI
) -> None:
    keys = stream(languages) if access == "stream" else (*languages, "train.steps=6")
    done = switchcli("pretrain", *keys, "--out", "run", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["texts"].keys() == {"de", "fr"}
    for label, figures in result["texts"].items():
        assert figures["neg_log_perplexity"] < 0 < figures["bits_per_byte"]
        if access == "prepared":  # its row: documents, tokens, share of the rows, epochs
            assert re.search(rf"^{label} +[\d,]+ +[\d,]+ +50\.00% +[\d.]+$", done.err, re.M)
    logged = records("run")
    assert [record["texts"] for record in logged if "texts" in record][-1] == result["texts"]
    mixed = [record["mixture"] for record in logged if "mixture" in record]
    assert len(mixed) == sum("learning_rate" in record for record in logged) > 1
    for shares in mixed:
        assert shares == {label: {"shown": pytest.approx(0.5, abs=0.1), "intended": 0.5} for label in ("de", "fr")}
    measured = switchcli("eval", "run", "--out", "scores", "--json")
    assert measured.code == 0, measured.err
    (one,) = json.loads(measured.out)["passes"]
    assert one["held_out"].keys() == {"text", "de", "fr"}
    alone = switchcli("eval", "run", "text.corpora=[{kind: files, paths: [de.txt], language: de, sample_by: line}]")
    assert not lacking(alone.out, "held-out text"), "a single text has no name of its own"
    for label in ("de", "fr"):
        figures = one["held_out"][label]
        for name in ("neg_log_perplexity", "bits_per_byte"):
            assert figures[name] == pytest.approx(result["texts"][label][name], rel=1e-5)
        assert figures["layers"]
    if access == "prepared":
        shown = switchcli("eval", "run", "--out", "again")
        assert not lacking(shown.out, "held-out text")
        assert not lacking(shown.out, "expert most tokens")


@pytest.fixture
def own_text(recipe: str, text: Path) -> Path:
    """A copy of the text that a test may change."""
    path = Path("text.txt")
    path.unlink()
    path.write_bytes(text.read_bytes())
    return path


def change_quietly(path: Path) -> None:
    """Change the text of a file in place; its size and its time of modification stay."""
    stat = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + content[len(content) // 2 :].swapcase())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size


@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_text_that_changes_and_keeps_its_size_and_time_is_prepared_anew(
    check: tuple[str, ...], recipe: str, own_text: Path, switchcli: SwitchCLI
) -> None:
    command = ("data", "prepare", recipe, "--json")
    before = switchcli(*command)
    assert before.code == 0, before.err
    change_quietly(own_text)
    after = switchcli(*command, *check)
    assert after.code == 0, after.err
    assert json.loads(after.out)["texts"][""]["identity"] != json.loads(before.out)["texts"][""]["identity"]


@pytest.mark.integration
@pytest.mark.usefixtures("small_windows")
def test_a_stream_goes_on_with_its_own_files_and_their_content_alone(
    recipe: str, text: Path, switchcli: SwitchCLI
) -> None:
    Path("texts").mkdir()
    own = Path("texts/a.txt")
    own.write_text(text.read_text())
    corpora = "data.corpora=[{kind: files, paths: ['texts/*.txt'], sample_by: line}]"
    command = ("pretrain", *stream((recipe, corpora)), "--out", "run")
    assert switchcli(*command, "train.steps=2").code == 0
    Path("texts/b.txt").write_text("another line of text\n" * 50)
    refused = switchcli(*command, "train.steps=3")
    assert refused.code == 4
    assert not lacking(refused.err, "error: run/checkpoints/step-00000002 text --out --no-resume")
    Path("texts/b.txt").unlink()
    content = own.read_bytes()
    change_quietly(own)
    assert switchcli(*command, "train.steps=3").code == 4
    moved = own.rename("moved.txt")
    moved.write_bytes(content)
    own.symlink_to("../moved.txt")
    done = switchcli(*command, "train.steps=3")
    assert done.code == 0, f"a copy with the same content is the same text: {done.err}"


@pytest.mark.integration
def test_a_stream_is_not_mixed_by_sizes_of_which_one_is_unknown(
    languages: tuple[str, ...], switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One piece of several: what the others have is not the size of the text."""
    Path("more.txt").write_text(Path("fr.txt").read_text())
    corpora = ", ".join(
        f"{{kind: files, paths: [{file}.txt], sample_by: line, language: {label}}}"
        for file, label in (("de", "de"), ("fr", "fr"), ("more", "fr"))
    )
    keys = (f"data.corpora=[{corpora}]", "data.mixture={kind: temperature, alpha: 1}", "train.steps=1")
    command = ("pretrain", *stream(languages), *keys, "--out")
    assert switchcli(*command, "known").code == 0
    sizes = {label: Path(f"{label}.txt").stat().st_size * number for label, number in (("de", 1), ("fr", 2))}
    shares = [record["mixture"] for record in records("known") if "mixture" in record][-1]
    for label, size in sizes.items():
        assert shares[label]["intended"] == pytest.approx(size / sum(sizes.values()))

    def unsized(corpora: Sequence[Corpus]) -> CorpusShards:
        first, *others = source_shards_of(corpora)
        return [first, *((corpus, shard._replace(size=None)) for corpus, shard in others)]

    monkeypatch.setattr("switchcli.runs.inputs.text_sets.source_shards_of", unsized)
    done = switchcli(*command, "run")
    assert done.code == 3
    assert not lacking(done.err, "error: data.mixture fr temperature mixture.kind=weighted access=prepared")
