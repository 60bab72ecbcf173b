"""`switchcli prune`: fewer experts or tokens, measured before and after on the same text or tasks."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles import NoWarnings
from messages import lacking
from shared_runs import switchcli as run_switchcli
from tiny_run import RECIPE, SwitchCLI

from switchcli.model.moe.layer import evaluating
from switchcli.model.transformer import ModelOutput
from switchcli.runs.inputs.loading import LoadedModel, load_checkpoint

LAYERS = ["encoder.blocks.1.feed_forward", "decoder.blocks.1.feed_forward"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result_of(switchcli: SwitchCLI, *arguments: object) -> dict[str, Any]:
    done = switchcli("prune", *arguments, "--json")
    assert done.code == 0, done.err
    result: dict[str, Any] = json.loads(done.out)
    return result


@pytest.mark.unit("drop")
@pytest.mark.parametrize("by", ["drop", "merge"])
def test_what_it_says_is_what_eval_finds(by: str, trained: Path, switchcli: SwitchCLI) -> None:
    result = result_of(switchcli, trained, "small", "--experts", 2, "--by", by, "text.sequences=8")
    assert (result["by"], result["gate"], result["capacity"]) == (by, "scaled", "dropless")
    assert result["experts"] == {"before": 4, "after": 2}
    assert result["held_out"]["text"].keys() == {"sequences", "before", "after", "bits_per_byte"}
    assert result["vocabulary"] == {"before": 512, "after": 512}
    assert result["bytes"] == {when: 4 * number for when, number in result["parameters"].items()}
    whole, small = (load_checkpoint(path, torch.device("cpu"), NoWarnings()) for path in (trained, Path("small")))
    for when, one in (("before", whole), ("after", small)):
        assert result["parameters"][when] == sum(weight.numel() for weight in one.model.parameters())
    assert list(result["layers"]) == LAYERS
    for name, layer in result["layers"].items():
        assert 0.25 < layer["wo"] < 1
        gone = [load for expert, load in enumerate(layer["load"]) if expert not in layer["kept"]]
        assert layer["lost_fraction"] == pytest.approx(sum(gone) / sum(layer["load"]))
        rows_ED = whole.model.get_parameter(f"{name}.layer.router.weight")
        assert torch.equal(small.model.get_parameter(f"{name}.layer.router.weight"), rows_ED[layer["kept"]])
    done = switchcli("eval", "small", "capacities=[dropless]", "text.sequences=8", "--json")
    assert done.code == 0, done.err
    (one,) = json.loads(done.out)["passes"]
    assert one["held_out"]["text"]["neg_log_perplexity"] == pytest.approx(result["held_out"]["text"]["after"], rel=1e-6)


@pytest.mark.integration
def test_a_fine_tuned_run_on_its_tasks(tuned: Path, switchcli: SwitchCLI) -> None:
    result = result_of(switchcli, tuned, "small", "--experts", 2, "capacities=[paper]", "scoring.examples=3")
    assert {name: task["sequences"] for name, task in result["held_out"].items()} == {"colour": 3, "last": 3}
    assert result["capacity"] == "paper"
    assert switchcli("generate", "small", "which colour: red").code == 0


@pytest.mark.integration
def test_a_switch_folder_in_the_hugging_face_layout(trained: Path, text: Path, switchcli: SwitchCLI) -> None:
    assert switchcli("convert", trained, "theirs", "--to", "huggingface", "--quiet").code == 0
    alone = switchcli("prune", "theirs", "small", "--experts", 2)
    assert (alone.code, lacking(alone.err, "theirs tasks=[rte] text.corpora=[...]")) == (2, [])
    corpus = f"text.corpora=[{{kind: files, paths: [{text}], sample_by: line}}]"
    result = result_of(
        switchcli, "theirs", "small", "--experts", 2, corpus, "text.held_out_fraction=0.5", "text.sequences=1"
    )
    assert (
        result["experts"]["after"]
        == load_checkpoint(Path("small"), torch.device("cpu"), NoWarnings()).handle.recipe.model.num_experts
    )
    assert result["next"] == "pretrain (or finetune) RECIPE --model small start.keep=weights --out FOLDER"
    done = switchcli("pretrain", "small/recipe.yaml", "--out", "run")
    assert (done.code, lacking(done.err, "small/recipe.yaml placeholders RECIPE --model")) == (2, [])


@pytest.mark.unit("keys0")
@pytest.mark.parametrize(
    "keys",
    [
        ["model.sparse=both", "model.router.kind=top_k"],
        ["model.sparse=attention", "model.router.kind=no_token_left_behind"],
        ["model.router.kind=expert_choice", "model.decoder_router.kind=switch"],
    ],
)
def test_every_kind_of_layer_and_router(keys: list[str], recipe: str, switchcli: SwitchCLI) -> None:
    assert switchcli("pretrain", recipe, "train.steps=1", *keys, "--out", "run", "--quiet").code == 0
    done = switchcli("prune", "run", "small", "--experts", 2, "--by", "merge", "text.sequences=4", "--json")
    assert done.code == 0, done.err
    assert (not lacking(done.err, "warning: expert_choice load")) == ("expert_choice" in keys[0])
    assert len(json.loads(done.out)["layers"]) == (4 if "both" in keys[0] else 2)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--experts", "4"], 2, "--experts 4 2"),
        (["--experts", "5"], 2, "--experts 5 4 2"),
        (["--experts", "1"], 2, "--experts 1 2 switchcli distill"),
        (["--experts", "2", "capacities=[paper, dropless]"], 2, "capacities 2 one"),
        (["--experts", "2", "text.sequnces=3"], 2, "text.sequnces sequences"),
        ([], 2, "prune --experts --vocabulary"),
        (["--vocabulary", "missing.txt"], 3, "--vocabulary missing.txt no such file"),
        (["--vocabulary", "."], 3, "--vocabulary folder *.txt"),
        (["--vocabulary", "/dev/null"], 3, "--vocabulary /dev/null file"),
    ],
)
def test_refused(arguments: list[str], code: int, words: str, trained: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("prune", trained, "small", *arguments)
    assert (done.code, lacking(done.err, words)) == (code, []), done.err
    assert not Path("small").exists()


@pytest.mark.integration
def test_a_dense_model_and_too_few_experts_for_the_router(dense: Path, recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("prune", dense, "small", "--experts", 2)
    assert (done.code, lacking(done.err, "dense experts sparse")) == (4, []), done.err
    keys = ("model.router={kind: top_k, k: 3}", "train.steps=1")
    assert switchcli("pretrain", recipe, *keys, "--out", "run", "--quiet").code == 0
    done = switchcli("prune", "run", "small", "--experts", 2)
    assert (done.code, lacking(done.err, "router.k 3 num_experts 2")) == (2, []), done.err


def test_a_destination_that_is_not_free(trained: Path, switchcli: SwitchCLI) -> None:
    Path("small").mkdir()
    Path("small/mine").touch()
    done = switchcli("prune", trained, "small", "--experts", 2)
    assert (done.code, lacking(done.err, "small already DESTINATION")) == (4, [])


FEW = "the red walk\n\nis not delta\n"


def loaded(path: Path | str) -> LoadedModel:
    return load_checkpoint(Path(path), torch.device("cpu"), NoWarnings())


@torch.no_grad()
def outputs(model: LoadedModel, source: str, target: str) -> ModelOutput:
    ids = (torch.tensor([[*model.handle.tokenizer.encode(text), 1]]) for text in (source, target))
    with evaluating(model.model, "dropless"):
        return model.model(*ids)


@pytest.mark.unit("dense", "untied")
@pytest.mark.parametrize("case", ["dense", "untied", "with experts"])
def test_the_tokens_of_a_text(case: str, trained: Path, dense: Path, recipe: str, switchcli: SwitchCLI) -> None:
    """Texts of kept tokens: the same pieces, equal hidden states and rows, logits within 1e-5. Others change."""
    source, options = {"dense": dense, "untied": Path("run"), "with experts": trained}[case], list[object]()
    if case == "untied":
        keys = ("model.tie_embeddings=false", "model.num_experts=1", "train.steps=1")
        assert switchcli("pretrain", recipe, *keys, "--out", "run", "--quiet").code == 0
    if case == "with experts":
        options = ["--experts", 2, "--gate", "raw"]
        assert switchcli("prune", source, "fewer", *options, "--quiet").code == 0
    Path("few.txt").write_text(FEW)
    Path("more.jsonl").write_text('{"text": "blue"}\n')
    files = ("--vocabulary", "few.txt", "--vocabulary", "more.jsonl")
    result = result_of(switchcli, source, "small", *options, *files, "text.sequences=8")

    whole, small = loaded("fewer" if case == "with experts" else source), loaded("small")
    size = result["vocabulary"]
    tokenizer = small.handle.tokenizer
    assert size["before"] == 512 > size["after"] == small.handle.recipe.model.vocab_size == tokenizer.vocab_size
    assert size["after"] % 64 == 0 < size["after"] - size["needed"] < 64
    for when, one in (("before", loaded(source)), ("after", small)):
        assert result["parameters"][when] == sum(weight.numel() for weight in one.model.parameters())
        assert result["bytes"][when] == 4 * result["parameters"][when]
    ids = {piece: index for index, piece in enumerate(whole.handle.tokenizer.pieces(range(512)))}
    kept = [ids[piece] for piece in tokenizer.pieces(range(size["after"]))]
    assert tokenizer.sentinels.tolist() == list(range(size["after"] - 1, size["after"] - 101, -1))
    for text in ("the red <extra_id_0> is not blue", "walk the delta"):
        before, after = (outputs(model, text, "<extra_id_0> red walk") for model in (whole, small))
        assert torch.equal(after.hidden_BTD, before.hidden_BTD)
        assert torch.equal(after.vocabulary.weight_VD, before.vocabulary.weight_VD[kept])
        torch.testing.assert_close(after.logits_BTV, before.logits_BTV[..., kept], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def bilingual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, `run`, on two languages of ten letters and of 200 characters, and of a text in each."""
    folder = tmp_path_factory.mktemp("bilingual")
    draw = random.Random(0)
    for language, alphabet in (("latin", "abcdefghij"), ("han", [*map(chr, range(0x4E00, 0x4E00 + 200))])):
        words = ["".join(draw.choices(alphabet, k=draw.randint(2, 6))) for _ in range(60)]
        (folder / f"{language}.txt").write_text("".join(" ".join(draw.choices(words, k=40)) + "\n" for _ in range(300)))
    corpus = (
        f"corpora: [{{kind: files, paths: ['{folder}/{{language}}.txt'], sample_by: line, languages: [latin, han]}}]"
    )
    recipe = RECIPE.replace(
        "  corpora: [{kind: files, paths: [text.txt], sample_by: line}]",
        f"  {corpus}\n  mixture: {{kind: temperature}}",
    )
    (folder / "two.yaml").write_text(recipe)
    run_switchcli("pretrain", folder / "two.yaml", "model.num_experts=1", "--out", folder / "run")
    return folder


def test_what_it_says_of_other_text(bilingual: Path, switchcli: SwitchCLI) -> None:
    """A language that was not among the files is made of unknown tokens; `eval` finds the same, and warns of it."""
    result = result_of(switchcli, bilingual / "run", "small", "--vocabulary", bilingual / "latin.txt")
    latin, han = (result["held_out"][language] for language in ("latin", "han"))
    assert latin["removed_tokens"] == latin["unknown_tokens"]["after"] == 0
    assert han["unknown_tokens"]["before"] == 0
    assert 0.1 < han["unknown_tokens"]["after"] < han["removed_tokens"] < 1
    done = switchcli("eval", "small", "capacities=[dropless]", "--json")
    assert (done.code, done.err.count("warning"), lacking(done.err, "warning: han byte_fallback")) == (0, 1, []), (
        done.err
    )
    (one,) = json.loads(done.out)["passes"]
    for language, said in (("latin", latin), ("han", han)):
        found = one["held_out"][language]
        assert found["neg_log_perplexity"] == pytest.approx(said["after"], rel=1e-6)
        bits = None if language == "han" else pytest.approx(said["bits_per_byte"]["after"], rel=1e-6)
        assert found.get("bits_per_byte") == bits
    shown = switchcli("prune", bilingual / "run", "again", "--vocabulary", bilingual / "latin.txt")
    for row in (
        "vocabulary 512 192",
        "bytes KiB",
        "bits per byte of latin",
        "removed tokens in latin 0.0%",
        "<unk> in han",
    ):
        assert not lacking(shown.out, row), shown.out
    assert "experts" not in shown.out


@pytest.mark.integration
def test_a_trimmed_model_trains_on_and_goes_to_transformers(bilingual: Path, switchcli: SwitchCLI) -> None:
    import transformers

    done = switchcli("prune", bilingual / "run", "small", "--vocabulary", bilingual / "latin.txt", "--quiet")
    assert done.code == 0, done.err
    done = switchcli("pretrain", "small/recipe.yaml", "--out", "on", "--quiet")
    assert (done.code, done.err.count("warning"), lacking(done.err, "warning: han byte_fallback")) == (0, 1, []), (
        done.err
    )
    assert loaded("on").handle.tokenizer.sha256 == loaded("small").handle.tokenizer.sha256
    assert switchcli("convert", "small", "theirs", "--to", "huggingface").code == 0
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained("theirs").eval()
    tokenizer, text = transformers.AutoTokenizer.from_pretrained("theirs"), "abc def <extra_id_0> hij"
    batch = tokenizer([text], return_tensors="pt")
    assert batch.input_ids.tolist() == [[*loaded("small").handle.tokenizer.encode(text), 1]]
    with torch.no_grad():
        expected = theirs(**batch, labels=batch.input_ids).logits
    torch.testing.assert_close(outputs(loaded("small"), text, text).logits_BTV, expected, rtol=1e-5, atol=1e-5)
    Path("few.txt").write_text("abc def")
    corpus = f"text.corpora=[{{kind: files, paths: [{bilingual}/latin.txt], sample_by: line}}]"
    result = result_of(switchcli, "theirs", "smaller", "--vocabulary", "few.txt", corpus, "text.sequences=4")
    assert result["vocabulary"]["after"] == loaded("smaller").handle.tokenizer.vocab_size == 128


@pytest.mark.integration
def test_a_tokenizer_of_tasks(tuned: Path, switchcli: SwitchCLI) -> None:
    Path("few.txt").write_text(FEW)
    result = result_of(switchcli, tuned, "small", "--vocabulary", "few.txt", "scoring.examples=3")
    assert {name: task["sequences"] for name, task in result["held_out"].items()} == {"colour": 3, "last": 3}
    assert all(task["bits_per_byte"]["after"] is None for task in result["held_out"].values())
    assert switchcli("generate", "small", "which colour: red").code == 0


@pytest.mark.integration
def test_a_converted_model_is_not_told_what_it_was_not_trained_on(tuned: Path, switchcli: SwitchCLI) -> None:
    """Neither the whole one nor the smaller one: how they were trained is not known."""
    assert switchcli("convert", tuned, "theirs", "--to", "huggingface", "--quiet").code == 0
    Path("few.txt").write_text(FEW)
    Path("mine.jsonl").write_text('{"text": "the red walk", "word": "walk"}\n' * 3)
    task = "tasks=[{kind: files, name: mine, input: '{text}', target: word, validation: [mine.jsonl]}]"
    done = switchcli("prune", "theirs", "small", "--vocabulary", "few.txt", task)
    assert (done.code, "warning" in done.err) == (0, False), done.err


def test_a_text_that_needs_all_tokens(bilingual: Path, switchcli: SwitchCLI) -> None:
    file = ("--vocabulary", bilingual / "latin.txt")
    assert switchcli("prune", bilingual / "run", "small", *file, "--quiet").code == 0
    done = switchcli("prune", "small", "smaller", *file)
    words = f"--vocabulary {loaded('small').handle.tokenizer.vocab_size} 64"
    assert (done.code, lacking(done.err, words)) == (3, []), done.err
    assert not Path("smaller").exists()
