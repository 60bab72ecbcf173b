"""ANLI and WinoGrande: benchmarks collected so that the models of their day fail on them.

ANLI (Nie et al. 2020) is natural language inference in three rounds. WinoGrande XL (Sakaguchi et al. 2020) asks which
of two options fills the blank in a sentence, written `_`; the answer is the text of the option.

T5 has no such tasks, and the Switch paper reports ANLI's round 3 and WinoGrande without giving a format. The formats
are ours. ANLI's is T5's for MNLI with the prefix `anli`, the same in all rounds, so that a model can train on one round
for another.
"""

from collections.abc import Iterable
from reprlib import repr as short

from switchcli.tasks.columns import answers, question_example, text, value
from switchcli.tasks.label_tasks import NLI, THREE_WAY, label_task, prefixed
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task
from switchcli.tasks.text_metrics import exact_match

WINOGRANDE_COLUMNS = ("sentence", "option1", "option2")
WINOGRANDE_OPTIONS = {"1": "option1", "2": "option2"}


def _anli(round_number: int) -> Task:
    suffix = f"r{round_number}"
    return label_task(
        f"anli_{suffix}",
        HubSource("facebook/anli", None, "anli", f"train_{suffix}", f"dev_{suffix}", f"test_{suffix}"),
        NLI,
        THREE_WAY,
        prefix="anli",
    )


def _winogrande(row: Row, purpose: Purpose) -> Iterable[Example]:
    answer = value(row, "answer")
    if answer != "" and (not isinstance(answer, str) or answer not in WINOGRANDE_OPTIONS):
        raise ValueError(f"answer: is {short(answer)}, and should be '1' or '2', or '' if it is secret")
    targets = answers([text(row, WINOGRANDE_OPTIONS[answer])] if answer else [])
    return question_example(prefixed("winogrande", row, WINOGRANDE_COLUMNS, WINOGRANDE_COLUMNS), targets, purpose)


TASKS: tuple[Task, ...] = (
    _anli(1),
    _anli(2),
    _anli(3),
    Task(
        "winogrande",
        HubSource("allenai/winogrande", "winogrande_xl", "winogrande/winogrande_xl"),
        columns=(*WINOGRANDE_COLUMNS, "answer"),
        examples=_winogrande,
        metrics=(exact_match,),
        chance=50,  # one of two options
    ),
)
