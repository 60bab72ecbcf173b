"""PythonStdlib: the text of the running Python's own standard library. Files are parsed, never imported."""

import ast
import hashlib
import io
import os
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from switchcli.data.sources.document import CorpusSpec, Document, SourceShard
from switchcli.data.sources.paths import digests_of
from switchcli.errors import DataError

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
TOPICS = Path("pydoc_data/topics.py")
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class PythonStdlib(CorpusSpec):
    """Documentation topics and modules of Python's standard library, each a document, in order of name."""

    kind: Literal["python-stdlib"] = "python-stdlib"
    """`python-stdlib` reads the documentation of the installed Python: a small text that needs no network."""
    sources: bool = False
    """Whether a module's document is its complete source text. Default: only its docstrings."""

    def source_shards(self) -> tuple[SourceShard, ...]:
        """Return the single source shard: some 2.2 MB on Python 3.11, or 12 MB with `sources`."""
        return (SourceShard("python-stdlib", None),)

    def read(self, shard: SourceShard, start: int = 0, dropped: Counter[str] | None = None) -> Iterator[Document]:
        """Yield the documents. Their identity is their name, which does not depend on Python's version."""
        for row, (name, text) in enumerate(self._texts()):
            if row >= start and text.strip():
                yield Document(name, text, name, row)

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Yield the name and text of every topic and module. Builds of Python without topics have only modules."""
        root = library_root()
        yield from _topics(root / TOPICS)
        for path in module_paths(root):
            if self.sources:
                text = source_text(path)
            else:
                text = "\n\n".join(docstring for _, _, docstring in iter_docstrings(parse_source(path.read_bytes())))
            yield f"module {path.relative_to(root).as_posix()}", text

    def fingerprint(self) -> str:
        """Return Python's full version, the options, and the names and contents of the files."""
        root = library_root()
        topics = [root / TOPICS] if (root / TOPICS).exists() else []
        paths = [*topics, *module_paths(root)]
        names = [path.relative_to(root).as_posix() for path in paths]
        identity = repr((sys.version, self.sources, [*zip(names, digests_of(paths), strict=True)]))
        return f"python-stdlib {hashlib.sha256(identity.encode()).hexdigest()}"

    def empty_error(self) -> DataError:
        return DataError("data.corpora: this Python's standard library holds no text: use `kind: files`")


def library_root() -> Path:
    """Return the folder of the standard library. Raises DataError if this Python has none."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "ast.py").is_file():
        raise DataError(
            f"{root}: this Python's standard library is not in files, so the corpus python-stdlib is not available: "
            "use `kind: files`, or a Python with its library unpacked"
        )
    return root


def module_paths(root: Path) -> list[Path]:
    """Return the library's modules in order of name, without its tests and the packages installed beside it."""
    paths: list[Path] = []
    for folder, folders, files in os.walk(root):
        # os.walk descends only into the folders that are left in its list: site-packages may take seconds.
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths += (Path(folder, name) for name in files if name.endswith(".py"))
    return sorted((path for path in paths if path != root / TOPICS), key=lambda path: path.relative_to(root).parts)


def parse_source(source: bytes) -> ast.Module:
    """Return the syntax tree of a module, empty if this Python cannot parse it.

    The library holds examples of broken syntax and unknown encodings, and other texts are nested too deeply.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ast.Module(body=[], type_ignores=[])


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each documentation topic, a dictionary literal in `pydoc_data/topics.py`."""
    if not path.is_file():
        return
    for node in parse_source(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"topic {name}", text


def source_text(path: Path) -> str:
    """Return a file's text with Unix line breaks, or "" if Python does not know its encoding."""
    raw = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding).replace("\r\n", "\n")
    except (SyntaxError, UnicodeDecodeError):
        return ""


def iter_docstrings(tree: ast.Module) -> Iterator[tuple[str, Definition, str]]:
    """Yield the qualified name (the module's is ""), node and dedented docstring of each definition that has one."""

    def visit(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[str, Definition, str]]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = (*names, node.name)
        if isinstance(node, Definition) and (text := ast.get_docstring(node)):
            # A docstring may hold half a surrogate pair, which cannot be encoded.
            yield ".".join(names), node, text.encode("utf-8", "replace").decode("utf-8")
        if not isinstance(node, ast.expr):
            for child in ast.iter_child_nodes(node):
                yield from visit(child, names)

    return visit(tree, ())
