"""A teacher's answers on disk: read back equal, whole after a kill, and refused where they are somebody else's."""

import hashlib
import math
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from messages import naming
from tiny_model import SPARSE, TARGET, a_model, rows

from switchcli.data.batch import TeacherTopK
from switchcli.distributed.context import DistributedContext
from switchcli.errors import CheckpointError
from switchcli.model.moe.layer import evaluate_by
from switchcli.report.console import silent
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.training.distillation import Teacher
from switchcli.training.distillation_specs import TeacherCacheSpec
from switchcli.training.teacher_cache import TeacherCache, id_dtype
from switchcli.training.teacher_cache_writer import TeacherCacheWriter, top_k_probs

ROWS, STEPS = 4, 6
NO_STOP = StopRequest()
FACTS = {"teacher": "one", "text": "a", "batches": "b", "top_k": 5, "temperature": 1.0}
SPEC = TeacherCacheSpec(folder="unused", top_k=5, precision="float32")


def teacher() -> Teacher:
    model = a_model(SPARSE, seed=2)
    evaluate_by(model, "dropless")
    return Teacher(model, "float32")


class StopWhenTwo:
    """A stop that is requested when two parts are written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def requested(self) -> bool:
        return len(list(self._folder.glob("steps*"))) == 2


def fill(
    store: TeacherCache, parts: list[range], context: DistributedContext, stop: StopRequest | StopWhenTwo = NO_STOP
) -> bool:
    """Whether all was answered: False after a stop."""
    asking = TeacherCacheWriter(teacher(), SPEC, rows, ROWS, 2, packed=False, temperature=1.0)
    try:
        asking.fill(store, parts, context, silent(), stop)
    except StopTraining:
        return False
    return True


def cache(folder: Path) -> TeacherCache:
    return TeacherCache(folder, SPEC, ROWS, TARGET, SPARSE.vocab_size)


def opened(folder: Path, facts: dict = FACTS) -> TeacherCache:
    store = cache(folder)
    store.begin(facts)
    return store


def filled(folder: Path, steps: int = STEPS) -> TeacherCache:
    store = opened(folder)
    assert fill(store, store.missing(0, steps), DistributedContext("cpu", "float32"))
    return store


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the answers of all steps, in one part. Only to be read."""
    filled(folder := tmp_path_factory.mktemp("answers"))
    return folder


@pytest.fixture
def copy(answers: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(answers, tmp_path / "copy"))


def expected(step: int, first: int, count: int) -> TeacherTopK:
    batch = rows(step, first, count)
    kept = top_k_probs(teacher().predict(batch, packed=False, temperature=1.0), batch.targets_BT.numel(), SPEC)
    return TeacherTopK(*(part.view(count, TARGET, *part.shape[1:]) for part in kept))


def same(found: TeacherTopK, right: TeacherTopK) -> bool:
    """Probabilities to their rounding: which rows are asked about together changes the order of sums."""
    close = torch.allclose(found.probability, right.probability, rtol=1e-5)
    return torch.equal(found.ids.int(), right.ids.int()) and close


def test_what_is_kept_is_what_the_teacher_says(answers: Path) -> None:
    store = opened(answers)
    assert store.missing(0, STEPS) == []
    for step in (0, STEPS - 1):
        assert same(store.read(step, 0, ROWS), expected(step, 0, ROWS))
        assert same(store.read(step, 1, 2), expected(step, 1, 2))
    ids, probability, rest = store.read(0, 0, ROWS)
    torch.testing.assert_close(probability.sum(-1) + rest, torch.ones(ROWS, TARGET))
    assert (probability.diff(dim=-1) <= 0).all()
    assert ids.dtype == torch.uint16
    assert id_dtype(1 << 16) == torch.uint16
    assert id_dtype((1 << 16) + 1) == torch.int32


def test_threads_that_read_different_parts_get_their_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of `train.workers` do so where one part ends and the next one begins."""
    monkeypatch.setattr("switchcli.training.teacher_cache.MAX_FILE_BYTES", opened(tmp_path / "a").item_bytes)
    store = filled(tmp_path / "a", steps=2)
    right = [store.read(step, 0, ROWS).probability for step in (0, 1)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = [*threads.map(lambda step: store.read(step, 0, ROWS).probability, [0, 1] * 200)]
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(one, right[number % 2]) for number, one in enumerate(found))


def test_the_size_that_is_foretold_is_that_of_the_files(answers: Path) -> None:
    (part,) = answers.glob("steps-*")
    header = 1024
    assert 0 <= part.stat().st_size - STEPS * opened(answers).item_bytes <= header


def test_more_steps_ask_for_those_alone_that_are_missing(tmp_path: Path) -> None:
    store = filled(tmp_path / "a", steps=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert store.missing(0, 2) == [range(1, 2)]
    filled(tmp_path / "a", steps=2)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert same(store.read(1, 0, ROWS), expected(1, 0, ROWS))


def test_parts_are_cut_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path / "a")
    step_bytes = store.item_bytes
    monkeypatch.setattr("switchcli.training.teacher_cache.MAX_FILE_BYTES", 3 * step_bytes - 1)
    assert store.missing(0, 5) == [range(2), range(2, 4), range(4, 5)]
    monkeypatch.setattr("switchcli.training.teacher_cache.MAX_FILE_BYTES", step_bytes - 1)
    assert store.missing(3, 5) == [range(3, 4), range(4, 5)]


def test_a_stop_keeps_what_was_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchcli.training.teacher_cache.MAX_FILE_BYTES", 1)
    store, context = opened(tmp_path / "a"), DistributedContext("cpu", "float32")
    assert not fill(store, store.missing(0, 3), context, StopWhenTwo(tmp_path / "a"))
    left = store.missing(0, 3)
    assert left == [range(2, 3)]
    assert fill(store, left, context)
    assert same(store.read(2, 0, ROWS), expected(2, 0, ROWS))


@pytest.mark.parametrize(
    ("fact", "tokens"),
    [
        ({"teacher": "two"}, ["teacher"]),
        ({"text": "other"}, ["text"]),
        ({"batches": "other"}, ["batches", "train.seed", "train.batch_tokens"]),
        ({"top_k": 6}, ["top_k", "5", "6"]),
        ({"temperature": 2.0}, ["temperature", "1.0", "2.0"]),
    ],
)
def test_answers_of_something_else_are_refused(tmp_path: Path, fact: dict, tokens: list[str]) -> None:
    opened(tmp_path / "a")
    with pytest.raises(CheckpointError, match=naming(*tokens, "distill.cache.folder")) as refused:
        opened(tmp_path / "a", {**FACTS, **fact})
    assert ("batches" in str(refused.value)) == ("batches" in fact)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=naming(str(tmp_path), "distill.cache.folder")):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_facts_that_are_broken_are_refused(tmp_path: Path, text: str) -> None:
    opened(tmp_path)
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(CheckpointError, match=naming("facts.json", "distill.cache.folder")):
        opened(tmp_path)


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[bytes], bytes]:
    """Return the function that changes the tensors of a file."""

    def change_content(content: bytes) -> bytes:
        tensors = safetensors.torch.load(content)
        change(tensors)
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})

    return change_content


def value(name: str, number: float) -> Callable[[bytes], bytes]:
    """Return the function that sets the last value of a tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1:] = torch.tensor([number]).to(tensors[name].dtype)

    return rewritten(change)


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "no tensors": lambda content: safetensors.torch.save({}),
    "no safetensors": lambda content: b"no safetensors",
    "empty": lambda content: b"",
    "larger than its steps": lambda content: content + bytes(1 << 17),
    **{f"no {name}": rewritten(lambda tensors, name=name: tensors.pop(name)) for name in TeacherTopK._fields},
    "one more tensor": rewritten(lambda tensors: tensors.update(more=torch.zeros(1))),
    **{
        f"{why} {name}": rewritten(lambda tensors, name=name, act=act: tensors.update({name: act(tensors[name])}))
        for name in TeacherTopK._fields
        for why, act in {
            "flat": torch.flatten,
            "narrow": lambda tensor: tensor[:, :-1],
            "other dtype of": lambda tensor: tensor.double(),
        }.items()
    },
    "id of the vocabulary's size": value("ids", SPARSE.vocab_size),
    "large id": value("ids", 65_535),
    **{
        f"{name} of {number}": value(name, number)
        for name in ("probability", "rest")
        for number in (1.1, -1e-6, math.nan, -math.inf)
    },
    "probabilities of 0": rewritten(lambda tensors: tensors["probability"].zero_()),
    "halves": rewritten(lambda tensors: tensors["probability"].mul_(0.5)),
}


def is_refused(folder: Path, part: Path) -> None:
    store = cache(folder)
    assert store.damaged() == [part]
    with pytest.raises(CheckpointError, match=naming(part.name, "command")):
        store.read(0, 0, ROWS)


@pytest.mark.parametrize("case", WRONG)
def test_answers_that_no_teacher_gave_are_refused(copy: Path, case: str) -> None:
    (part,) = copy.glob("steps-*")
    content = WRONG[case](part.read_bytes())
    part.unlink()
    named = part.with_name(f"{part.name[:24]}{hashlib.sha256(content).hexdigest()[:32]}.safetensors")
    assert len(named.name) == len(part.name)
    named.write_bytes(content)
    is_refused(copy, named)


def test_a_damaged_part_is_refused_and_asked_for_again(copy: Path) -> None:
    (part,) = copy.glob("steps-*")
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    is_refused(copy, part)
    assert opened(copy).missing(0, STEPS) == [range(STEPS)]
    assert not part.exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounded_probabilities_are_accepted(tmp_path: Path, dtype: str) -> None:
    settings = SPEC.model_copy(update={"precision": dtype})
    store = TeacherCache(tmp_path, settings, 1, 3, SPARSE.vocab_size)
    store.begin(FACTS)
    for step, largest in enumerate((1.0, 0.2, 0.99, 0.30001)):
        probability = torch.full((1, 3, 5), largest) if largest == 0.2 else torch.zeros(1, 3, 5)
        probability[..., 0] = largest
        rest = 1 - probability.sum(-1)
        ids = torch.full((1, 3, 5), SPARSE.vocab_size - 1).to(id_dtype(SPARSE.vocab_size))
        store.add(
            range(step, step + 1),
            TeacherTopK(ids, probability.to(settings.dtype), rest.clamp(min=0).to(settings.dtype)),
        )
        store.read(step, 0, 1)
    assert store.damaged() == []


def test_a_name_may_claim_any_number_of_steps(copy: Path) -> None:
    (part,) = copy.glob("steps-*")
    claims = part.with_name(part.name.replace("00000000-00000006", f"00000000-{10**12}"))
    part.rename(claims)
    assert cache(copy).missing(0, 10) == []
    is_refused(copy, claims)
    assert opened(copy).missing(0, STEPS) == [range(STEPS)]


def test_answers_that_are_not_there_are_told(answers: Path) -> None:
    with pytest.raises(CheckpointError, match=naming("step 7", "command")):
        opened(answers).read(7, 0, ROWS)
