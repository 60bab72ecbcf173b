"""StreamedTextSource: the same batches on any ranks and from any step on; every training document once."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming_words
from tokenizers import models, pre_tokenizers

from switchcli.data import streaming as module
from switchcli.data.batch import Batch
from switchcli.data.config import DataSpec
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare import shards
from switchcli.data.sources.corpus import FilesCorpus
from switchcli.data.sources.document import is_held_out
from switchcli.data.streaming import StreamedTextSource, source_shards_of
from switchcli.data.text_mixture import TextMixture, WeightedMixing
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError, RecipeError
from switchcli.spec import EOS
from switchcli.training.microbatches import Microbatches

ROWS = SpanCorruption(inputs_length=8)
LENGTH = ROWS.raw_tokens_per_row
LANES, BATCH, MICROBATCH = 4, 8, 2
STEPS = 60
WORDS_A_DOCUMENT = 20
FILES = {"a": 6, "b": 2}
"""Files of each text: more than there are lanes, and fewer."""
DOCUMENTS = 15
HELD_OUT = 0.15
SHARES = {"a": 0.7, "b": 0.3}
WINDOW = 600
NUM_WORDS = sum(FILES.values()) * DOCUMENTS * WORDS_A_DOCUMENT


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Make windows far smaller than the texts."""
    patch.setattr(module, "WINDOW_CHARACTERS", WINDOW)
    patch.setattr(module, "MIN_WINDOW_CHARACTERS", WINDOW // 10)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files whose words are numbers, none of which comes twice."""
    folder, word = tmp_path_factory.mktemp("live"), 0
    for label, number in FILES.items():
        for file in range(number):
            lines = []
            for _ in range(DOCUMENTS):
                lines.append(" ".join(map(str, range(word, word + WORDS_A_DOCUMENT))))
                word += WORDS_A_DOCUMENT
            (folder / f"{label}{file}.txt").write_text("\n".join(lines) + "\n")
    return folder


def words() -> Tokenizer:
    """The id of a word is its number and 3."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {str(word): word + 3 for word in range(NUM_WORDS)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([f"<extra_id_{index}>" for index in range(4)])
    return Tokenizer.from_json(inner.to_str())


TOKENIZER = words()


def a_spec(folder: Path, lanes: int = LANES) -> DataSpec:
    corpora = tuple(
        FilesCorpus(paths=(str(folder / f"{label}{file}.txt"),), sample_by="line", language=label)
        for label, number in FILES.items()
        for file in range(number)
    )
    return DataSpec(
        corpora=corpora,
        mixture=WeightedMixing(),
        objective=ROWS,
        access="stream",
        stream_shards=lanes,
        held_out_fraction=HELD_OUT,
    )


def a_reader(spec: DataSpec, lane: int, label: str, pieces: module.CorpusShards | None = None) -> module.StreamReader:
    return module.StreamReader(pieces or source_shards_of(spec.texts()[label]), spec, TOKENIZER, lane, label, 0, WINDOW)


class Run:
    """The stream of a run on some ranks, step after step as its loaders ask for it."""

    def __init__(self, spec: DataSpec, world: int = 1, seed: int = 5, labels: Sequence[str] = ("a", "b")) -> None:
        pieces = {label: source_shards_of(corpora) for label, corpora in spec.texts().items() if label in labels}
        mixture = (
            TextMixture({label: SHARES[label] for label in labels}, seed, spec.stream_shards)
            if len(labels) > 1
            else None
        )
        self.streams = [
            StreamedTextSource(spec, pieces, TOKENIZER, mixture, seed, BATCH, (rank, world), kept_steps=4)
            for rank in range(world)
        ]
        self._batches = [
            Microbatches(stream, BATCH, MICROBATCH, rank, world) for rank, stream in enumerate(self.streams)
        ]

    def step(self, step: int) -> Batch:
        made = [micro.batch for batches in self._batches for micro in batches(step)]
        return Batch(*(torch.cat([batch[field] for batch in made]) for field in range(2)))

    def position(self, step: int) -> list[int]:
        return np.sum([stream.state(step) for stream in self.streams], axis=0).tolist()

    def restore_state(self, step: int, position: list[int]) -> None:
        for stream in self.streams:
            stream.restore_state(step, position)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(a, b, strict=True))


def texts(batch: Batch) -> list[list[int]]:
    """The words of each row."""
    sentinels, rows = set(TOKENIZER.sentinels.tolist()), []
    for inputs, targets in zip(batch.inputs_BS.tolist(), batch.targets_BT.tolist(), strict=True):
        hidden: dict[int, list[int]] = {}
        for index in targets:
            if index in sentinels:
                hidden[index] = []
            elif index > 1:
                hidden[list(hidden)[-1]].append(index)
        rows.append([word - 3 for index in inputs if index > 1 for word in hidden.get(index, [index])])
    return rows


@pytest.fixture(scope="module")
def straight(folder: Path) -> Iterator[tuple[list[Batch], list[list[int]]]]:
    """The batches of a run on one rank that never stops, and where it stands after each number of steps."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        run = Run(a_spec(folder))
        positions, batches = [run.position(0)], []
        for step in range(STEPS):
            batches.append(run.step(step))
            positions.append(run.position(step + 1))
        yield batches, positions


Straight = tuple[list[Batch], list[list[int]]]


@pytest.mark.unit("2")
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_batches_and_stand_where_one_does(world: int, folder: Path, straight: Straight) -> None:
    run = Run(a_spec(folder), world)
    assert run.position(0) == straight[1][0]
    for step, batch in enumerate(straight[0]):
        assert equal(run.step(step), batch)
        assert run.position(step + 1) == straight[1][step + 1]


def test_the_run_that_is_compared_with_goes_over_epochs_and_windows(straight: Straight) -> None:
    last = np.array(straight[1][-1]).reshape(LANES, 2, -1)
    assert (last[:, :, 0].max(0) >= 1).all(), "epochs"
    assert (last[:, 0, 3] >= 3).all(), "windows"
    assert {batch.inputs_BS.shape for batch in straight[0]} == {(BATCH, ROWS.inputs_length)}
    assert len({str(texts(batch)) for batch in straight[0]}) == STEPS


@settings(max_examples=25)
@given(data=st.data(), stops=st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_from_any_step_on_any_ranks_it_goes_on_as_if_never_stopped(
    data: st.DataObject, stops: list[int], folder: Path, straight: Straight
) -> None:
    step, position = 0, straight[1][0]
    for length in stops:
        run = Run(a_spec(folder), data.draw(st.sampled_from([1, 2, 4])))
        run.restore_state(step, position)
        ahead = data.draw(st.integers(0, 2))  # a loader is some steps further than the one that is saved
        for later in range(step, step + length + ahead):
            if later < STEPS:
                assert equal(run.step(later), straight[0][later])
        step = min(step + length, STEPS)
        position = run.position(step)
        assert position == straight[1][step]


def training_documents(spec: DataSpec, label: str) -> list[str]:
    found = (document for corpus in spec.texts()[label] for document in corpus.documents())
    return [document.text for document in found if not is_held_out(document.identity, HELD_OUT)]


@pytest.mark.parametrize("label", FILES)
def test_every_training_document_comes_once_an_epoch_and_no_held_out_one_ever(label: str, folder: Path) -> None:
    spec, epochs = a_spec(folder), 5
    documents = training_documents(spec, label)
    assert len(documents) < FILES[label] * DOCUMENTS
    training = {int(word) for document in documents for word in document.split()}
    counts: Counter[int] = Counter()
    windows = 0
    for lane in range(LANES):
        reader = a_reader(spec, lane, label)
        while reader.position.epoch < epochs:
            counts.update((reader.raw_rows(1) - 3).ravel().tolist())
        windows += reader.position.window
    assert set(counts) == training
    tails = sum(max(0, epochs - counts[word]) for word in training)
    again = sum(max(0, counts[word] - epochs) for word in training)
    assert max(counts.values()) <= epochs + 2  # a lane of the smaller text is less than a window
    assert tails <= windows * (LENGTH - 1), "the rest of a window that is less than a row"
    assert again <= LANES * (WINDOW // 60 * WORDS_A_DOCUMENT + LENGTH), "what of the next epoch was in the last window"


@pytest.mark.parametrize("label", FILES)
def test_documents_are_parted_among_the_lanes(label: str, folder: Path) -> None:
    """Each is read by one lane, with fewer pieces than lanes and with more: no lane is without."""
    spec = a_spec(folder)
    seen = []
    for lane in range(LANES):
        found = islice(
            a_reader(spec, lane, label)._iter_documents(module.StreamPosition()), 2 * FILES[label] * DOCUMENTS
        )
        seen.append([document.text for position, document in found if document is not None and position.epoch == 0])
        assert len(seen[-1]) == len({*seen[-1]}) > 0
    assert sorted(text for lane in seen for text in lane) == sorted(training_documents(spec, label))


def test_epochs_go_through_the_pieces_in_other_orders(folder: Path) -> None:
    spec = a_spec(folder, lanes=1)
    orders: dict[int, list[str]] = {}
    for position, document in islice(
        a_reader(spec, 0, "a")._iter_documents(module.StreamPosition()), 8 * FILES["a"] * DOCUMENTS
    ):
        if document is None:
            continue
        file = document.name.rpartition(":")[0]
        order = orders.setdefault(position.epoch, [])
        if file not in order:
            order.append(file)
    whole = [order for order in orders.values() if len(order) == FILES["a"]]
    assert len({tuple(order) for order in whole}) > len(whole) / 2 > 3


def test_rows_are_mixed_as_intended(straight: Straight) -> None:
    first_of_b = FILES["a"] * DOCUMENTS * WORDS_A_DOCUMENT
    rows = [row for batch in straight[0] for row in texts(batch)]
    for steps in (10, STEPS):
        shown = sum(row[0] >= first_of_b for row in rows[: steps * BATCH])
        assert shown / (steps * BATCH) == TextMixture(SHARES, 5, LANES).fractions_after(steps * BATCH)["b"]
    assert shown / len(rows) == pytest.approx(0.3, abs=0.01)


def test_a_mixture_goes_on_at_the_next_row_in_branches_with_other_batches(folder: Path) -> None:
    """And in a branch of a branch. Each stream shard makes its rows in the order of a run that is never branched."""
    spec = a_spec(folder)
    pieces = {label: source_shards_of(corpora) for label, corpora in spec.texts().items()}

    def a_stream(batch_rows: int) -> StreamedTextSource:
        return StreamedTextSource(spec, pieces, TOKENIZER, TextMixture(SHARES, 5, LANES), 5, batch_rows, (0, 1), 4)

    def rows(stream: StreamedTextSource, batch_rows: int, steps: range) -> list[list[set[int]]]:
        """The words of each row that each stream shard makes: inputs and targets share them out."""
        lanes: list[list[set[int]]] = [[] for _ in range(LANES)]
        for step in steps:
            inputs, targets = stream.batch(step, 0, batch_rows)
            for row, ids in enumerate(torch.cat([inputs, targets], dim=1).tolist()):
                lanes[row * LANES // batch_rows].append({word for word in ids if 2 < word < NUM_WORDS + 3})
        return lanes

    straight = rows(a_stream(8), 8, range(20))
    run, branch, branch_of_branch = a_stream(8), a_stream(4), a_stream(16)
    found = [rows(run, 8, range(4))]
    branch.restore_state(4, run.state(4), row_offset=4 * (8 - 4))
    found.append(rows(branch, 4, range(4, 15)))
    branch_of_branch.restore_state(15, branch.state(15), row_offset=4 * (8 - 4) + 15 * (4 - 16))
    found.append(rows(branch_of_branch, 16, range(15, 18)))
    for lane in range(LANES):
        made = [row for part in found for row in part[lane]]
        assert made == straight[lane][: len(made)]
        assert len(made) == 4 * 2 + 11 + 3 * 4


def test_the_positions_of_as_many_steps_as_a_loader_is_ahead_can_be_saved(folder: Path, straight: Straight) -> None:
    run = Run(a_spec(folder))
    for step in range(10):
        run.step(step)
    assert [run.position(step) for step in range(6, 11)] == straight[1][6:11]


def test_seeds_differ(folder: Path, straight: Straight) -> None:
    assert not equal(Run(a_spec(folder), seed=6).step(0), straight[0][0])


def test_ranks_that_cannot_share_the_lanes_are_refused_with_a_number(folder: Path) -> None:
    with pytest.raises(RecipeError, match=naming_words("data.stream_shards 4 3 12")):
        Run(a_spec(folder), world=3)


def lines_in_files(folder: Path, files: Sequence[int], lanes: int = LANES) -> tuple[DataSpec, module.CorpusShards]:
    """A stream of files of so many documents, whose words are numbers, none of which comes twice."""
    ends = np.cumsum([0, *files])
    for file, (begin, end) in enumerate(pairwise(ends.tolist())):
        lines = [" ".join(str(5 * line + word) for word in range(5)) for line in range(begin, end)]
        (folder / f"{file}.txt").write_text("\n".join(lines) + "\n")
    corpora = tuple(FilesCorpus(paths=(str(folder / f"{file}.txt"),), sample_by="line") for file in range(len(files)))
    spec = DataSpec(corpora=corpora, objective=ROWS, access="stream", stream_shards=lanes, held_out_fraction=1e-9)
    return spec, source_shards_of(corpora)


def test_a_lane_whose_piece_is_empty_goes_on_with_that_of_the_next_epoch(tmp_path: Path) -> None:
    spec, pieces = lines_in_files(tmp_path, [27, 27, 0, 27])
    stream = StreamedTextSource(spec, {"": pieces}, TOKENIZER, None, 0, BATCH, (0, 1), 2)
    shown = Counter(word for step in range(80) for row in texts(stream.batch(step, 0, BATCH)) for word in row)
    assert set(shown) == set(range(5 * 81))


@pytest.mark.parametrize(("files", "lane"), [([0, 0, 0, 0], 1), ([3], 4)])
def test_a_lane_without_a_row_in_any_epoch_is_told_of(files: list[int], lane: int, tmp_path: Path) -> None:
    """All pieces are empty, or there are fewer than lanes, and fewer documents too."""
    spec, pieces = lines_in_files(tmp_path, files)
    stream = StreamedTextSource(spec, {"": pieces}, TOKENIZER, None, 0, BATCH, (0, 1), 2)
    with pytest.raises(DataError, match=naming_words(f"data.corpora {lane} 4 data.stream_shards")):
        stream.batch(0, 0, BATCH)


@pytest.mark.parametrize("lanes", [2, 4])
def test_documents_at_regular_distances_are_in_all_lanes(lanes: int, tmp_path: Path) -> None:
    """Every second line is blank: parallel text, of which a filter leaves one language, is as regular."""
    (tmp_path / "a.txt").write_text("\n\n".join(" ".join(map(str, range(5 * n, 5 * n + 5))) for n in range(60)) + "\n")
    corpora = (FilesCorpus(paths=(str(tmp_path / "a.txt"),), sample_by="line"),)
    spec = DataSpec(corpora=corpora, objective=ROWS, access="stream", stream_shards=lanes, held_out_fraction=1e-9)
    stream = StreamedTextSource(spec, {"": source_shards_of(corpora)}, TOKENIZER, None, 0, BATCH, (0, 1), 2)
    shown = Counter(word for step in range(80) for row in texts(stream.batch(step, 0, BATCH)) for word in row)
    assert set(shown) == set(range(300))


def test_no_lane_shows_its_documents_twice_as_often_as_another_where_one_piece_is_very_small(tmp_path: Path) -> None:
    """The last source shard of a corpus holds the rest, which may be small."""
    files = [60, 60, 60, 2]
    spec, pieces = lines_in_files(tmp_path, files)
    readers = [a_reader(spec, lane, "", pieces) for lane in range(LANES)]
    shown = Counter((np.concatenate([reader.raw_rows(800) for reader in readers]) - 3).ravel().tolist())
    epochs = [reader.position.epoch for reader in readers]
    assert min(epochs) > 10
    assert max(epochs) <= 2 * min(epochs)
    of_small = [shown[word] for word in range(5 * sum(files[:3]), 5 * sum(files))]
    of_others = [shown[word] for word in range(5 * sum(files[:3]))]
    assert max(of_small) <= 2 * np.mean(of_others)
    assert max(of_others) <= 2 * min(of_others)


def test_a_document_of_many_parts_is_one_in_a_window(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PART_CHARACTERS", 16)
    objective = SpanCorruption(inputs_length=64)
    spec = a_spec(folder, lanes=1).model_copy(update={"objective": objective, "packing": "documents"})
    documents = training_documents(spec, "b")
    assert min(len([*shards.split_text(text)]) for text in documents) > 3
    reader = a_reader(spec, 0, "b")
    found = []
    while reader.position.epoch == 0:
        (row,) = reader.raw_rows(1).tolist()
        ends = [-1, *(place for place, index in enumerate(row) if index == EOS)]
        found += [[word - 3 for word in row[begin + 1 : end]] for begin, end in pairwise(ends)]
    assert {tuple(words) for words in found} == {tuple(map(int, text.split())) for text in documents}
