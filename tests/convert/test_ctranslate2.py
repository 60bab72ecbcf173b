"""CTranslate2's own converter reads the folders that `convert` exports, and its answers are those of `generate`."""

import json
import random
from importlib.metadata import entry_points
from itertools import takewhile
from pathlib import Path

import ctranslate2
import pytest
import tokenizers
import torch
from doubles import NoWarnings
from test_parity_of_files import OURS, opened, ours

from switchcli.model.config import ModelSpec
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.runs.models import conversion
from switchcli.spec import EOS, PAD

LENGTH = 12
GREEDY = {"beam_size": 1, "min_decoding_length": 0, "max_decoding_length": LENGTH}  # its defaults are others
TEXTS = ["ab <extra_id_0> cd", "hello <extra_id_1> z <extra_id_0>"]
TEXTS += ["".join(random.Random(seed).choices("abcdefgh ", k=5 + 3 * seed)) for seed in range(18)]


@pytest.mark.unit("T5 1.0")
@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(**OURS),
        ModelSpec(**OURS, activation="geglu"),
        ModelSpec(**{**OURS, "d_kv": 11}, activation="geglu", tie_embeddings=False),
    ],
    ids=["T5 1.0", "GEGLU", "T5 1.1"],
)
def test_its_converter_makes_a_model_with_the_answers_of_generate(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ours(tmp_path, spec, feed_forward_scale=4.0)
    conversion.to_huggingface(source, tmp_path / "served", NoWarnings())
    (command,) = entry_points(group="console_scripts", name="ct2-transformers-converter")
    arguments = ["--model", str(tmp_path / "served"), "--output_dir", str(tmp_path / "fast")]
    monkeypatch.setattr("sys.argv", [command.name, *arguments])
    command.load()()

    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "served/tokenizer.json"))
    translator = ctranslate2.Translator(str(tmp_path / "fast"), device="cpu", intra_threads=1)
    inputs = [[tokenizer.id_to_token(index) for index in tokenizer.encode(text).ids] for text in TEXTS]
    found = translator.translate_batch(inputs, **GREEDY)

    model = opened(source)
    ids = [torch.tensor([*model.handle.tokenizer.encode(text), EOS]) for text in TEXTS]
    inputs_BS = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    answers_BT = generate(model.model, inputs_BS, Decoding(max_tokens=LENGTH))
    # By name: random weights also answer with rows that pad the embedding, whose names are there those of sentinels.
    names = json.loads((tmp_path / "fast/shared_vocabulary.json").read_text())
    answers = [[names[index] for index in takewhile(lambda index: index != EOS, row)] for row in answers_BT.tolist()]
    assert [result.hypotheses[0] for result in found] == answers
