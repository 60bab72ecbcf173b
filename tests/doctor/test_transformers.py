"""What doctor finds in transformers' SwitchTransformers: peers' bugs, as far as they can be seen from outside."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from subjects import findings, theirs

from switchcli.doctor import texts, transformers_subject
from switchcli.doctor.probes import Finding, balance_loss, cached_decoding, idle_gradients
from switchcli.errors import CheckpointError, OutOfMemory, RecipeError, SwitchError
from switchcli.spec import PAD


@pytest.fixture(scope="module")
def fresh() -> dict[str, Finding]:
    return findings(theirs())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights as `save_pretrained` leaves them."""
    theirs(d_model=32).model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.integration
def test_every_finding_of_a_fresh_one(fresh: dict[str, Finding]) -> None:
    verdicts = {name: finding.verdict for name, finding in fresh.items() if finding.verdict != "pass"}
    verdicts.pop("router balance", None)  # of random routers, as it falls
    left, right = map(int, re.findall(r" (\d+) ", fresh["padding"].measured))
    assert left > right > 0, "padding on the left takes the slots"
    assert fresh["gradient of idle experts"].value > 30
    assert verdicts == {
        "router precision": "fail",
        "router confidence": "fail",
        "padding": "fail",
        "cached decoding": "fail",
        "clean experts' input": "fail",
        "gradient of idle experts": "warn",
        "balance in the loss": "fail",
        "dropped tokens": "warn",
        "routing of text": "skip",
    }


@pytest.mark.integration
def test_the_router_is_saturated_at_initialisation(fresh: dict[str, Finding]) -> None:
    """transformers' own recorder gives logits of std 28 at d_model 768, and a mean top probability of 0.95."""
    subject = theirs()
    inputs_BS, targets_BT = texts.broad(subject)
    with torch.no_grad():
        output = subject.model(input_ids=inputs_BS, labels=targets_BT, output_router_logits=True)
    logits = [*output.encoder_router_logits, *output.decoder_router_logits]
    found = fresh["router confidence"]
    assert found.value == pytest.approx(max(float(one.softmax(-1).amax(-1).mean()) for one in logits), rel=1e-5)
    assert found.value > 0.9
    assert f"std {max(float(one.std()) for one in logits):.2g}," in found.measured
    assert max(float(one.std()) for one in logits) == pytest.approx(28, abs=5)


@pytest.mark.nightly
def test_decoding_is_as_training_where_no_queue_is_full() -> None:
    assert cached_decoding(theirs(d_model=32, expert_capacity=600)).verdict == "pass"


def test_experts_without_tokens_have_no_gradient() -> None:
    subject = theirs(d_model=32, dropout_rate=0.0, router_jitter_noise=0.0)
    inputs_BS, targets_BT = texts.one_token(subject)
    subject.model.train()(input_ids=inputs_BS, labels=targets_BT).loss.backward()
    missing = [name for name, weight in subject.model.named_parameters() if weight.grad is None]
    assert all(".experts." in name for name in missing)
    assert idle_gradients(subject).value == len(missing) > 30


def test_the_flags_of_the_configuration_bring_no_balance_loss() -> None:
    found = balance_loss(theirs(output_router_logits=True, add_router_probs=True))
    assert (found.verdict, found.value) == ("fail", 0)
    assert re.search(r"\d\.\d{4}", found.measured)
    assert "output_router_logits=True" in found.advice
    sparse = theirs(num_sparse_encoder_layers=4, num_sparse_decoder_layers=4)
    found = balance_loss(sparse)
    assert (found.verdict, found.value) == ("fail", 0)
    assert "output_router_logits" not in found.advice


def test_padding_is_left_out_of_the_statistics() -> None:
    subject = theirs(d_model=32)
    text = texts.short(subject)
    text.inputs_BS[:, 20:] = PAD
    real = {"encoder": int((text.inputs_BS != PAD).sum()), "decoder": text.targets_BT.numel()}
    for layer, stats in zip(subject.layers, subject.forward(text).router_stats, strict=True):
        assert stats.tokens == stats.load_E.sum() == real[layer[:7]]


def test_a_folder_is_read(folder: Path) -> None:
    subject = transformers_subject.load(folder)
    assert (subject.initialized, subject.code, len(subject.layers)) == (False, "transformers", 4)
    for name, weight in theirs(d_model=32).model.named_parameters():
        assert torch.equal(weight, subject.parameters[name])
    (folder / "model.safetensors").unlink()
    assert transformers_subject.load(folder).initialized


def refused(folder: Path, kind: type[SwitchError]) -> str:
    with pytest.raises(kind) as raised:
        transformers_subject.load(folder)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_folders_that_cannot_be_probed(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "SafetensorError" in refused(folder, CheckpointError)
    save_file({"shared.weight": theirs(d_model=32).parameters["shared.weight"].detach()}, weights)
    assert re.search(r"decoder\.block\.0\.layer\.0\.\S+\.weight\b", refused(folder, CheckpointError))
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    assert re.search(r"pytorch_model\.bin\b.*\bsafetensors\b", refused(folder, CheckpointError))
    (folder / "pytorch_model.bin").unlink()
    config = json.loads((folder / "config.json").read_text())
    for changed, tokens in [
        ({"model_type": "t5"}, r"config\.json.*\bmodel_type\b.*'t5'.*\bswitch_transformers\b.*\bconvert\b"),
        ({"dense_act_fn": "gated-gelu"}, "KeyError: 'gated-gelu'"),
        ({"num_layers": True}, r"StrictDataclassFieldValidationError.*\bnum_layers\b"),
        ({"num_layers": [1]}, r"StrictDataclassFieldValidationError.*\bnum_layers\b"),
        ({"num_layers": -1}, r"config\.json.*\bnum_layers\b.*\b1\b.*\b1,024\b.*-1\b"),
        ({"vocab_size": 0}, r"config\.json.*\bvocab_size\b.*\b1\b.*\b0\b"),
        ({"encoder_sparse_step": "2"}, "TypeError"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"config\.json.*\bquantization_config\b.*\bfloat32\b"),
        ({"num_experts": 10**7}, r"config\.json.*\bnum_experts\b.*\b1\b.*\b1,048,576\b.*\b10000000\b"),
        ({"hidden_size": 10**400}, r"config\.json.*\bd_model\b.*\b1\b.*\b1,048,576\b.*\b1000"),
        ({"num_layers": 10**6}, r"config\.json.*\bnum_layers\b.*\b1\b.*\b1,024\b"),
        ({"num_layers": 1024, "num_experts": 16384}, r"num_experts \(16384\).*\b1028\b.*\b131,072\b"),
    ]:
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        assert re.search(tokens, refused(folder, CheckpointError))
    for text, said in (
        ("[", "JSON"),
        ("[" * 100_000, "JSON"),
        ('{"a": ' * 100_000, "JSON"),
        (" " * (1 << 20) + json.dumps(config), "1,048,576 bytes"),
    ):
        (folder / "config.json").write_text(text)
        error = refused(folder, CheckpointError)
        assert "config.json" in error
        assert said in error


def test_an_index_that_names_a_pipe_or_a_file_elsewhere_is_refused(folder: Path) -> None:
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    weights.rename(folder.parent / "outside.safetensors")
    names = theirs(d_model=32).parameters
    for file in ("../outside.safetensors", str(folder.parent / "outside.safetensors"), "part.safetensors"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))
        if file == "part.safetensors":
            os.mkfifo(folder / file)
        else:
            (folder / "other.safetensors").touch()
        assert re.search(r"index\.json: .*outside|part\.safetensors: .*\bpipe\b", refused(folder, CheckpointError))


@pytest.mark.parametrize("weights", [True, False])
def test_a_configuration_does_not_choose_whose_code_runs(folder: Path, weights: bool) -> None:
    path = folder / "config.json"
    keys = ("attn_implementation", "_attn_implementation", "experts_implementation")
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(keys, "someone/kernel")))
    if not weights:
        (folder / "model.safetensors").unlink()
    assert transformers_subject.load(folder).model.config._attn_implementation == "eager"


@pytest.mark.parametrize("weights", [True, False])
def test_a_model_too_large_for_the_machine(folder: Path, weights: bool) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "d_ff": 1 << 20, "d_model": 1 << 17}))
    if not weights:
        (folder / "model.safetensors").unlink()
    assert re.search(r"\b\d[\d,]{9,} bytes\b.*\b\d[\d,]{9,}", refused(folder, OutOfMemory))


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert re.search("pip install 'transformers>=5.18,<6'.*`switchcli convert`", refused(folder, RecipeError))
