"""What transformers saved computes the same here; what is saved here computes the same there; weights bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import theirs
import torch
from doubles import KeepingConsole, NoWarnings
from messages import lacking
from safetensors.torch import load_file
from typer.testing import CliRunner

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.checkpoint import Checkpoint
from switchcli.checkpoint.documents import MODEL_FILE, ModelFile
from switchcli.checkpoint.model_weights import logical_tensors
from switchcli.cli import app
from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.runs.inputs.loading import LoadedModel, load_checkpoint
from switchcli.runs.models import conversion
from switchcli.terminal.console import Console
from switchcli.training.state import TrainState

THEIRS: dict[str, Callable[..., torch.nn.Module]] = {
    "T5 1.0": theirs.t5,
    "T5 1.1": lambda **keys: theirs.t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **keys),
    "T5, tied GEGLU": lambda: theirs.t5(feed_forward_proj="gated-gelu"),
    "Switch": theirs.switch,
    "Switch, untied": lambda: theirs.switch(tie_word_embeddings=False),
    "Switch, every layer": lambda: theirs.switch(num_sparse_encoder_layers=4, num_sparse_decoder_layers=2),
    "Switch, one layer": lambda: theirs.switch(num_sparse_encoder_layers=1, num_sparse_decoder_layers=0),
    "Switch, encoder alone": lambda: theirs.switch(num_sparse_decoder_layers=3),
    "Switch, by a step": lambda: theirs.switch(num_layers=5, encoder_sparse_step=2, num_sparse_encoder_layers=3),
    "mT5, saved again": theirs.mt5,
    "mT5, as published": theirs.mt5,
}
OURS = {key: size for key, size in theirs.SHAPE.items() if key in ModelSpec.model_fields}


def opened(folder: Path, console: Console | None = None) -> LoadedModel:
    return load_checkpoint(folder, torch.device("cpu"), console or NoWarnings())


def run(*arguments: object) -> Any:
    """`switchcli convert`; a failure is raised as the command raises it."""
    done = CliRunner().invoke(app, ["convert", *map(str, arguments), "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def from_pretrained(folder: Path) -> torch.nn.Module:
    """Load the class that config.json names, with no tensor missing and none left over."""
    import transformers

    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def ours(folder: Path, spec: ModelSpec, feed_forward_scale: float = 1.0) -> Path:
    """A checkpoint of random weights. Those of feed-forwards are initial ones times `feed_forward_scale`."""
    model = SwitchTransformer(spec)
    initialize(model, 5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".feed_forward.layer.w" in name:
                weight.mul_(feed_forward_scale)
    documents = {
        "state.json": TrainState(step=7).to_json({}),
        MODEL_FILE: ModelFile(model=spec, inputs_length=512, targets_length=114).to_json(),
        "tokenizer.json": theirs.tokenizer().encode(),
    }
    return checkpoint.save(folder, 7, model=logical_tensors(model), optimizer={}, documents=documents)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint of ours, under logical names."""
    found = Checkpoint.open(path)
    return dict(found.read("model", logical_tensors(opened(path).model)))


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.mark.unit("T5 1.0-4", "T5 1.1-5", "Switch-5", "mT5, saved again-5", "mT5, as published-4")
@pytest.mark.parametrize(("case", "version"), [(case, 4 + number % 2) for number, case in enumerate(THEIRS)])
def test_theirs_computes_the_same_here_and_comes_back_as_it_was(case: str, version: int, tmp_path: Path) -> None:
    model = THEIRS[case]()
    source = theirs.save(model, tmp_path / "theirs")
    before = load_file(source / "model.safetensors")
    if version == 4:
        theirs.as_version_4(source)
    theirs.assert_same_logits(opened(source).model, model)

    run(source, tmp_path / "ours", "--to", "switchcli")
    converted = opened(tmp_path / "ours")
    theirs.assert_same_logits(converted.model, model)
    assert converted.handle.spec == opened(source).handle.spec

    run(tmp_path / "ours", tmp_path / "back", "--to", "hf")
    after = load_file(tmp_path / "back/model.safetensors")
    if case == "Switch, untied":
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            assert torch.equal(after.pop(name), before["shared.weight"])
            before.pop(name, None)
    assert_equal(after, before)
    theirs.assert_same_logits(converted.model, from_pretrained(tmp_path / "back"))


ROUTER = SwitchRouter(capacity_factor="dropless", eval_capacity_factor="dropless", jitter=0.0)
SPECS = {
    "relu": ModelSpec(**OURS),
    "relu, untied": ModelSpec(**OURS, tie_embeddings=False),
    "geglu": ModelSpec(**OURS, activation="geglu"),
    "geglu, untied": ModelSpec(**OURS, activation="geglu", tie_embeddings=False),
    "sparse": ModelSpec(**OURS, num_experts=4, router=ROUTER, balance_reduction="pooled"),
    "sparse, untied": ModelSpec(**OURS, num_experts=4, router=ROUTER, tie_embeddings=False, balance_reduction="pooled"),
    "sparse decoder": ModelSpec(
        **OURS, num_experts=4, router=ROUTER, sparse_encoder_layers=(), balance_reduction="pooled"
    ),
}


@pytest.mark.unit("relu, untied", "geglu", "sparse", "sparse decoder")
@pytest.mark.parametrize("case", SPECS)
def test_ours_computes_the_same_there_and_comes_back_as_it_was(case: str, tmp_path: Path) -> None:
    source = ours(tmp_path, SPECS[case])
    before = opened(source)
    done = run(source, tmp_path / "theirs", "--to", "huggingface")
    assert "warning" not in done.output
    theirs.assert_same_logits(before.model, from_pretrained(tmp_path / "theirs"))

    run(tmp_path / "theirs", tmp_path / "back", "--to", "switchcli")
    assert_equal(weights(tmp_path / "back"), weights(source))
    after = opened(tmp_path / "back").handle.spec
    same = ("size", "router", "decoder_router", "sparse_encoder_layers", "sparse_decoder_layers", "sparse_every")
    same += ("num_decoder_layers", "init_scale")
    assert after.model_copy(update={name: getattr(SPECS[case], name) for name in same}) == SPECS[case]
    assert after.sparse_layers("encoder") == SPECS[case].sparse_layers("encoder")
    assert after.sparse_layers("decoder") == SPECS[case].sparse_layers("decoder")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = theirs.switch().to(dtype)
    source = theirs.save(model, tmp_path / "theirs")
    run(source, tmp_path / "ours", "--to", "switchcli")
    run(tmp_path / "ours", tmp_path / "back", "--to", "huggingface")
    expected = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    assert_equal(load_file(tmp_path / "back/model.safetensors"), expected)


def test_shards_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = theirs.switch()
    source = theirs.save(model, tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    run(source, tmp_path / "ours", "--to", "switchcli")
    theirs.assert_same_logits(opened(tmp_path / "ours").model, model)
    monkeypatch.setattr(conversion, "_MAX_FILE_BYTES", 20_000)
    run(tmp_path / "ours", tmp_path / "back", "--to", "huggingface")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    theirs.assert_same_logits(opened(tmp_path / "back").model, model)
    theirs.assert_same_logits(opened(tmp_path / "ours").model, from_pretrained(tmp_path / "back"))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_read_when_asked_for(legacy: bool, tmp_path: Path) -> None:
    model = theirs.switch()
    source = theirs.save(model, tmp_path / "theirs")
    theirs.as_version_4(source, pickled=True)
    if legacy:
        found = torch.load(source / "pytorch_model.bin", weights_only=True)
        torch.save(found, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    run(source, tmp_path / "ours", "--to", "switchcli", "--unpickle")
    theirs.assert_same_logits(opened(tmp_path / "ours").model, model)


def test_safetensors_are_read_where_there_are_pickles_too(tmp_path: Path) -> None:
    model = theirs.switch()
    source = theirs.save(model, tmp_path / "theirs")
    (source / "pytorch_model.bin").write_bytes(b"no pickle")
    run(source, tmp_path / "ours", "--to", "switchcli", "--unpickle")
    theirs.assert_same_logits(opened(tmp_path / "ours").model, model)


@pytest.mark.parametrize("kind", ["T5 1.1", "mT5"])
def test_a_tied_t5_that_is_not_scaled_gets_a_matrix_of_its_own(kind: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(**theirs.SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = theirs.filled(transformers.T5ForConditionalGeneration(config))  # which version 5 ties even so
    if kind == "mT5":
        model = theirs.mt5(is_tied=True)
    assert model.lm_head.weight is model.shared.weight
    source = theirs.save(model, tmp_path / "theirs")
    (warning,) = json.loads(run(source, tmp_path / "ours", "--to", "switchcli", "--json").stdout)["warnings"]
    assert not lacking(warning, f"{source}/config.json softmax embedding copy")
    if kind == "mT5":  # which is gated where the file does not say so
        path = source / "config.json"
        path.write_text(path.read_text().replace('"feed_forward_proj"', '"other"'))
    console = KeepingConsole()
    loaded = opened(source, console)
    assert console.warnings == [warning]
    theirs.assert_same_logits(loaded.model, model)
    assert not loaded.handle.spec.tie_embeddings


def test_what_is_not_kept_has_a_warning(tmp_path: Path) -> None:
    import transformers

    source = theirs.save(theirs.switch(router_ignore_padding_tokens=True), tmp_path / "theirs")
    generation = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**generation, "num_beams": 4, "top_p": None}))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 3}')
    done = run(source, tmp_path / "ours", "--to", "switchcli", "--json")
    padding, tokenizer, beams = warnings = json.loads(done.stdout)["warnings"]
    assert all(f"warning: {warning}" in done.stderr for warning in warnings)
    assert not lacking(padding, f"{source}/config.json router_ignore_padding_tokens")
    assert not lacking(tokenizer, f"{source}/tokenizer.json transformers 5 tokenizer_class ids save")
    assert beams.startswith(f"{source}/generation_config.json: num_beams: ")
    text = "ab <extra_id_0> c"
    saved_again = transformers.AutoTokenizer.from_pretrained(source)
    before, after = KeepingConsole(), KeepingConsole()
    assert saved_again(text).input_ids[:-1] != opened(source, before).handle.tokenizer.encode(text)
    saved_again.save_pretrained(source)
    assert saved_again(text).input_ids[:-1] == opened(source, after).handle.tokenizer.encode(text)
    assert (before.warnings, after.warnings) == (warnings, [padding, beams])


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    import transformers

    source = ours(tmp_path, SPECS["sparse"])
    run(source, tmp_path / "theirs", "--to", "huggingface")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    text = "ab <extra_id_0> cd"
    assert tokenizer(text).input_ids == [*opened(source).handle.tokenizer.encode(text), 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    run(tmp_path / "theirs", tmp_path / "back", "--to", "switchcli")
    assert opened(tmp_path / "back").handle.tokenizer.encode(text) == opened(source).handle.tokenizer.encode(text)


def test_generate_answers_from_either_layout_as_transformers_does(tmp_path: Path) -> None:
    model = theirs.switch()
    source = theirs.save(model, tmp_path / "theirs")
    run(source, tmp_path / "ours", "--to", "switchcli")
    answers = [
        CliRunner().invoke(
            app, ["generate", str(path), "ab <extra_id_0> c", "--max-tokens", "6"], catch_exceptions=False
        )
        for path in (source, tmp_path / "ours")
    ]
    tokenizer = opened(source).handle.tokenizer
    ids = torch.tensor([[*tokenizer.encode("ab <extra_id_0> c"), 1]])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert [answer.stdout for answer in answers] == [tokenizer.decode(expected[0].tolist()) + "\n"] * 2


@pytest.mark.unit("mT5, as published")
@pytest.mark.parametrize("case", ["T5 1.0", "T5 1.1", "mT5, saved again", "mT5, as published"])
def test_a_folder_teaches_and_a_folder_learns(case: str, text: Path, tmp_path: Path) -> None:
    """The student goes on from its own weights."""
    teacher = theirs.save(THEIRS[case](), tmp_path / "teacher")
    student = theirs.save(THEIRS[case](num_layers=1, num_decoder_layers=1), tmp_path / "student")
    if case == "mT5, as published":
        for folder in (teacher, student):
            theirs.as_version_4(folder)
    before = opened(student).model.state_dict()
    keys = ("data.objective.inputs_length=32", "data.held_out_fraction=0.1", "train.steps=2", "train.batch_tokens=256")
    keys += ("eval.sequences=8", "train.device=cpu", "schedule={kind: constant, learning_rate: 0.001}")
    arguments = ["distill", f"data.corpora=[{{kind: files, paths: [{text}], sample_by: line}}]", *keys]
    arguments += ["--teacher", str(teacher), "--student", str(student), "--out", str(tmp_path / "run"), "--quiet"]
    CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)
    after = opened(tmp_path / "run").model.state_dict()
    for name, weight in before.items():
        assert not torch.equal(after[name], weight)
        torch.testing.assert_close(after[name], weight, atol=0.005, rtol=0.0)
