"""Translation from English by WMT's news tests, in T5's format: BLEU of the whole set."""

from collections.abc import Iterator

from switchcli.tasks.columns import answers, asked, text
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task
from switchcli.tasks.text_metrics import bleu

LANGUAGES = {"de": "German", "en": "English", "fr": "French", "ro": "Romanian"}


def _task(year: int, source: str, target: str) -> Task:
    """The hub names a pair with English last, whatever the direction."""
    config = f"{target}-{source}"

    def examples(row: Row, purpose: Purpose) -> Iterator[Example]:
        sentence = text(row, f"translation.{source}")
        prefix = f"translate {LANGUAGES[source]} to {LANGUAGES[target]}: "
        return asked(prefix + sentence, answers([text(row, f"translation.{target}")]), purpose)

    return Task(
        name=f"wmt{year}_{source}_{target}",
        source=HubSource(f"wmt/wmt{year}", config, f"wmt{year}/{config}"),
        columns=("translation",),
        examples=examples,
        metrics=(bleu,),
        chance=0.0,
    )


TASKS: tuple[Task, ...] = (_task(14, "en", "de"), _task(14, "en", "fr"), _task(16, "en", "ro"))
