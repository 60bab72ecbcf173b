"""Filters: what goes, what stays, and the count of it."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import naming_words

from switchcli.data.prepare.filters import SHORT_LINE, Filters
from switchcli.data.sources.document import Document


def filtered(filters: Filters, *texts: str) -> tuple[list[Document], Counter[str]]:
    dropped = Counter[str]()
    return list(filters((Document("n", text, text, 0) for text in texts), dropped)), dropped


def test_without_a_key_nothing_changes() -> None:
    found, dropped = filtered(Filters(), "a", "a line that stands twice\n" * 2)
    assert [one.text for one in found] == ["a", "a line that stands twice\n" * 2]
    assert not dropped


def test_lengths_in_characters() -> None:
    found, dropped = filtered(Filters(min_characters=3, max_characters=5), "ab", "abc", "äöüßé", "abcdef", "")
    assert [one.text for one in found] == ["abc", "äöüßé"]
    assert dropped == {"shorter than min_characters": 2, "longer than max_characters": 1}


def test_repeated_lines_go_before_lengths_are_counted() -> None:
    line = "This line stands here again and again."
    text = f"{line}\n\n  {line}\t\nOther words, of their own.\n\n}}\n}}\n{line}"
    found, dropped = filtered(Filters(repeated_lines="drop", max_characters=80), text)
    assert [one.text for one in found] == [f"{line}\n\nOther words, of their own.\n\n}}\n}}"]
    assert dropped == {"lines that repeat one of their document": 2}
    assert not filtered(Filters(repeated_lines="drop", min_characters=80), text)[0]


def test_what_is_held_out_goes_by_the_text_that_is_left() -> None:
    line = "This line stands here again and again."
    filters = Filters(repeated_lines="drop")
    assert [one.identity for one in filtered(filters, f"{line}\n{line}", line)[0]] == [line, line]
    (named,) = filters([Document("n", f"{line}\n{line}", "n", 5)], Counter())
    assert named == Document("n", line, "n", 5)


@given(lines=st.lists(st.text("ab ", max_size=SHORT_LINE + 3), max_size=8))
def test_the_first_of_each_line_stays_in_order(lines: list[str]) -> None:
    expected = [
        line
        for index, line in enumerate(lines)
        if len(line.strip()) < SHORT_LINE or line.strip() not in [other.strip() for other in lines[:index]]
    ]
    found, dropped = filtered(Filters(repeated_lines="drop"), "\n".join(lines))
    assert [one.text for one in found] == ["\n".join(expected)]
    assert dropped.total() == len(lines) - len(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_characters": 5, "max_characters": 4}, "min_characters 5 max_characters 4"),
        ({"min_characters": 0}, "min_characters 1 1"),  # one error, and the least length
    ],
)
def test_lengths_that_no_document_has(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=naming_words(words)):
        Filters.model_validate(options)
