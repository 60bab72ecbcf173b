"""Preparing text against `datasets.Dataset.map` with the same tokenizer, and the loader against the models it feeds.

The text is the standard library's sources, in documents of 2,000 characters, over and over up to the size that is asked
for. `map` begins with the documents in an Arrow file and writes their ids to another; `load and map` begins with JSON
Lines, as `prepare` does, which also tells what is held out, and takes checksums of the ids.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from machine import Job, Result, begin, shape

from switchcli.data.batch import Batch
from switchcli.data.config import DataSpec
from switchcli.data.dataset import TokenDataset
from switchcli.data.objectives.denoisers import Denoisers, ObjectiveSpec, PrefixLanguageModel
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.pipeline import PreparedTexts, prepare
from switchcli.data.prepare.prepare_context import PrepareContext
from switchcli.data.prepare.prepared_text import TRAIN
from switchcli.data.prepare.shards import PrepareProgress
from switchcli.data.sources.corpus import FilesCorpus, PythonStdlib
from switchcli.data.text_batches import PreparedTextSource
from switchcli.data.text_mixture import TemperatureMixing, TextMixture
from switchcli.data.tokenizer.tokenizer import Tokenizer, TrainedTokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatch, Microbatches, RealTokens
from switchcli.training.optimizer_specs import Adafactor
from switchcli.training.prefetch import Loader

DOCUMENT_CHARACTERS = 2000
TEXTS = 8
"""Files, each a piece that a process takes whole; and the texts of the mixture."""
BATCH_TOKENS = 8192
MODELS = {
    "tiny": (shape(1, d_model=128, d_ff=512, num_heads=4, num_layers=2, vocab_size=8192), 512),
    "quickstart/dense": (shape(1, d_model=64, d_ff=256, num_heads=4, num_layers=2, vocab_size=1024), 128),
}
"""The smallest models of the recipes, and the length of the inputs that they are trained on."""
BATCHES = 20
"""Number of the loader's batches that are timed together."""


def data(job: Job) -> Result:
    """Run one part of the benchmark, `job["what"]`: `text` writes the files that the others read."""
    os.environ["RAYON_NUM_THREADS"] = str(job["threads"])  # the tokenizer's
    jobs = {"text": _text, "prepare": _prepare, "map": _map, "load and map": _map, "loader": _loader}
    return jobs[job["what"]](job)


def _text(job: Job) -> Result:
    folder, size = Path(job["folder"]), 0
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in _paths(folder)]
        for text, file in zip(_documents(), cycle(files)):
            file.write(json.dumps({"text": text}) + "\n")
            if (size := size + len(text.encode())) >= job["megabytes"] * 10**6:
                break
    trained = TrainedTokenizer(max_characters=2_000_000).load(lambda: {"": PythonStdlib(sources=True).documents()})
    _tokenizer_file(folder).write_text(trained.to_json(), encoding="utf-8")
    for spec in _specs(folder).values():
        _prepared(spec, folder, folder / "cache", None)
    _loaded(folder, folder / "read", None).save_to_disk(str(folder / "arrow"))
    return {"bytes": size}


def _documents() -> Iterator[str]:
    for document in cycle([*PythonStdlib(sources=True).documents()]):
        text = document.text
        for start in range(0, len(text), DOCUMENT_CHARACTERS):
            if not (part := text[start : start + DOCUMENT_CHARACTERS]).isspace():
                yield part


def _paths(folder: Path) -> list[Path]:
    return [folder / f"text-{number}.jsonl" for number in range(TEXTS)]


def _tokenizer_file(folder: Path) -> Path:
    return folder / "tokenizer.json"


def _specs(folder: Path) -> dict[str, DataSpec]:
    corpora = tuple(FilesCorpus(paths=(str(path),)) for path in _paths(folder))
    return {"joined": DataSpec(corpora=corpora), "mixture": DataSpec(corpora=corpora, mixture=TemperatureMixing())}


def _prepared(spec: DataSpec, folder: Path, cache: Path, processes: int | None) -> PreparedTexts:
    return prepare(spec, PrepareContext(cache, untracked, unshown, processes), Tokenizer.read(_tokenizer_file(folder)))


def untracked(items: Iterable[Any], label: str, total: int | None) -> Iterator[Any]:
    return iter(items)


@contextmanager
def unshown(label: str, pieces: int, size: int | None) -> Iterator[Callable[[PrepareProgress], None]]:
    yield lambda progress: None


def _prepare(job: Job) -> Result:
    folder = Path(job["folder"])
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = time.perf_counter()
        made = _prepared(_specs(folder)["joined"], folder, Path(cache), job["processes"])
        seconds = time.perf_counter() - began
    tokens = sum(part.tokens for text in made.texts.values() for part in text.counts.values())
    return {"seconds": seconds, "tokens": tokens}


def _loaded(folder: Path, cache: Path, processes: int | None) -> Any:
    import datasets

    paths = [str(path) for path in _paths(folder)]
    return datasets.load_dataset("json", data_files=paths, split="train", cache_dir=str(cache), num_proc=processes)


def _map(job: Job) -> Result:
    import datasets

    folder, processes = Path(job["folder"]), None if job["processes"] == 1 else job["processes"]
    datasets.disable_progress_bars()
    source = datasets.load_from_disk(str(folder / "arrow"))
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began = time.perf_counter()
        if job["what"] == "load and map":
            source = _loaded(folder, Path(cache), processes)
        made = source.map(
            partial(_ids, tokenizer=Tokenizer.read(_tokenizer_file(folder))),
            batched=True,
            remove_columns=["text"],
            load_from_cache_file=False,
            cache_file_name=f"{cache}/ids.arrow",
            num_proc=processes,
            new_fingerprint="new",
        )
        seconds = time.perf_counter() - began
        tokens = sum(len(chunk.flatten()) for chunk in made.data.column("ids").chunks)
    return {"seconds": seconds, "tokens": tokens}


def _ids(batch: dict[str, list[str]], tokenizer: Tokenizer) -> dict[str, Any]:
    return {"ids": tokenizer.encode_batch(batch["text"])}


def _loader(job: Job) -> Result:
    """Seconds of a batch of each way, and of a step of the model, in turn."""
    context, clock = begin(job)
    spec, length = MODELS[job["model"]]
    rows, folder = BATCH_TOKENS // length, Path(job["folder"])
    texts = {name: _prepared(made_of, folder, folder / "cache", None) for name, made_of in _specs(folder).items()}
    spans = SpanCorruption(inputs_length=length)
    ahead = iter(range(0, 10**9, BATCHES))  # no batch twice

    def batches(name: str, objective: ObjectiveSpec, workers: int = 0) -> Callable[[], None]:
        batches_of_text = stream(texts[name], objective, rows)

        def call() -> None:
            first = next(ahead)
            microbatches = Microbatches(batches_of_text, rows, None, 1, 0, 1)
            with Loader(microbatches, workers, 2, context) as loader:
                for _ in loader.from_step(first, first + BATCHES):
                    pass

        return call

    calls = {
        "the model": _step(spec, length, rows, context),
        "one thread": batches("joined", spans),
        "1 worker": batches("joined", spans, 1),
        "2 workers": batches("joined", spans, 2),
        "a mixture of 8 texts": batches("mixture", spans),
        "prefix_lm": batches("joined", PrefixLanguageModel(inputs_length=length, targets_length=length)),
        "denoisers": batches("joined", Denoisers(inputs_length=length)),
    }
    seconds = clock.in_turn(calls, job["rounds"])
    timed = {name: 1 if name == "the model" else BATCHES for name in calls}
    return {
        "seconds": {name: [one / timed[name] for one in each] for name, each in seconds.items()},
        "tokens": rows * length,
    }


def stream(text: PreparedTexts, objective: ObjectiveSpec, rows: int) -> PreparedTextSource:
    chunks = [TokenDataset(one.shards[TRAIN], objective, 0) for one in text.texts.values()]
    mixture = None if len(chunks) == 1 else TextMixture(dict.fromkeys(text.texts, 1 / len(chunks)), 0)
    return PreparedTextSource(chunks, text.tokenizer, objective, 0, rows, mixture)


def _step(spec: ModelSpec, length: int, rows: int, context: DistributedContext) -> Callable[[], None]:
    """Forward, backward and Adafactor on rows of span corruption's lengths."""
    with torch.device("meta"):
        model = SwitchTransformer(spec)
    model = model.to_empty(device=context.device).train()
    initialize(model, 0)
    optimizer = Adafactor().build(dict(model.named_parameters()))
    lengths = (length, SpanCorruption(inputs_length=length).targets_length)
    here = context.to_device(Batch(*(torch.randint(2, spec.vocab_size, (rows, each)) for each in lengths)))

    real = RealTokens.of(here)

    def call() -> None:
        accumulate_gradients(model, cross_entropy, [Microbatch(0, here, real)], real, context, "")
        optimizer.step(1e-3)
        optimizer.zero_grad()

    return call
