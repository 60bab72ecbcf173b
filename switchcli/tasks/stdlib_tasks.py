"""Two tasks from the standard library of the running Python, with nothing to download (this project's own).

`python_modules` asks which module a docstring is from. `python_docstrings` asks for the first line of a function's
docstring. Of similar definitions only the first is kept, so that none is in both splits. A tenth of the rows validates,
chosen by the hash of the qualified name.
"""

import ast
import hashlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal

from switchcli.data.sources.document import is_held_out
from switchcli.data.sources.python_stdlib import (
    PythonStdlib,
    iter_docstrings,
    library_root,
    module_paths,
    parse_source,
    source_text,
)
from switchcli.tasks.columns import answers, question_example, text
from switchcli.tasks.task import EmbeddedSource, Example, Purpose, Row, Task
from switchcli.tasks.text_metrics import exact_match, rouge1, rouge2, rouge_lsum

Split = Literal["train", "validation"]
NamedRow = tuple[str, Row]
"""The qualified name of a definition, and the row that is made from it."""
HELD_OUT: Final = 0.1
SIMILAR_WORDS: Final = 8
"""Texts whose first words are equal, up to this number, count as similar."""
MIN_WORDS: Final = 4
"""Shorter docstrings say too little."""
MAX_SOURCE: Final = 1_500
"""Maximum length of a function's source, in characters, so that it fits into a row of inputs."""
MODULES: Final = (
    *("asyncio", "collections", "configparser", "datetime", "decimal", "doctest", "email", "encodings", "enum", "http"),
    *("imaplib", "importlib", "inspect", "ipaddress", "logging", "mailbox", "multiprocessing", "pathlib", "pdb"),
    *("pydoc", "smtplib", "ssl", "statistics", "tarfile", "threading", "typing", "unittest", "urllib", "wsgiref"),
    *("xml", "xmlrpc", "zipfile"),
)
"""Modules that have many docstrings in every Python from 3.11 on, without those that distributions leave out (tkinter).

The list is fixed, so that models from two versions of Python have the same labels, and so that no file is read before
rows are needed."""
_NAMES: Final = re.compile("|".join(sorted(MODULES, key=len, reverse=True)), re.IGNORECASE)


# python_modules


def module_rows(split: Split) -> Iterator[Row]:
    """Yield rows with the columns `module` and `docstring`, in order of file and position."""
    return _rows_of(split, _modules())


def _modules() -> Iterator[NamedRow]:
    root, seen = library_root(), set[str]()
    for path in module_paths(root):
        module = _top_level(path.relative_to(root))
        if module not in MODULES:
            continue
        for name, _, docstring in iter_docstrings(parse_source(path.read_bytes())):
            if len(docstring.split()) >= MIN_WORDS and _is_new(seen, _first_words(without_names(docstring))):
                yield _qualified_name(root, path, name), {"module": module, "docstring": docstring}


def without_names(docstring: str) -> str:
    """Return the text with `_` in place of the name of each of MODULES.

    Names are replaced in any case and inside words (`EmailMessage` becomes `_Message`). All names are replaced, not
    only the right one, so that a gap does not show where the answer was.
    """
    return _NAMES.sub("_", docstring)


def _top_level(path: Path) -> str:
    """Return the module's name: `email` for `email/message.py`, `decimal` for `_pydecimal.py`."""
    return path.parts[0].removesuffix(".py").removeprefix("_py")


def _module_examples(row: Row, purpose: Purpose) -> Iterator[Example]:
    module = text(row, "module")
    if module not in MODULES:
        raise ValueError(f"module: is {module!r}, and should be one of {', '.join(MODULES)}")
    return question_example(f"python_modules docstring: {without_names(text(row, 'docstring'))}", (module,), purpose)


# python_docstrings


def docstring_rows(split: Split) -> Iterator[Row]:
    """Yield rows with the columns `source` and `summary`, in order of file and position.

    `source` is a function without its docstring and decorators. Functions are skipped if the docstring's first line is
    not a paragraph of its own, or if the source contains another docstring.
    """
    return _rows_of(split, _functions())


def _functions() -> Iterator[NamedRow]:
    root, seen = library_root(), set[str]()
    for path in module_paths(root):
        lines = source_text(path).replace("\r", "\n").split("\n")
        for name, node, docstring in iter_docstrings(parse_source(path.read_bytes())):
            summary, _, rest = docstring.partition("\n")
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or rest.split("\n")[0].strip():
                continue
            source, body = _without_docstring(node, lines)
            fits = body and len(source) <= MAX_SOURCE and len(summary.split()) >= MIN_WORDS and summary not in source
            if fits and _is_new(seen, _first_words(summary), body):
                yield _qualified_name(root, path, name), {"source": source, "summary": summary.strip()}


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str]:
    """Return a function's source without its docstring, and the part of it after the docstring.

    Both are empty if nothing comes after the docstring, if the docstring shares a line with other code, or if the rest
    contains a docstring.
    """
    docstring, *body = node.body
    end = docstring.end_lineno or docstring.lineno
    has_inner_docstring = any(True for statement in body for _ in iter_docstrings(ast.Module([statement], [])))
    # Line numbers of the syntax tree start at 1, indices of `lines` at 0.
    starts_line = not lines[docstring.lineno - 1][: docstring.col_offset].strip()
    ends_line = body and body[0].lineno > end
    if has_inner_docstring or not starts_line or not ends_line:
        return "", ""
    after = lines[end : node.end_lineno]
    source = lines[node.lineno - 1 : docstring.lineno - 1] + after
    return textwrap.dedent("\n".join(source)).strip(), textwrap.dedent("\n".join(after)).strip()


def _docstring_examples(row: Row, purpose: Purpose) -> Iterator[Example]:
    return question_example(
        f"python_docstrings source: {text(row, 'source')}", answers([text(row, "summary")]), purpose
    )


# Both tasks


def _first_words(sentence: str) -> str:
    """Return the first SIMILAR_WORDS words in lower case, without digits and punctuation."""
    return " ".join(re.findall("[a-z]+", sentence.lower())[:SIMILAR_WORDS])


def _is_new(seen: set[str], *keys: str) -> bool:
    """Return whether no key was seen before, and add all of them to `seen`."""
    is_new = seen.isdisjoint(keys)
    seen.update(keys)
    return is_new


def _qualified_name(root: Path, path: Path, name: str) -> str:
    return f"{path.relative_to(root).as_posix()} {name}"


def _rows_of(split: Split, named_rows: Iterable[NamedRow]) -> Iterator[Row]:
    return (row for name, row in named_rows if is_held_out(name, HELD_OUT) == (split == "validation"))


def _fingerprint() -> str:
    rules = repr((PythonStdlib(sources=True).fingerprint(), HELD_OUT, SIMILAR_WORDS, MIN_WORDS, MAX_SOURCE, MODULES))
    return f"python-stdlib tasks {hashlib.sha256(rules.encode()).hexdigest()}"


TASKS: tuple[Task, ...] = (
    Task(
        name="python_modules",
        source=EmbeddedSource(module_rows, _fingerprint),
        columns=("module", "docstring"),
        examples=_module_examples,
        metrics=(exact_match,),
        chance=100 / len(MODULES),
        labels=MODULES,
    ),
    Task(
        name="python_docstrings",
        source=EmbeddedSource(docstring_rows, _fingerprint),
        columns=("source", "summary"),
        examples=_docstring_examples,
        metrics=(rouge2,),
        chance=0.0,
        secondary_metrics=(rouge1, rouge_lsum),
    ),
)
