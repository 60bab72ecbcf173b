"""Suites of tasks that are reported together, with the mean that their benchmark prescribes.

A suite refers to tasks by name, so it does not import their modules. Suites may contain suites.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Union


class Suite(NamedTuple):
    """A group of tasks and of inner suites; an inner suite has the weight of one task."""

    name: str
    members: tuple[Union[str, "Suite"], ...]
    trained_too: tuple[str, ...] = ()
    """Tasks that are trained on with the members and do not count in the mean."""

    def tasks(self) -> tuple[str, ...]:
        """Return the names of all scored tasks, those of inner suites included, in order."""
        names: list[str] = []
        for member in self.members:
            names += (member,) if isinstance(member, str) else member.tasks()
        return tuple(names)

    def mean(self, scores: Mapping[str, float]) -> float | None:
        """Return the mean of the members' scores, given the scores by task name.

        The result is None if a score is missing, since a mean over fewer tasks is not the benchmark's.
        """
        values = [value for value in self.member_scores(scores).values() if value is not None]
        return sum(values) / len(values) if len(values) == len(self.members) else None

    def member_scores(self, scores: Mapping[str, float]) -> dict[str, float | None]:
        """Return the score of each member by its name, as in a row of the Switch paper's Table 5."""
        by_member: dict[str, float | None] = {}
        for member in self.members:
            if isinstance(member, str):
                by_member[member] = scores.get(member)
            else:
                by_member[member.name] = member.mean(scores)
        return by_member


MNLI = Suite("mnli", ("mnli", "mnli_mismatched"))
"""Matched and mismatched MNLI, which count as one task."""
GLUE = Suite("glue", ("cola", "sst2", "mrpc", "qqp", "stsb", MNLI, "qnli", "rte"))
"""GLUE without WNLI, as in T5, because WNLI's training set misleads."""
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
"""The columns of the Switch paper's Table 5. The paper gives no mean over them."""
SUITES: tuple[Suite, ...] = (GLUE, SUPER_GLUE, CLOSED_BOOK_QA, PAPER)


def average(scores: Mapping[str, float], suites: Iterable[Suite]) -> float:
    """Return the mean of one or more tasks' scores, by the benchmarks' rules.

    The two sets of MNLI count once. Tasks that `suites` only train on (`trained_too`) do not count, unless there are
    no others.
    """
    only_trained = {name for suite in suites for name in suite.trained_too}
    counted = [name for name in scores if name not in only_trained] or list(scores)
    members: list[str | Suite] = list(counted)
    if set(MNLI.tasks()) <= set(counted):
        members = [*(name for name in counted if name not in MNLI.tasks()), MNLI]
    mean = Suite("average", tuple(members)).mean(scores)
    assert mean is not None
    return mean
