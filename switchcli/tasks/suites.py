"""Suites: tasks that are reported together, and the mean that their benchmark prescribes. A suite may hold suites.

Tasks are named here and defined in the files of their families.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Union


class Suite(NamedTuple):
    """Tasks, or suites that weigh as much as one task."""

    name: str
    members: tuple[Union[str, "Suite"], ...]
    trained_too: tuple[str, ...] = ()
    """Tasks that are trained on with these, and have no part in the mean."""

    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks that are scored, in order."""
        inner = ((member,) if isinstance(member, str) else member.tasks() for member in self.members)
        return tuple(name for names in inner for name in names)

    def mean(self, scores: Mapping[str, float]) -> float | None:
        """The mean over the members of each one's score, by the names of tasks; None where one is missing: a mean over
        fewer tasks would be called the same and be another thing."""
        parts = self.parts(scores).values()
        known = [part for part in parts if part is not None]
        return sum(known) / len(known) if len(known) == len(self.members) else None

    def parts(self, scores: Mapping[str, float]) -> dict[str, float | None]:
        """The score of each member by its name: a row of the paper's Table 5."""
        found: dict[str, float | None] = {}
        for member in self.members:
            if isinstance(member, str):
                found[member] = scores.get(member)
            else:
                found[member.name] = member.mean(scores)
        return found


MNLI = Suite("mnli", ("mnli", "mnli_mismatched"))
"""Matched and mismatched are one task."""
GLUE = Suite("glue", ("cola", "sst2", "mrpc", "qqp", "stsb", MNLI, "qnli", "rte"))
"""Without WNLI, as T5 has it: its training set misleads."""
SUPER_GLUE = Suite(
    "super_glue", ("boolq", "cb", "copa", "multirc", "record", "superglue_rte", "wic", "wsc"), trained_too=("dpr",)
)
CLOSED_BOOK_QA = Suite("closed_book_qa", ("trivia_qa", "natural_questions", "web_questions"))
PAPER = Suite(
    "paper",
    (
        *(GLUE, "squad", SUPER_GLUE, "winogrande", "xsum", "anli_r3", "arc_easy", "arc_challenge"),
        *("web_questions", "natural_questions", "trivia_qa"),
    ),
    trained_too=("dpr",),
)
"""The columns of Table 5. The paper gives no mean over them."""
SUITES: tuple[Suite, ...] = (GLUE, SUPER_GLUE, CLOSED_BOOK_QA, PAPER)


def average(scores: Mapping[str, float], suites: Iterable[Suite]) -> float:
    """Return the mean of one or more tasks' scores, by the benchmarks' rules.

    MNLI counts once. Tasks that `suites` only train on (`trained_too`) do not count, unless there are no others.
    """
    helpers = {name for suite in suites for name in suite.trained_too}
    counted = [name for name in scores if name not in helpers] or list(scores)
    whole = [MNLI] if set(MNLI.tasks()) <= set(counted) else []
    alone = [name for name in counted if not whole or name not in MNLI.tasks()]
    mean = Suite("average", (*alone, *whole)).mean(scores)
    assert mean is not None
    return mean
