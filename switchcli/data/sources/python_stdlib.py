"""The embedded corpus: the text of the running Python's own standard library. Files are parsed, never imported."""

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

from switchcli.data.prepare.digests import Digests
from switchcli.data.sources.document import CorpusSpec, Document, SourceShard
from switchcli.errors import DataError

LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
TOPICS = Path("pydoc_data/topics.py")
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class PythonStdlib(CorpusSpec):
    """Documentation topics (a document each) and modules (a document each), in order of name."""

    kind: Literal["python-stdlib"] = "python-stdlib"
    sources: bool = False
    """A module's document is its whole source text, docstrings and all; otherwise its docstrings alone."""

    def source_shards(self) -> tuple[SourceShard, ...]:
        """One: some 2.2 MB on Python 3.11, 12 MB with sources. Builds without the topics have the modules alone."""
        return (SourceShard("python-stdlib", None),)

    def read(self, piece: SourceShard, start: int = 0, dropped: Counter[str] | None = None) -> Iterator[Document]:
        """A document's identity is its name, the same whatever the Python's version; nothing is dropped."""
        for row, (name, text) in enumerate(self._texts()):
            if row >= start and text.strip():
                yield Document(name, text, name, row)

    def _texts(self) -> Iterator[tuple[str, str]]:
        root = library_root()
        yield from _topics(root / TOPICS)
        for path in module_paths(root):
            text = source_text(path) if self.sources else _docstrings(path)
            yield f"module {path.relative_to(root).as_posix()}", text

    def fingerprint(self, digests: Digests) -> str:
        """Return Python's full version, the options, and the names and contents of the files."""
        root = library_root()
        topics = [root / TOPICS] if (root / TOPICS).exists() else []
        paths = [*topics, *module_paths(root)]
        names = [path.relative_to(root).as_posix() for path in paths]
        identity = repr((sys.version, self.sources, [*zip(names, digests.of(paths), strict=True)]))
        return f"python-stdlib {hashlib.sha256(identity.encode()).hexdigest()}"

    def legacy_fingerprint(self) -> str:
        root = library_root()
        files = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in module_paths(root)]
        identity = repr((sys.version, self.sources, (root / TOPICS).exists(), files))
        return f"python-stdlib {hashlib.sha256(identity.encode()).hexdigest()}"

    def empty_error(self) -> DataError:
        return DataError("data.corpora: this Python's standard library holds no text: use `kind: files`")


def library_root() -> Path:
    """The folder of the standard library; DataError where this Python has none."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "ast.py").is_file():
        raise DataError(
            f"{root}: this Python keeps its standard library elsewhere than in files, so the corpus python-stdlib is "
            "not there: use `kind: files`, or a Python with its library unpacked"
        )
    return root


def module_paths(root: Path) -> list[Path]:
    """The library's modules in order of name, without its tests and what was installed beside it."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]  # site-packages may take seconds to walk
        found += (Path(folder, name) for name in files if name.endswith(".py"))
    return sorted((path for path in found if path != root / TOPICS), key=lambda path: path.relative_to(root).parts)


def parse_source(source: bytes) -> ast.Module:
    """A syntax tree, empty where this Python cannot read the file (an encoding or a syntax kept as an example)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        return
    for node in parse_source(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"topic {name}", text


def source_text(path: Path) -> str:
    """A file's text with Unix line ends; empty where it is in no encoding that Python knows."""
    raw = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding).replace("\r\n", "\n")
    except (SyntaxError, UnicodeDecodeError):
        return ""


def iter_docstrings(tree: ast.Module) -> Iterator[tuple[str, Definition, str]]:
    """What has a docstring: its qualified name (the module's is empty), its node, and the docstring without indent."""

    def visit(node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[str, Definition, str]]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = (*names, node.name)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                # A docstring may spell half a surrogate pair, which is no text.
                yield ".".join(names), node, text.encode("utf-8", "replace").decode("utf-8")
        if not isinstance(node, ast.expr):
            for child in ast.iter_child_nodes(node):
                yield from visit(child, names)

    return visit(tree, ())


def _docstrings(path: Path) -> str:
    return "\n\n".join(text for _, _, text in iter_docstrings(parse_source(path.read_bytes())))
