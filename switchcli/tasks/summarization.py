"""Summaries of news: CNN/DailyMail and XSum in T5's format. The paper reports ROUGE-2."""

from collections.abc import Iterator

from switchcli.tasks.columns import answers, asked, text
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task
from switchcli.tasks.text_metrics import rouge1, rouge2, rouge_lsum


def _task(name: str, source: HubSource, article: str, summary: str) -> Task:
    def examples(row: Row, purpose: Purpose) -> Iterator[Example]:
        return asked(f"summarize: {text(row, article)}", answers([text(row, summary)]), purpose)

    return Task(
        name=name,
        source=source,
        columns=(article, summary),
        examples=examples,
        metrics=(rouge2,),
        chance=0.0,
        beside=(rouge1, rouge_lsum),
    )


TASKS: tuple[Task, ...] = (
    _task(
        "cnn_dailymail",
        HubSource("abisee/cnn_dailymail", "3.0.0", "cnn_dailymail/3.0.0"),
        article="article",
        summary="highlights",
    ),
    _task("xsum", HubSource("EdinburghNLP/xsum", None, "xsum"), article="document", summary="summary"),
)
