"""Greedy answers of a dense model, ours against CTranslate2's in float32 and int8, on the same inputs in turn."""

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import torch
from machine import Job, Result, plain, shape
from torch import nn

from switchcli.convert.ctranslate2_spec import model_spec, vocabulary
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.schema import TaskRecipe
from switchcli.report.console import Console
from switchcli.runs.loading import load_checkpoint
from switchcli.spec import EOS, PAD
from switchcli.tasks.config import tasks_of
from switchcli.tasks.reading import has_split, read_examples
from switchcli.training.checkpointer import logical_tensors

INPUTS = 100
Answers = list[list[str]]


def serving(job: Job) -> Result:
    """Seconds for all answers, of each engine in turn; tokens answered, and how many answers are ours."""
    device = plain(job)
    model, pieces, ids = trained(job, device) if job["checkpoint"] else random_model(device)
    tokens = vocabulary(pieces, model.spec.vocab_size)
    batches = [ids[start : start + job["batch"]] for start in range(0, len(ids), job["batch"])]
    engines: dict[str, Callable[[list[list[int]]], Answers]] = {"ours": our_answers(model, tokens, job["max_tokens"])}
    with tempfile.TemporaryDirectory() as folder:
        for quantization in ("float32", "int8"):
            there = Path(folder, quantization)
            there.mkdir()
            model_spec(model.spec, logical_tensors(model), tokens, tokens[2], quantization).save(str(there))
            engines[quantization] = their_answers(there, tokens, device, job)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        answers: dict[str, Answers] = {}
        for turn in range(1 + job["rounds"]):
            for name, answer in engines.items():
                started = time.perf_counter()
                answers[name] = [text for batch in batches for text in answer(batch)]
                if turn:  # the first turn warms up
                    seconds[name].append(time.perf_counter() - started)
    same = {
        name: sum(one == other for one, other in zip(found, answers["ours"], strict=True))
        for name, found in answers.items()
    }
    count = {name: sum(map(len, found)) for name, found in answers.items()}
    return {
        "seconds": seconds,
        "same": same,
        "tokens": count,
        "inputs": len(ids),
        "parameters": sum(map(torch.numel, model.parameters())),
    }


def trained(job: Job, device: torch.device) -> tuple[SwitchTransformer, Sequence[str | None], list[list[int]]]:
    """The model of a run on tasks, its tokenizer's pieces, and validation inputs of its tasks, cut as the run does."""
    loaded = load_checkpoint(Path(job["checkpoint"]), device, Console(quiet=True))
    recipe, tokenizer = loaded.recipe, loaded.tokenizer
    if not isinstance(recipe, TaskRecipe):
        raise SystemExit(f"--checkpoint {job['checkpoint']}: name a run on tasks, whose inputs are known")
    examples = [
        example.input
        for task in tasks_of(recipe.tasks).values()
        if has_split(task, "validation")
        for example in read_examples(task, "validation", "evaluation", recipe.data.folder)
    ]
    texts = random.Random(0).sample(examples, INPUTS)
    ids = [[*tokenizer.encode(text)[: recipe.inputs_length - 1], EOS] for text in texts]
    return loaded.model, tokenizer.pieces(range(tokenizer.vocab_size)), ids


@torch.no_grad()
def random_model(device: torch.device) -> tuple[SwitchTransformer, Sequence[str | None], list[list[int]]]:
    """A model of T5-Small's shape with weights by which tokens differ and EOS never comes; 16 inputs of 64 tokens."""
    model = (
        SwitchTransformer(shape(1, d_model=512, d_ff=2048, num_heads=8, num_layers=6, dropout=0.0)).to(device).eval()
    )
    for name, parameter in model.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.05)
    model.embedding[EOS] = 0.0
    ids_NS = torch.randint(3, model.spec.vocab_size, (16, 64))
    return model, ["<pad>", "</s>", "<unk>"], ids_NS.tolist()


def our_answers(model: SwitchTransformer, tokens: Sequence[str], max_tokens: int) -> Callable[[Any], Answers]:
    device = model.embedding.device

    def answer(batch: list[list[int]]) -> Answers:
        rows = [torch.tensor(ids, device=device) for ids in batch]
        inputs_BS = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        found = generate(model, inputs_BS, Decoding(max_tokens=max_tokens)).tolist()
        return [[tokens[index] for index in ids if index not in (PAD, EOS)] for ids in found]

    return answer


def their_answers(folder: Path, tokens: Sequence[str], device: torch.device, job: Job) -> Callable[[Any], Answers]:
    translator = ctranslate2.Translator(str(folder), device=device.type, intra_threads=job["threads"])

    def answer(batch: list[list[int]]) -> Answers:
        found = translator.translate_batch(
            [[tokens[index] for index in ids] for ids in batch],
            beam_size=1,
            min_decoding_length=0,
            max_decoding_length=job["max_tokens"],
            max_input_length=0,
        )
        return [result.hypotheses[0] for result in found]

    return answer
