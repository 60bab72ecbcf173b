"""Summarization of news (CNN/DailyMail, XSum) and translation from English (WMT's news tests), in T5's formats.

The Switch paper reports ROUGE-2 for summaries. Translations are scored by the BLEU of the whole set.
"""

from collections.abc import Iterator

from switchcli.tasks.columns import answers, question_example, text
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task
from switchcli.tasks.text_metrics import bleu, rouge1, rouge2, rouge_lsum

LANGUAGES = {"de": "German", "en": "English", "fr": "French", "ro": "Romanian"}


def _summarization(name: str, source: HubSource, article: str, summary: str) -> Task:
    """Return the task of a data set with the columns `article` and `summary`."""

    def examples(row: Row, purpose: Purpose) -> Iterator[Example]:
        return question_example(f"summarize: {text(row, article)}", answers([text(row, summary)]), purpose)

    return Task(
        name=name,
        source=source,
        columns=(article, summary),
        examples=examples,
        metrics=(rouge2,),
        chance=0.0,
        secondary_metrics=(rouge1, rouge_lsum),
    )


def _translation(year: int, source: str, target: str) -> Task:
    """Return the task that translates between two languages, given by their codes."""
    config = f"{target}-{source}"  # the hub puts English last, whatever the direction

    def examples(row: Row, purpose: Purpose) -> Iterator[Example]:
        sentence = text(row, f"translation.{source}")
        prefix = f"translate {LANGUAGES[source]} to {LANGUAGES[target]}: "
        return question_example(prefix + sentence, answers([text(row, f"translation.{target}")]), purpose)

    return Task(
        name=f"wmt{year}_{source}_{target}",
        source=HubSource(f"wmt/wmt{year}", config, f"wmt{year}/{config}"),
        columns=("translation",),
        examples=examples,
        metrics=(bleu,),
        chance=0.0,
    )


TASKS: tuple[Task, ...] = (
    _summarization(
        "cnn_dailymail",
        HubSource("abisee/cnn_dailymail", "3.0.0", "cnn_dailymail/3.0.0"),
        article="article",
        summary="highlights",
    ),
    _summarization("xsum", HubSource("EdinburghNLP/xsum", None, "xsum"), article="document", summary="summary"),
    _translation(14, "en", "de"),
    _translation(14, "en", "fr"),
    _translation(16, "en", "ro"),
)
