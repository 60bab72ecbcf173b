"""The rules of CONTRIBUTING.md for the package: what may import what, and what is banned.

Import-linter and ruff check what they can (pyproject.toml). A rule of our own is a function from a module to its
faults. Its docstring says the rule and why, and `SLIPS` proves that it can fail.
Rules for the whole tree, whatever the language of a file, are in test_tree.py.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


PACKAGES = {
    "__init__": "",
    "__main__": "",
    "cli": "typer",
    "commands": "pydantic typer",
    "api": "torch pydantic",
    "plan": "",
    "sweep": "",
    "runs": "torch pydantic",
    "recipe": "yaml pydantic pydantic_core",
    "doctor": "torch",
    "analysis": "torch",
    "training": "torch safetensors pydantic",
    "convert": "torch safetensors pydantic",
    "checkpoint": "torch safetensors pydantic",
    "planner": "torch pydantic",
    "tasks": "numpy pydantic",
    "distributed": "torch accelerate pydantic",
    "model": "torch pydantic",
    "data": "numpy tokenizers pydantic",
    "report": "numpy vl_convert",
    "terminal": "rich",
    "errors": "",
    "metric_names": "",
    "spec": "pydantic",
    "system": "",
}
"""The packages of others that each package of ours may import, besides the standard library."""
PACKAGES_OF_ONE_FILE = {
    "switchcli/data/batch.py": "torch",
    "switchcli/data/task_batches.py": "torch",
    "switchcli/data/text_batches.py": "torch",
    "switchcli/data/sources/corpus.py": "datasets huggingface_hub",
    "switchcli/data/sources/parquet.py": "pyarrow",
    "switchcli/data/sources/paths.py": "fsspec pyarrow",
    "switchcli/data/sources/io_errors.py": "huggingface_hub",
    "switchcli/data/tokenizer/sentencepiece.py": "transformers",
    "switchcli/data/tokenizer/tokenizer.py": "huggingface_hub",
    "switchcli/convert/hub.py": "huggingface_hub",
    "switchcli/distributed/launch.py": "psutil",
    "switchcli/runs/models/model_card.py": "huggingface_hub",
    "switchcli/tasks/text_metrics.py": "sacrebleu",
    "switchcli/training/trackers.py": "accelerate wandb",
}
READ_BY_PATH = {
    "switchcli/checkpoint/tensor_file.py": "of a descriptor",
    "switchcli/commands/_options.py": "a pipe of the user's shell",
    "switchcli/commands/recipes.py": "of the package",
    "switchcli/data/prepare/pipeline.py": "of the cache",
    "switchcli/data/prepare/shards.py": "of the cache",
    "switchcli/data/prepare/store.py": "of the cache",
    "switchcli/data/sources/python_stdlib.py": "of Python",
    "switchcli/system/processor.py": "of the system",
    "switchcli/recipe/library.py": "of the package",
    "switchcli/report/html_page.py": "of the package",
    "switchcli/tasks/stdlib_tasks.py": "of Python",
}
"""The files that read others by their paths, and whose files these are: no stranger made them."""


class Module(NamedTuple):
    path: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        return Path(self.path).parts[1].removesuffix(".py")


Fault = tuple[int, str]
Rule = Callable[[Module], Iterator[Fault]]


def module(path: str, text: str) -> Module:
    return Module(path, text, ast.parse(text))


@cache
def modules() -> list[Module]:
    paths = sorted((ROOT / "switchcli").rglob("*.py"))
    return [module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes; what is not a name is left empty: `f().item` is `.item`."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def imports(tree: ast.AST) -> Iterator[Fault]:
    """Each imported name in full, late imports within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def mentions(tree: ast.AST) -> Iterator[Fault]:
    """Imports, and the names and attributes that the code uses."""
    yield from imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            yield node.lineno, dotted(node)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


# Who imports whom


def packages_of_others_stay_where_they_are_listed(module: Module) -> Iterator[Fault]:
    """A third-party package is imported only where PACKAGES names it: replacing one touches one package of ours."""
    allowed = {"switchcli", *sys.stdlib_module_names, *PACKAGES[module.package].split()}
    allowed |= {*PACKAGES_OF_ONE_FILE.get(module.path, "").split()}
    for line, name in imports(module.tree):
        if name.split(".")[0] not in allowed:
            yield line, f"{module.path} imports {name}"


def ranks_are_known_in_distributed_alone(module: Module) -> Iterator[Fault]:
    """Only the package distributed uses torch.distributed: no other code depends on how many ranks there are."""
    if module.package != "distributed":
        yield from ((line, name) for line, name in mentions(module.tree) if within(name, {"torch.distributed"}))


def the_model_knows_no_machine(module: Module) -> Iterator[Fault]:
    """The model is plain PyTorch: no files, environment, logging, device names, and no wait for the device."""
    if module.package != "model":
        return
    for line, name in mentions(module.tree):
        outside = within(name, {"os", "pathlib", "io", "logging", "tempfile", "shutil", "socket", "subprocess", "open"})
        if outside or name.endswith((".item", ".tolist", ".numpy", ".cpu", ".cuda")):
            yield line, name
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and re.fullmatch(r"(cuda|cpu|mps|xpu)(:\d+)?", str(node.value)):
            yield node.lineno, f"the device {node.value!r}"


# Bans


SAFE = {"allow_pickle": False, "trust_remote_code": False, "weights_only": True}
"""Keywords that decide whether another package runs what it reads, and their one value here."""


def nothing_runs_what_it_reads(module: Module) -> Iterator[Fault]:
    """No keyword lets another package run what it reads. Ruff bans the calls that always do (pyproject.toml)."""
    for call in calls(module.tree):
        words = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        yield from ((call.lineno, f"{word}=") for word, safe in SAFE.items() if words.get(word, safe) is not safe)
        name = dotted(call.func)
        if name.endswith(".load_state") or (name == "torch.load" and "weights_only" not in words):
            yield call.lineno, name


def files_from_outside_are_opened_by_user_files(module: Module) -> Iterator[Fault]:
    """A pipe or a device of a stranger would be waited for: `open_regular` and `read_regular` refuse them."""
    if module.path not in READ_BY_PATH:
        for call in calls(module.tree):
            name = dotted(call.func)
            modes = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "mode")]
            reads = any(isinstance(mode, ast.Constant) and str(mode.value).startswith("r") for mode in modes)
            whole = name.endswith(".read_text") or (name.endswith(".read_bytes") and not call.args)
            if whole or (name.endswith(".open") and reads) or name == "safe_open":
                yield call.lineno, f"{name}: take switchcli.system.user_files"


def types_are_known(module: Module) -> Iterator[Fault]:
    """No hasattr: a value has a type."""
    yield from ((call.lineno, "hasattr()") for call in calls(module.tree) if dotted(call.func) == "hasattr")


def arguments_have_names(module: Module) -> Iterator[Fault]:
    """A public function passes no **kwargs on: its signature says what it takes, and refuses a misspelt name."""
    owners = [module.tree, *(node for node in module.tree.body if isinstance(node, ast.ClassDef))]
    for function in (node for owner in owners for node in owner.body):
        if not isinstance(function, ast.FunctionDef) or not function.args.kwarg or function.name.startswith("_"):
            continue
        passed = {dotted(word.value) for call in calls(function) for word in call.keywords if word.arg is None}
        if function.args.kwarg.arg in passed:
            yield function.lineno, f"{function.name} passes **{function.args.kwarg.arg} on"


def text_is_no_markup(module: Module) -> Iterator[Fault]:
    """No rich markup: text from data may hold [/x]. Take rich.text.Text with a style, and report.safe_text."""
    tag = re.compile(r"\[/[a-z ]*\]|\[(bold|dim|italic|underline|link|red|green|yellow|blue|magenta|cyan)\b[^\]]*\]")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.JoinedStr):
            parts = (str(part.value) for part in node.values if isinstance(part, ast.Constant))
            if any(tag.search(part) for part in parts):
                yield node.lineno, "markup in an f-string"
        elif isinstance(node, ast.Attribute) and node.attr == "from_markup":
            yield node.lineno, "from_markup"
        elif isinstance(node, ast.keyword) and node.arg == "markup" and getattr(node.value, "value", None) is not False:
            yield node.lineno, "markup="


ROUTER = "switchcli/model/moe/router.py"


@cache
def routers() -> tuple[set[str], set[str]]:
    """The classes of the router's file that are specs, and their kinds."""
    text = (ROOT / ROUTER).read_text(encoding="utf-8")
    classes, kinds = {"Router"}, set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and classes & {dotted(base) for base in node.bases}:
            classes.add(node.name)
            kinds |= {
                part.value.value
                for part in node.body
                if isinstance(part, ast.AnnAssign)
                and dotted(part.target) == "kind"
                and isinstance(part.value, ast.Constant)
            }
    return classes, kinds


def routers_describe_themselves(module: Module) -> Iterator[Fault]:
    """No code outside the router's file checks its kind: a new router then has the right FLOPs, plan and upcycling."""
    if module.path == ROUTER:
        return
    classes, kinds = routers()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(dotted(side).endswith(".kind") for side in sides) and kinds & {
                constant.value for side in sides for constant in ast.walk(side) if isinstance(constant, ast.Constant)
            }:
                yield node.lineno, "compares the kind of a router"
        elif isinstance(node, ast.Call) and dotted(node.func) == "isinstance":
            found = classes & {dotted(name) for name in ast.walk(node.args[1])}
            if found:
                yield node.lineno, f"asks whether a router is {', '.join(sorted(found))}"


# Each rule with snippets that break it, and with one that nearly does

MODEL, DATA, TRAIN, CLI = (f"switchcli/{name}.py" for name in ("model/a", "data/a", "training/a", "cli"))
SLIPS: dict[Rule, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    packages_of_others_stay_where_they_are_listed: (
        [
            (TRAIN, "import accelerate"),
            (TRAIN, "def late():\n    from accelerate.utils import set_seed"),
            (DATA, "import torch.nn"),
            (CLI, "import torch"),
            ("switchcli/doctor/probes.py", "def late():\n    import transformers"),
        ],
        [("switchcli/data/text_batches.py", "import torch, numpy.random, os.path"), (TRAIN, "from torch import nn")],
    ),
    ranks_are_known_in_distributed_alone: (
        [
            (TRAIN, "import torch.distributed as dist"),
            (MODEL, "import torch\nrank = torch.distributed.get_rank()"),
        ],
        [("switchcli/distributed/a.py", "import torch.distributed"), (TRAIN, "import torch.distributions")],
    ),
    the_model_knows_no_machine: (
        [
            (MODEL, "import os\nhome = os.environ['HOME']"),
            (MODEL, "text = open('a').read()"),
            (MODEL, "def f(x):\n    return x.sum().item()"),
            (MODEL, "x = torch.zeros(1, device='cuda:0')"),
        ],
        [(MODEL, "x = torch.zeros(1, device=y.device)"), (TRAIN, "x.item()")],
    ),
    nothing_runs_what_it_reads: (
        [
            (TRAIN, "torch.load(path)"),
            (TRAIN, "torch.load(path, weights_only=choice)"),
            (TRAIN, "accelerator.load_state(path)"),
            (DATA, "np.load(path, allow_pickle=True)"),
            (DATA, "load_dataset(path, trust_remote_code=choice)"),
        ],
        [(TRAIN, "torch.load(path, weights_only=True)\nnp.load(x, allow_pickle=False)\nmodel.load_state_dict(x)")],
    ),
    files_from_outside_are_opened_by_user_files: (
        [
            (DATA, "path.read_text()"),
            (DATA, "path.open('rb')"),
            (TRAIN, "safe_open(path, framework='pt')"),
        ],
        [
            (DATA, "open_regular(path)\nread_regular(path, 9)\npath.open('wb')\nshard.open()"),
            ("switchcli/system/processor.py", "path.read_text()"),
        ],
    ),
    types_are_known: ([(DATA, "hasattr(x, 'y')")], [(DATA, "getattr(x, 'y')")]),
    arguments_have_names: (
        [
            (DATA, "def f(**kwargs):\n  return g(**kwargs)"),
            (DATA, "class A:\n  def f(self, **rest):\n    return g(1, **rest)"),
        ],
        [(DATA, "def f(**names):\n  return names\ndef g(options):\n  return f(**options)")],
    ),
    text_is_no_markup: (
        [
            (DATA, "f'[bold]{x}[/bold]'"),
            (DATA, "Text.from_markup(x)"),
            (DATA, "Console(markup=True)"),
        ],
        [(DATA, "f'{x}[E, D] [{y}] [0/1]'"), (DATA, "Console(markup=False)")],
    ),
    routers_describe_themselves: (
        [
            (MODEL, "router.k if router.kind == 'top_k' else 1"),
            (MODEL, "if spec.router_of(stack).kind in ('switch', 'top_k'): pass"),
            (DATA, "isinstance(layer.router_spec, TokenChoiceRouter | ExpertChoiceRouter)"),
        ],
        [
            (ROUTER, "router.kind == 'top_k'"),
            (MODEL, "corpus.kind == 'files'\nrouter.experts_per_token\nisinstance(x, Batch)"),
        ],
    ),
}


@pytest.mark.parametrize("rule", SLIPS, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Rule) -> None:
    faults = [f"  {module.path}:{line}: {fault}" for module in modules() for line, fault in rule(module)]
    assert not faults, "\n".join([rule.__doc__ or "", *faults])


@pytest.mark.parametrize("rule", SLIPS, ids=lambda rule: rule.__name__)
def test_can_fail(rule: Rule) -> None:
    breaks, keeps = SLIPS[rule]
    for path, text in breaks:
        assert list(rule(module(path, text))), f"not found: {text}"
    for path, text in keeps:
        assert not list(rule(module(path, text))), f"found wrongly: {text}"


def test_imports_go_down() -> None:
    script = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache', '--no-logo'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_folder_is_a_package_that_is_listed() -> None:
    for folder in {(ROOT / module.path).parent for module in modules()}:
        assert (folder / "__init__.py").exists(), f"{folder.name} has no __init__.py: it would be left out of the wheel"
    assert {module.package for module in modules()} == PACKAGES.keys(), "a new package: give it a row in PACKAGES"


def test_no_two_files_have_one_name() -> None:
    """But for configurations, and verbs whose engine has the verb's name."""
    verbs, engines = Counter[str](), Counter[str]()
    for module in modules():
        name = Path(module.path).name
        if name not in ("__init__.py", "config.py"):
            (verbs if module.package == "commands" else engines)[name] += 1
    assert [name for name, count in engines.items() if count > 1] == []
    assert sorted(verbs.keys() & engines.keys()) == ["prune.py", "upcycle.py"]
