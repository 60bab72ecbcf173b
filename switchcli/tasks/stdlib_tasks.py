"""Two tasks from the standard library of the running Python, with nothing to download (this project's own).

`python_modules`: which module is a docstring from? `python_docstrings`: sum a function up in the first line of its
docstring. Of definitions that look alike the first alone is kept, so that none is trained on and validated on too; a
tenth validates, chosen by the hash of the qualified name.
"""

import ast
import hashlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from switchcli.data.prepare.digests import Digests
from switchcli.data.sources.document import is_held_out
from switchcli.data.sources.python_stdlib import (
    PythonStdlib,
    iter_docstrings,
    library_root,
    module_paths,
    parse_source,
    source_text,
)
from switchcli.tasks.columns import answers, asked, text
from switchcli.tasks.task import EmbeddedSource, Example, Purpose, Row, Task
from switchcli.tasks.text_metrics import exact_match, rouge1, rouge2, rouge_lsum

Split = Literal["train", "validation"]
Named = tuple[str, Row]
"""A row and the qualified name of what it is made of."""
HELD_OUT = 0.1
ALIKE_WORDS = 8
"""Texts with the same first words are alike."""
MIN_WORDS = 4
"""A shorter docstring tells too little."""
MAX_SOURCE = 1_500
"""Characters; of a longer function a model would not see the end."""
MODULES = (
    *("asyncio", "collections", "configparser", "datetime", "decimal", "doctest", "email", "encodings", "enum", "http"),
    *("imaplib", "importlib", "inspect", "ipaddress", "logging", "mailbox", "multiprocessing", "pathlib", "pdb"),
    *("pydoc", "smtplib", "ssl", "statistics", "tarfile", "threading", "typing", "unittest", "urllib", "wsgiref"),
    *("xml", "xmlrpc", "zipfile"),
)
"""Those with many docstrings in each Python from 3.11 on, without what distributions leave out (tkinter). A fixed list:
models of two Pythons have the same answers, and no file is read before rows are asked for."""
_NAMES = re.compile("|".join(sorted(MODULES, key=len, reverse=True)), re.IGNORECASE)


# Which module?


def module_rows(split: Split) -> Iterator[Row]:
    """Columns `module` and `docstring`, in order of file and place."""
    return _of(split, _modules())


def _modules() -> Iterator[Named]:
    root, seen = library_root(), set[str]()
    for path in module_paths(root):
        module = _top_level(path.relative_to(root))
        if module not in MODULES:
            continue
        for name, _, docstring in iter_docstrings(parse_source(path.read_bytes())):
            if len(docstring.split()) >= MIN_WORDS and _is_new(seen, _start(without_names(docstring))):
                yield _name(root, path, name), {"module": module, "docstring": docstring}


def without_names(docstring: str) -> str:
    """The text with `_` for the name of each of MODULES, in any case and within words (`EmailMessage` is `_Message`).

    All names go, and not the right one alone: so a gap does not say that the answer stood there.
    """
    return _NAMES.sub("_", docstring)


def _top_level(path: Path) -> str:
    """`email` of `email/message.py`, `decimal` of `_pydecimal.py`."""
    return path.parts[0].removesuffix(".py").removeprefix("_py")


def _module_examples(row: Row, purpose: Purpose) -> Iterator[Example]:
    module = text(row, "module")
    if module not in MODULES:
        raise ValueError(f"module: is {module!r}, and should be one of {', '.join(MODULES)}")
    return asked(f"python_modules docstring: {without_names(text(row, 'docstring'))}", (module,), purpose)


# What does it do?


def docstring_rows(split: Split) -> Iterator[Row]:
    """Columns `source`, without the docstring and what stands before `def`, and `summary`, in order of file and place.

    Only where the docstring's first line is a whole paragraph, and where no other docstring stands in the source.
    """
    return _of(split, _functions())


def _functions() -> Iterator[Named]:
    root, seen = library_root(), set[str]()
    for path in module_paths(root):
        lines = source_text(path).replace("\r", "\n").split("\n")
        for name, node, docstring in iter_docstrings(parse_source(path.read_bytes())):
            summary, _, rest = docstring.partition("\n")
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or rest.split("\n")[0].strip():
                continue
            source, body = _without_docstring(node, lines)
            fits = body and len(source) <= MAX_SOURCE and len(summary.split()) >= MIN_WORDS and summary not in source
            if fits and _is_new(seen, _start(summary), body):
                yield _name(root, path, name), {"source": source, "summary": summary.strip()}


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str]:
    """A function's source and the part of it after the docstring; empty where that part is, or cannot be told apart."""
    docstring, *body = node.body
    end = docstring.end_lineno or docstring.lineno
    inner = any(found for inside in body for found in iter_docstrings(ast.Module([inside], [])))
    alone = not lines[docstring.lineno - 1][: docstring.col_offset].strip() and body and body[0].lineno > end
    if inner or not alone:
        return "", ""
    after = lines[end : node.end_lineno]
    source = lines[node.lineno - 1 : docstring.lineno - 1] + after
    return textwrap.dedent("\n".join(source)).strip(), textwrap.dedent("\n".join(after)).strip()


def _docstring_examples(row: Row, purpose: Purpose) -> Iterator[Example]:
    return asked(f"python_docstrings source: {text(row, 'source')}", answers([text(row, "summary")]), purpose)


# Both


def _start(sentence: str) -> str:
    """What texts that are alike have in common: their first words, without case, digits and punctuation."""
    return " ".join(re.findall("[a-z]+", sentence.lower())[:ALIKE_WORDS])


def _is_new(seen: set[str], *keys: str) -> bool:
    """Whether none of the keys was seen before; from now on all are."""
    new = seen.isdisjoint(keys)
    seen.update(keys)
    return new


def _name(root: Path, path: Path, name: str) -> str:
    return f"{path.relative_to(root).as_posix()} {name}"


def _of(split: Split, found: Iterable[Named]) -> Iterator[Row]:
    return (row for name, row in found if is_held_out(name, HELD_OUT) == (split == "validation"))


def _fingerprint(digests: Digests) -> str:
    rules = repr(
        (PythonStdlib(sources=True).fingerprint(digests), HELD_OUT, ALIKE_WORDS, MIN_WORDS, MAX_SOURCE, MODULES)
    )
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
        beside=(rouge1, rouge_lsum),
    ),
)
