"""The tasks of the standard library: on a small library made here, and on that of the running Python."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from switchcli.tasks import stdlib_tasks
from switchcli.tasks.stdlib_tasks import MODULES, TASKS, docstring_rows, module_rows, without_names
from switchcli.tasks.task import Row

Rows = dict[str, list[Row]]


def both(named: Iterable[tuple[str, Row]]) -> Rows:
    """The rows of each split, with the library read once."""
    found = list(named)
    return {split: list(stdlib_tasks._rows_of(split, found)) for split in ("train", "validation")}


@pytest.fixture(scope="module")
def modules() -> Rows:
    return both(stdlib_tasks._modules())


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stdlib_tasks, "library_root", lambda: tmp_path)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def all_rows(rows: Callable[..., Iterator[Row]]) -> list[Row]:
    return [*rows("train"), *rows("validation")]


@pytest.mark.nightly
def test_nothing_is_trained_on_and_validated_on(modules: Rows) -> None:
    def starts(rows: list[Row]) -> set[str]:
        return {" ".join(re.findall("[a-z]+", without_names(row["docstring"]).lower())[:8]) for row in rows}

    train, validation = starts(modules["train"]), starts(modules["validation"])
    assert not train & validation
    assert len(train) == len(modules["train"]), "nor is anything there twice"


@pytest.mark.nightly
def test_no_name_of_a_module_stands_in_a_text(modules: Rows) -> None:
    names = re.compile("|".join(MODULES), re.IGNORECASE)
    for split in modules.values():
        for row in split:
            [example] = TASKS[0].examples(row, "training")
            assert not names.search(example.input.removeprefix("python_modules docstring: "))
            assert example.targets[0] in TASKS[0].labels


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("EmailMessage, HTTPS and urllib.parse", "_Message, _S and _.parse"),
        ("an xmlrpc.client of XML", "an _.client of _"),
        ("Return it.", "Return it."),
    ],
)
def test_names_are_taken_out(text: str, left: str) -> None:
    assert without_names(text) == left


def test_of_alike_docstrings_the_first_is_kept(library: Path) -> None:
    write(library / "email" / "a.py", '"""What a module is for."""\ndef f():\n    "Too short this."\n')
    write(
        library / "email" / "b.py",
        '"""What, a MODULE is  for!"""\nclass A:\n    "One two three four five six seven eight"',
    )
    write(library / "http.py", '"""One two three four five six seven eight (nine)."""\n')
    write(library / "_pydecimal.py", '"""The decimal numbers of this module."""\n')
    write(library / "tkinter.py", '"""A module that is not asked for."""\n')
    assert sorted((row["module"], row["docstring"]) for row in all_rows(module_rows)) == [
        ("decimal", "The decimal numbers of this module."),
        ("email", "One two three four five six seven eight"),
        ("email", "What a module is for."),
    ]


FUNCTIONS = '''
class A:
    @property
    async def f(self, x=(1,
                         2)):
        """Return the half of x.

        Nothing else is done.
        """
        # a remark
        return x / 2

    def g(self): "This one stands on one line."; return 1

    def only(self):
        """There is nothing beside the docstring."""

    def long(self):
        """This first line goes on
        in the second one."""
        return 3

    def outer(self):
        """This holds another docstring, which is kept."""
        def inner(y):
            r"""Return what comes after y."""
            return y + 1
        return inner

    def same(self, x):
        """Another name for the very same thing."""
        # a remark
        return x / 2

    def alike(self):
        """return THE half of x"""
        return 7

    def told(self):
        """Say that it is so."""
        return "Say that it is so."

    def short(self):
        """Too short this."""
        return 5
'''


def test_a_function_and_its_summary(library: Path) -> None:
    write(library / "a.py", FUNCTIONS)
    write(library / "b.py", f"def long():\n    '''Do a great many things at once.'''\n    return {'1 + ' * 500}1\n")
    rows = {row["summary"]: row["source"] for row in all_rows(docstring_rows)}
    assert rows == {
        "Return the half of x.": "async def f(self, x=(1,\n                     2)):\n    # a remark\n    return x / 2",
        "Return what comes after y.": "def inner(y):\n    return y + 1",
    }


@pytest.mark.nightly
def test_the_functions_of_this_python() -> None:
    rows = both(stdlib_tasks._functions())
    train, validation = rows["train"], rows["validation"]
    assert 2_000 <= len(train) <= 10_000
    assert 0.08 <= len(validation) / (len(train) + len(validation)) <= 0.12
    for column in ("source", "summary"):
        assert not {row[column] for row in train} & {row[column] for row in validation}
    for row in validation:
        [function] = ast.parse(row["source"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert row["summary"] not in row["source"]


@pytest.mark.integration
def test_naming_the_tasks_is_fast() -> None:
    """No metric library is imported, and no file of the library is read, before the first answer or row."""
    names = "stdlib_tasks, question_answering, summarization_translation, scores, suites"
    script = f"import sys\nfrom switchcli.tasks import {names}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"sacrebleu", "rouge_score", "nltk", "torch", "datasets", "tokenizers"} & set(done.stdout.split())
