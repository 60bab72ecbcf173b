"""The rules of CONTRIBUTING.md for the package: what may import what, and what is banned.

Import-linter and ruff check what they can (pyproject.toml); tests here show that they find it. A rule of our own is a
function from a module to its faults. Its docstring says the rule and why, and `SLIPS` proves that it can fail.
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
from shutil import copytree, ignore_patterns
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


PACKAGES = {
    "__init__": "",
    "__main__": "",
    "cli": "typer",
    "commands": "pydantic typer",
    "api": "torch pydantic",
    "runs": "torch pydantic",
    "recipe": "yaml pydantic pydantic_core",
    "doctor": "torch safetensors",
    "training": "torch safetensors pydantic",
    "convert": "torch safetensors pydantic",
    "checkpoint": "torch safetensors pydantic",
    "planner": "torch pydantic",
    "tasks": "numpy pydantic",
    "distributed": "torch accelerate pydantic",
    "model": "torch pydantic",
    "data": "numpy tokenizers pydantic",
    "report": "rich tensorboard wandb numpy vl_convert",
    "credentials": "",
    "errors": "",
    "metric_names": "",
    "processor": "",
    "publish": "",
    "spec": "pydantic",
    "startup": "",
    "user_files": "",
}
"""The packages of others that each package of ours may import, besides the standard library."""
PACKAGES_OF_ONE_FILE = {
    "switchcli/data/batch.py": "torch",
    "switchcli/data/task_batches.py": "torch",
    "switchcli/data/text_batches.py": "torch",
    "switchcli/data/prepare/store.py": "pyarrow",
    "switchcli/data/sources/corpus.py": "datasets huggingface_hub",
    "switchcli/data/sources/parquet.py": "pyarrow",
    "switchcli/data/sources/paths.py": "fsspec pyarrow",
    "switchcli/data/sources/io_errors.py": "huggingface_hub",
    "switchcli/data/tokenizer/sentencepiece.py": "google sentencepiece",
    "switchcli/data/tokenizer/tokenizer.py": "huggingface_hub",
    "switchcli/convert/ctranslate2_spec.py": "ctranslate2",
    "switchcli/convert/hub.py": "huggingface_hub",
    "switchcli/distributed/launch.py": "psutil",
    "switchcli/distributed/trackers.py": "wandb",
    "switchcli/doctor/transformers_subject.py": "transformers huggingface_hub",
    "switchcli/tasks/text_metrics.py": "sacrebleu",
}
READ_BY_PATH = {
    "switchcli/checkpoint/tensor_file.py": "of a descriptor",
    "switchcli/commands/_options.py": "a pipe of the user's shell",
    "switchcli/commands/recipes.py": "of the package",
    "switchcli/data/prepare/digests.py": "of the cache",
    "switchcli/data/prepare/pipeline.py": "of the cache",
    "switchcli/data/prepare/shards.py": "of the cache",
    "switchcli/data/prepare/store.py": "of the cache",
    "switchcli/data/prepare/verified.py": "of the cache",
    "switchcli/data/sources/python_stdlib.py": "of Python",
    "switchcli/distributed/launch.py": "of the launcher itself",
    "switchcli/processor.py": "of the system",
    "switchcli/recipe/key_index.py": "of the package",
    "switchcli/recipe/library.py": "of the package",
    "switchcli/report/html_page.py": "of the package",
    "switchcli/runs/accelerate_settings.py": "of the system",
    "switchcli/tasks/stdlib_tasks.py": "of Python",
}
"""The files that read others by their paths, and whose files these are: no stranger made them."""
READS_PICKLES = "switchcli/convert/weight_files.py"
FINDS_MODULES = {"switchcli/tasks/registry.py": "switchcli.tasks.", "switchcli/cli.py": "switchcli.commands."}
"""The files that import modules by their names, and the package that these modules are in."""


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


def nothing_runs_what_it_reads(module: Module) -> Iterator[Fault]:
    """No pickle and nothing that uses it, no eval, no shell: a checkpoint, a recipe or a text can then run no code.

    One file reads PyTorch's pickles when the user asks for it, as tensors alone: by the one call permitted there. Two
    files import modules by their names, to find the tasks and the verbs: those of one package of ours alone.
    """
    pickles = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.load", "torch.save"}
    pickles |= {"torch.distributed.checkpoint", "accelerate.load_checkpoint_and_dispatch"}
    code = {"importlib.import_module", "pkgutil.resolve_name", "runpy", "os.system", "os.popen"}
    yaml = {"yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.load_all"}
    tree = module.tree
    if module.path == READS_PICKLES:
        tree = ast.parse(module.text)
        for call in filter(_reads_tensors_alone, calls(tree)):
            call.func = ast.Name("read_tensors_alone", lineno=call.lineno)
    if module.path in FINDS_MODULES:
        tree = ast.parse(module.text)
        for call in calls(tree):
            if _imports_from(FINDS_MODULES[module.path], call):
                call.func = ast.Name("import_from_our_package", lineno=call.lineno)
    for line, name in mentions(tree):
        if within(name, pickles | code | yaml) or name.endswith((".load_state", ".save_state")):
            yield line, name
    for call in calls(module.tree):
        if dotted(call.func) in ("eval", "exec", "compile", "__import__"):
            yield call.lineno, dotted(call.func)
        for keyword in call.keywords:
            harmless = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("allow_pickle", "shell", "trust_remote_code") and not harmless:
                yield call.lineno, f"{keyword.arg}= may only be False"


def _reads_tensors_alone(call: ast.Call) -> bool:
    """`torch.load(..., weights_only=True)`, with the literal, and nothing passed on that could say otherwise."""
    words = {word.arg: word.value for word in call.keywords}
    alone = words.get("weights_only")
    literal = isinstance(alone, ast.Constant) and alone.value is True and len(call.args) == 1
    return dotted(call.func) == "torch.load" and literal and None not in words and "pickle_module" not in words


def _imports_from(package: str, call: ast.Call) -> bool:
    """`importlib.import_module(f"PACKAGE.{name}")`: whatever the name, it is a module of that package."""
    parts = call.args[0].values if len(call.args) == 1 and isinstance(call.args[0], ast.JoinedStr) else []
    literal = isinstance(parts[0], ast.Constant) and parts[0].value == package if parts else False
    return dotted(call.func) == "importlib.import_module" and literal and not call.keywords


def files_from_outside_are_opened_by_user_files(module: Module) -> Iterator[Fault]:
    """A pipe or a device of a stranger would be waited for: `open_regular` and `read_regular` refuse them."""
    if module.path not in READ_BY_PATH:
        for call in calls(module.tree):
            name = dotted(call.func)
            modes = [*call.args[:1], *(word.value for word in call.keywords if word.arg == "mode")]
            reads = any(isinstance(mode, ast.Constant) and str(mode.value).startswith("r") for mode in modes)
            whole = name.endswith(".read_text") or (name.endswith(".read_bytes") and not call.args)
            if whole or (name.endswith(".open") and reads) or name == "safe_open":
                yield call.lineno, f"{name}: take switchcli.user_files"


def yaml_is_read_safely(module: Module) -> Iterator[Fault]:
    """yaml.load takes a SafeLoader or a class made from one: the others build any Python object."""
    classes = [node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    safe = {node.name for node in classes if any(dotted(base).endswith("SafeLoader") for base in node.bases)}
    for call in calls(module.tree):
        if dotted(call.func) == "yaml.load":
            loaders = [dotted(keyword.value) for keyword in call.keywords if keyword.arg == "Loader"]
            loaders += [dotted(argument) for argument in call.args[1:2]]
            if not any(name in safe or name.endswith("SafeLoader") for name in loaders):
                yield call.lineno, "yaml.load without a SafeLoader"


def errors_are_caught_by_name(module: Module) -> Iterator[Fault]:
    """No bare except, no `except Exception`: name the error that is meant. What raises again hides nothing, and may."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in kinds)
            again = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
            if broad and not again:
                yield node.lineno, "a broad except"


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
A_TASK = "import_module(f'switchcli.tasks.{name}')"
A_VERB = "import_module(f'switchcli.commands.{name}')"
SAFELY = "torch.load(path, map_location='cpu', weights_only=True)"
SLIPS: dict[Rule, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    packages_of_others_stay_where_they_are_listed: (
        [
            (TRAIN, "import accelerate"),
            (TRAIN, "def late():\n    from accelerate.utils import set_seed"),
            (TRAIN, "import yaml"),
            (TRAIN, "import typer"),
            (DATA, "import torch.nn"),
            (DATA, "from datasets import load_dataset"),
            (CLI, "import torch"),
            ("switchcli/report/a.py", "import torch"),
            ("switchcli/commands/a.py", "import accelerate"),
            ("switchcli/doctor/probes.py", "def late():\n    import transformers"),
        ],
        [("switchcli/data/text_batches.py", "import torch, numpy.random, os.path"), (TRAIN, "from torch import nn")],
    ),
    ranks_are_known_in_distributed_alone: (
        [
            (TRAIN, "import torch.distributed as dist"),
            (MODEL, "from torch import distributed"),
            (MODEL, "import torch\nrank = torch.distributed.get_rank()"),
        ],
        [("switchcli/distributed/a.py", "import torch.distributed"), (TRAIN, "import torch.distributions")],
    ),
    the_model_knows_no_machine: (
        [
            (MODEL, "import os\nhome = os.environ['HOME']"),
            (MODEL, "from pathlib import Path"),
            (MODEL, "import logging"),
            (MODEL, "text = open('a').read()"),
            (MODEL, "def f(x):\n    return x.sum().item()"),
            (MODEL, "x = torch.zeros(1, device='cuda:0')"),
        ],
        [(MODEL, "x = torch.zeros(1, device=y.device)"), (TRAIN, "x.item()")],
    ),
    nothing_runs_what_it_reads: (
        [
            (TRAIN, "import pickle"),
            (TRAIN, "from torch import load"),
            (TRAIN, SAFELY),
            ("switchcli/convert/a.py", SAFELY),
            (READS_PICKLES, "import pickle"),
            (READS_PICKLES, "torch.load(path)"),
            (READS_PICKLES, "torch.load(path, weights_only=False)"),
            (READS_PICKLES, "torch.load(path, weights_only=choice)"),
            (READS_PICKLES, "torch.load(path, weights_only=True, **rest)"),
            (READS_PICKLES, "torch.load(path, weights_only=True, pickle_module=mine)"),
            (READS_PICKLES, "torch.load(path, None, mine, weights_only=True)"),
            (READS_PICKLES, "torch.load(torch.load(path), weights_only=True)"),
            (READS_PICKLES, f"{SAFELY}; torch.load(path)"),
            (READS_PICKLES, "read = torch.load"),
            (READS_PICKLES, "from torch import load"),
            (READS_PICKLES, "torch.save(model, path)"),
            (TRAIN, "torch.save(model, path)"),
            (TRAIN, "import torch.distributed.checkpoint as dcp"),
            (TRAIN, "accelerator.load_state(path)"),
            (DATA, "np.load(path, allow_pickle=True)"),
            (DATA, "np.load(path, allow_pickle=choice)"),
            (DATA, "load_dataset(path, trust_remote_code=True)"),
            (DATA, "eval(text)"),
            (DATA, "import importlib\nimportlib.import_module(name)"),
            (DATA, f"importlib.{A_TASK}"),
            (DATA, "from importlib import import_module"),
            (DATA, f"importlib.{A_VERB}"),
            (CLI, f"importlib.{A_TASK}"),
            (CLI, "importlib.import_module(name)"),
            (CLI, "importlib.import_module(f'{name}.commands.')"),
            (CLI, "importlib.import_module(f'.{name}', package)"),
            (CLI, "from importlib import import_module"),
            (CLI, "load = importlib.import_module"),
            (CLI, "pkgutil.resolve_name(name)"),
            ("switchcli/tasks/registry.py", "importlib.import_module(name)"),
            ("switchcli/tasks/registry.py", f"importlib.{A_VERB}"),
            (DATA, "subprocess.run(line, shell=True)"),
            (DATA, "yaml.unsafe_load(text)"),
        ],
        [
            (
                TRAIN,
                "model.eval()\neval: int = 1\nre.compile(x)\nnp.load(x, allow_pickle=False)\nmodel.load_state_dict(x)",
            ),
            (READS_PICKLES, SAFELY),
            (CLI, f"import importlib, pkgutil\nimportlib.{A_VERB}"),
            ("switchcli/tasks/registry.py", f"import importlib\nimportlib.{A_TASK}"),
            (DATA, "from importlib.metadata import version"),
        ],
    ),
    files_from_outside_are_opened_by_user_files: (
        [
            (DATA, "path.read_text()"),
            (DATA, "(folder / name).read_bytes()"),
            (DATA, "path.open('rb')"),
            (DATA, "path.open(mode='r')"),
            (TRAIN, "safe_open(path, framework='pt')"),
        ],
        [
            (DATA, "open_regular(path)\nread_regular(path, 9)\npath.open('wb')\nshard.open()"),
            ("switchcli/processor.py", "path.read_text()"),
        ],
    ),
    yaml_is_read_safely: (
        [(DATA, "yaml.load(text)"), (DATA, "yaml.load(text, Loader=yaml.FullLoader)"), (DATA, "yaml.load(text, Mine)")],
        [(DATA, "class Mine(yaml.SafeLoader): pass\nyaml.load(text, Mine)\nyaml.load(text, Loader=yaml.CSafeLoader)")],
    ),
    errors_are_caught_by_name: (
        [
            (DATA, "try:\n  f()\nexcept:\n  pass"),
            (DATA, "try:\n  f()\nexcept Exception as error:\n  raise ValueError from error"),
            (DATA, "try:\n  f()\nexcept (OSError, BaseException):\n  pass"),
        ],
        [(DATA, "try:\n  f()\nexcept OSError:\n  pass\nexcept BaseException:\n  undo()\n  raise")],
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
            (DATA, "f'[red on white]{x}'"),
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


LINTED = {
    "x = 1": "D100",
    "from . import loop": "TID252",
    "print(1)": "T201",
    "def f():\n    global x\n    x = 1": "PLW0603",
    "try:\n    f()\nexcept:\n    pass": "E722",
}


@pytest.mark.parametrize("text", LINTED, ids=LINTED.values())
def test_ruff_finds(text: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "switchcli/data/a.py", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert LINTED[text] in done.stdout


UPWARD_IMPORTS = [
    ("model/layers.py", "from switchcli.data.batch import Batch"),  # a package of the same layer
    ("model/layers.py", "def late() -> None:\n    import switchcli.training.loop"),
    ("data/batch.py", "from switchcli import report"),
    ("training/loop.py", "from switchcli.recipe import schema"),
    ("checkpoint/lock.py", "from switchcli.recipe import schema"),
    ("convert/weight_names.py", "from switchcli.training import loop"),
    ("errors.py", "from switchcli.spec import Spec"),
    ("tasks/task.py", "from switchcli.model import config"),
    ("distributed/mesh.py", "from switchcli.data import batch"),
    ("doctor/probes.py", "from switchcli.checkpoint import lock"),
    ("cli.py", "from switchcli.training import loop"),
]


def broken_contracts(folder: Path) -> str:
    """The imports that the contracts of pyproject.toml forbid, as lint-imports reports them; "" where all are kept."""
    script = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache', '--no-logo'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=False)
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    return done.stdout.partition("Contracts:")[2] if done.returncode else ""


def test_imports_go_down() -> None:
    assert not broken_contracts(ROOT)


def test_an_import_that_goes_up_is_found(tmp_path: Path) -> None:
    copytree(ROOT / "switchcli", tmp_path / "switchcli", ignore=ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for name, line in UPWARD_IMPORTS:
        assert (ROOT / "switchcli" / name).is_file()
        with (tmp_path / "switchcli" / name).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{line}\n")
    importers = set(re.findall(r"([\w.]+) -> ", broken_contracts(tmp_path)))
    for name, line in UPWARD_IMPORTS:
        assert "switchcli." + name.removesuffix(".py").replace("/", ".") in importers, f"not found: {name}: {line}"


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
    assert sorted(verbs.keys() & engines.keys()) == ["launch.py", "plan.py", "prune.py", "upcycle.py"]
