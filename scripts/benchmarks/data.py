"""Preparing text against `datasets.Dataset.map` with the same tokenizer, and the loader against the models it feeds.

The text is the standard library's sources, in documents of 2,000 characters, over and over up to the size that is asked
for. `map` begins with the documents in an Arrow file and writes their ids to another; `load and map` begins with JSON
Lines, as `prepare` does, which also tells what is held out, and takes checksums of the ids.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from contestants import Contestant
from machine import Job, begin, random_batch
from models import OurStep, microbatch_of, without_values

from switchcli.data.config import DataSpec, TextObjective
from switchcli.data.dataset import TokenDataset
from switchcli.data.objectives.prefix_lm import PrefixLanguageModel
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.cache import PrepareContext
from switchcli.data.prepare.pipeline import PreparedTexts, prepare
from switchcli.data.prepare.prepared_text import TRAIN
from switchcli.data.sources.corpus import FilesCorpus, PythonStdlib
from switchcli.data.text_batches import PreparedTextSource
from switchcli.data.text_mixture import TemperatureMixing, TextMixture
from switchcli.data.tokenizer.tokenizer import Tokenizer, TrainedTokenizer
from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.training.microbatches import Loader, Microbatches

DOCUMENT_CHARACTERS = 2000
TEXTS = 8
"""Files, each a piece that a process takes whole; and the texts of the mixture."""
BATCH_TOKENS = 8192
MODELS = {
    "tiny": (ModelSpec(d_model=128, d_ff=512, num_heads=4, num_layers=2, vocab_size=8192, dropout=0.1), 512),
    "quickstart/dense": (ModelSpec(d_model=64, d_ff=256, num_heads=4, num_layers=2, vocab_size=1024, dropout=0.1), 128),
}
"""The smallest models of the recipes, and the length of the inputs that they are trained on."""
PREPARING = ("prepare", "map", "load and map")
LOADING = ("the model", "without a loader", "loader", "a mixture of 8 texts", "prefix_lm")
BATCHES = 20
"""Number of the loader's batches in a turn."""


def data_contestant(job: Job) -> Contestant:
    """Return one of PREPARING or LOADING by name, `job["who"]`. The amount of work of a turn is its tokens."""
    os.environ["RAYON_NUM_THREADS"] = str(job["threads"])  # the tokenizer's
    folder = Path(job["folder"])
    if job["who"] == "prepare":
        return Contestant(partial(_prepare, folder, job["processes"]), {})
    if job["who"] in PREPARING:
        return Contestant(partial(_map, folder, None if job["processes"] == 1 else job["processes"], job["who"]), {})
    return Contestant(_loading(job, folder), {})


def write_texts(folder: Path, megabytes: int) -> None:
    """Write what the contestants read: texts, a tokenizer, an Arrow file, and prepared texts for the loader."""
    size = 0
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("w", encoding="utf-8")) for path in _paths(folder)]
        for text, file in zip(_documents(), cycle(files)):
            file.write(json.dumps({"text": text}) + "\n")
            if (size := size + len(text.encode())) >= megabytes * 10**6:
                break
    trained = TrainedTokenizer(max_characters=2_000_000).load(lambda: {"": PythonStdlib(sources=True).documents()})
    _tokenizer_file(folder).write_text(trained.to_json(), encoding="utf-8")
    for spec in _specs(folder).values():
        _prepared(spec, folder, folder / "cache", None)
    _loaded(folder, folder / "read", None).save_to_disk(str(folder / "arrow"))


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
def unshown(label: str, pieces: int) -> Iterator[Callable[[int, int], None]]:
    yield lambda pieces, tokens: None


def _prepare(folder: Path, processes: int) -> int:
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        made = _prepared(_specs(folder)["joined"], folder, Path(cache), processes)
        return sum(part.tokens for text in made.texts.values() for part in text.counts.values())


def _loaded(folder: Path, cache: Path, processes: int | None) -> Any:
    import datasets

    paths = [str(path) for path in _paths(folder)]
    return datasets.load_dataset("json", data_files=paths, split="train", cache_dir=str(cache), num_proc=processes)


def _map(folder: Path, processes: int | None, who: str) -> int:
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        if who == "load and map":
            source = _loaded(folder, Path(cache), processes)
        else:
            source = datasets.load_from_disk(str(folder / "arrow"))
        made = source.map(
            partial(_ids, tokenizer=Tokenizer.read(_tokenizer_file(folder))),
            batched=True,
            remove_columns=["text"],
            load_from_cache_file=False,
            cache_file_name=f"{cache}/ids.arrow",
            num_proc=processes,
            new_fingerprint="new",
        )
        return sum(len(chunk.flatten()) for chunk in made.data.column("ids").chunks)


def _ids(batch: dict[str, list[str]], tokenizer: Tokenizer) -> dict[str, Any]:
    return {"ids": tokenizer.encode_batch(batch["text"])}


def _loading(job: Job, folder: Path) -> Callable[[], int]:
    """Return a call for BATCHES batches of the loader, or for a step of the model that takes them."""
    context, who = begin(job), job["who"]
    spec, length = MODELS[job["model"]]
    rows, spans = BATCH_TOKENS // length, SpanCorruption(inputs_length=length)
    if who == "the model":
        model = without_values(spec, context.device)
        initialize(model, 0)
        step = OurStep(model, context)
        microbatch = microbatch_of(random_batch(rows, length, spans.targets_length, spec.vocab_size))

        def one_step() -> int:
            step(microbatch)
            return rows * length

        return one_step
    prefixes = PrefixLanguageModel(inputs_length=length, targets_length=length)
    made_of = _specs(folder)["mixture" if who == "a mixture of 8 texts" else "joined"]
    batches = stream(
        _prepared(made_of, folder, folder / "cache", None), prefixes if who == "prefix_lm" else spans, rows
    )
    microbatches = Microbatches(batches, rows, rows, 0, 1)
    ahead = iter(range(0, 10**9, BATCHES))  # no batch twice

    def some_batches() -> int:
        first = next(ahead)
        with Loader(microbatches, context) as loader:
            for _ in (loader if who == "loader" else microbatches).from_step(first, first + BATCHES):
                pass
        return BATCHES * rows * length

    return some_batches


def stream(text: PreparedTexts, objective: TextObjective, rows: int) -> PreparedTextSource:
    chunks = [TokenDataset(one.shards[TRAIN], objective, 0) for one in text.texts.values()]
    mixture = None if len(chunks) == 1 else TextMixture(dict.fromkeys(text.texts, 1 / len(chunks)), 0)
    return PreparedTextSource(chunks, text.tokenizer, objective, 0, rows, mixture)
