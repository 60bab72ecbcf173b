"""A dense model computes the same in CTranslate2: probabilities to 1e-4 in float32, and the same greedy tokens."""

import json
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import ctranslate2
import pytest
import tokenizers
import torch
from doubles import NoWarnings
from test_parity_of_files import OURS, ours
from typer.testing import CliRunner, Result

from switchcli.cli import app
from switchcli.convert.ctranslate2_spec import vocabulary
from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import ModelSpec
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.runs.inputs.loading import LoadedModel, load_checkpoint
from switchcli.runs.models import conversion
from switchcli.spec import EOS, PAD

SPECS = {
    "T5 1.0": ModelSpec(**OURS),
    "relu, untied": ModelSpec(**OURS, tie_embeddings=False),
    "tied GEGLU": ModelSpec(**OURS, activation="geglu"),
    "T5 1.1, wide heads": ModelSpec(**{**OURS, "d_kv": 11}, activation="geglu", tie_embeddings=False),
    "another epsilon": ModelSpec(**OURS, layer_norm_epsilon=0.1),
}
TEXTS = ["ab <extra_id_0> cd", "zzz", "a b c d e f g h i j k l m n o p q r s t u v w x y z", "hello <extra_id_1> z"]


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments), "--quiet"])


def opened(folder: Path) -> LoadedModel:
    return load_checkpoint(folder, torch.device("cpu"), NoWarnings())


def rows(model: LoadedModel, texts: list[str]) -> torch.Tensor:
    ids = [torch.tensor([*model.handle.tokenizer.encode(text), EOS]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)


def translator(folder: Path) -> Any:
    return ctranslate2.Translator(str(folder), device="cpu", intra_threads=1)


@pytest.mark.unit("T5 1.0", "T5 1.1, wide heads")
@pytest.mark.parametrize("case", SPECS)
def test_it_computes_the_same_there(case: str, tmp_path: Path) -> None:
    source = ours(tmp_path, SPECS[case])
    assert convert(source, tmp_path / "there", "--to", "ctranslate2").exit_code == 0
    model, there = opened(source), translator(tmp_path / "there")
    tokens = json.loads((tmp_path / "there/shared_vocabulary.json").read_text())
    assert len(set(tokens)) == len(tokens) == SPECS[case].vocab_size

    inputs_BS = rows(model, TEXTS)
    inputs = [[tokens[index] for index in row if index != PAD] for row in inputs_BS.tolist()]
    answers_BT = generate(model.model, inputs_BS, Decoding(max_tokens=12))
    # Random weights may answer with PAD: only what follows EOS is padding.
    answers = [[tokens[index] for index in takewhile(lambda index: index != EOS, row)] for row in answers_BT.tolist()]
    # By default CTranslate2 never answers with no token at all.
    found = there.translate_batch(inputs, beam_size=1, min_decoding_length=0, max_decoding_length=12)
    assert [result.hypotheses[0] for result in found] == answers

    with torch.no_grad():
        log_p_BTV = model.model(inputs_BS, answers_BT).logits_BTV.log_softmax(-1)
    expected_BT = log_p_BTV.gather(2, answers_BT.unsqueeze(2)).squeeze(2)
    for expected_T, score in zip(expected_BT, there.score_batch(inputs, answers), strict=True):
        log_p_T = torch.tensor(score.log_probs)[: len(expected_T)]  # an answer that is cut off gets an EOS there
        torch.testing.assert_close(log_p_T, expected_T[: len(log_p_T)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_gates_of_every_size_are_computed_there(tied: bool, tmp_path: Path) -> None:
    """Initial gates are so small that GELU is nearly linear: here they reach from -5 to 5."""
    spec = ModelSpec(**OURS, activation="geglu", tie_embeddings=tied)
    source = ours(tmp_path, spec, feed_forward_scale=4.0)
    model = opened(source)
    inputs_BS, answers_BT = rows(model, TEXTS), rows(model, ["abc", "zz", "a b", "h"])
    gates: list[torch.Tensor] = []
    gate = model.model.encoder.blocks[0].feed_forward.layer.wi_gate
    hook = gate.register_forward_hook(lambda module, arguments, output: gates.append(output))
    with torch.no_grad():
        log_p_BTV = model.model(inputs_BS, answers_BT).logits_BTV.log_softmax(-1)
    hook.remove()
    assert gates[0].min() < -3
    assert gates[0].max() > 3

    assert convert(source, tmp_path / "there", "--to", "ctranslate2").exit_code == 0
    tokens = json.loads((tmp_path / "there/shared_vocabulary.json").read_text())
    inputs, answers = (
        [[tokens[index] for index in row if index not in left_out] for row in ids.tolist()]
        for ids, left_out in ((inputs_BS, (PAD,)), (answers_BT, (PAD, EOS)))
    )
    expected_BT = log_p_BTV.gather(2, answers_BT.unsqueeze(2)).squeeze(2)
    for expected_T, score in zip(expected_BT, translator(tmp_path / "there").score_batch(inputs, answers), strict=True):
        log_p_T = torch.tensor(score.log_probs)
        torch.testing.assert_close(log_p_T, expected_T[: len(log_p_T)], rtol=1e-4, atol=1e-4)


def test_its_tokenizer_gives_the_tokens_of_an_input_and_the_text_of_an_answer(tmp_path: Path) -> None:
    source = ours(tmp_path, SPECS["T5 1.0"])
    assert convert(source, tmp_path / "there", "--to", "ctranslate2").exit_code == 0
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "there/tokenizer.json"))
    ids = [*opened(source).handle.tokenizer.encode(TEXTS[0]), EOS]
    tokens = json.loads((tmp_path / "there/shared_vocabulary.json").read_text())
    assert inner.encode(TEXTS[0]).tokens == [tokens[index] for index in ids]


def test_int8_is_smaller_and_says_so(tmp_path: Path) -> None:
    wide = {"d_model": 64, "d_ff": 256, "d_kv": 16}
    source = ours(tmp_path, ModelSpec(**{**OURS, **wide}))
    plain = convert(source, tmp_path / "plain", "--to", "ctranslate2", "--json")
    small = convert(source, tmp_path / "small", "--to", "ctranslate2", "--quantization", "int8", "--json")
    assert [json.loads(done.stdout)["quantization"] for done in (plain, small)] == ["float32", "int8"]
    result = json.loads(small.stdout)
    assert (result["to"], result["source"]) == ("ctranslate2", str(source))
    assert result["parameters"] == sum(weight.numel() for weight in opened(source).model.parameters())
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("plain", "small")]
    assert sizes[1] < 0.35 * sizes[0]
    assert translator(tmp_path / "small").compute_type.startswith("int8")
    assert "int8" in (tmp_path / "small/README.md").read_text()


def test_a_hugging_face_folder_is_taken_too(tmp_path: Path) -> None:
    source = ours(tmp_path, SPECS["T5 1.0"])
    assert convert(source, tmp_path / "theirs", "--to", "hf").exit_code == 0
    for name in ("ours", "theirs"):
        start = source if name == "ours" else tmp_path / "theirs"
        assert convert(start, tmp_path / f"{name}-there", "--to", "ctranslate2").exit_code == 0
    first, second = ((tmp_path / f"{name}-there/model.bin").read_bytes() for name in ("ours", "theirs"))
    assert first == second


def test_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = ours(tmp_path / "sparse", ModelSpec(**OURS, num_experts=4))
    dense = ours(tmp_path / "dense", SPECS["T5 1.0"])
    with pytest.raises(CheckpointError, match=r"4 experts.*switchcli distill"):
        conversion.to_ctranslate2(sparse, tmp_path / "there", NoWarnings())
    for options, word in (
        (["--to", "hf", "--quantization", "int8"], "--quantization"),
        (["--to", "switchcli", "--license", "mit"], "--license"),
        (["--to", "ctranslate2", "--unpickle"], "--unpickle"),
        (["--to", "ctranslate2", "--license", "my\nlicense: mit"], "--license"),
        (["--to", "ctranslate2", "--quantization", "int4"], "int4"),
    ):
        done = convert(dense, tmp_path / "there", *options)
        assert (done.exit_code, word in str(done.exception) + done.output) == (2, True) or isinstance(
            done.exception, RecipeError
        ), options
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(CheckpointError, match="DESTINATION"):
        conversion.to_ctranslate2(dense, tmp_path / "full", NoWarnings())
    monkeypatch.setitem(sys.modules, "ctranslate2.specs", None)
    with pytest.raises(RecipeError, match=r"pip install 'switchcli\[ctranslate2\]'"):
        conversion.to_ctranslate2(dense, tmp_path / "there", NoWarnings())
    assert not (tmp_path / "there").exists()


def test_a_row_without_a_piece_gets_a_name_that_no_piece_has() -> None:
    tokens = vocabulary(["<pad>", "</s>", "", "<unused_2>", "<unused_4>"], 6)
    assert tokens == ["<pad>", "</s>", "<<unused_2>>", "<unused_2>", "<unused_4>", "<unused_5>"]
