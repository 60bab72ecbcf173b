"""Ranks that ask a teacher together: the answers are those of one rank, to the byte."""

from pathlib import Path

import pytest
from ranks import on_ranks
from tiny_model import SPARSE, TARGET, a_model, rows

from switchcli.distributed.context import DistributedContext
from switchcli.model.moe.layer import evaluate_by
from switchcli.report.console import silent
from switchcli.system.signals import StopRequest
from switchcli.training.distillation import Teacher
from switchcli.training.distillation_specs import TeacherCacheSpec
from switchcli.training.teacher_cache import TeacherCache
from switchcli.training.teacher_cache_writer import TeacherCacheWriter

ROWS = 4
SETTINGS = TeacherCacheSpec(folder="unused", top_k=5)


def cache(folder: Path) -> TeacherCache:
    return TeacherCache(folder, SETTINGS, ROWS, TARGET, SPARSE.vocab_size)


def ask(folder: Path) -> list[str]:
    """The names of the files, which hold their digests."""
    store = cache(folder)
    context = DistributedContext("cpu", "float32")
    model = a_model(SPARSE, seed=2)
    evaluate_by(model, "dropless")
    asking = TeacherCacheWriter(Teacher(model, "float32"), SETTINGS, rows, ROWS, 2, packed=False, temperature=1.0)
    asking.fill(store, [range(2), range(2, 4), range(4, 6)], context, silent(), StopRequest())
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.integration
def test_ranks_share_the_asking_and_the_answers_are_those_of_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        cache(tmp_path / name).begin({"teacher": "one"})
    alone = ask(tmp_path / "one")
    assert len(alone) == 1 + 3
    assert on_ranks(2, ask, tmp_path / "two") == [alone, alone]
