"""WinoGrande XL (Sakaguchi et al. 2020): which of two options fills the blank of a sentence, written `_`.

T5 has no such task, and the Switch paper, which scores the generated answer, gives no format: ours is in T5's style.
The answer is the text of the option.
"""

from collections.abc import Iterable
from reprlib import repr as short

from switchcli.tasks.columns import answers, asked, text, value
from switchcli.tasks.labelled_rows import prefixed
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task
from switchcli.tasks.text_metrics import exact_match

COLUMNS = ("sentence", "option1", "option2")
OPTIONS = {"1": "option1", "2": "option2"}


def _examples(row: Row, purpose: Purpose) -> Iterable[Example]:
    answer = value(row, "answer")
    if answer != "" and (not isinstance(answer, str) or answer not in OPTIONS):
        raise ValueError(f"answer: {short(answer)} is none of '1' and '2', or '' where it is secret")
    right = answers([text(row, OPTIONS[answer])] if answer else [])
    return asked(prefixed("winogrande", row, COLUMNS, COLUMNS), right, purpose)


TASKS: tuple[Task, ...] = (
    Task(
        "winogrande",
        HubSource("allenai/winogrande", "winogrande_xl", "winogrande/winogrande_xl"),
        columns=(*COLUMNS, "answer"),
        examples=_examples,
        metrics=(exact_match,),
        chance=50,  # one of two options
    ),
)
