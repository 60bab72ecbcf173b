"""What CONTRIBUTING says is to be touched "To add something" is enough: rows are performed in a copy, and run.

A row of that table has the number of files that it touches, and names them; NAME stands for any name. A performance
adds text to the copy's files by `Tree`, which notes them, and then runs commands in a fork with the copy's own package.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import pytest
from tiny_run import RECIPE, write_text

ROOT = Path(__file__).resolve().parents[2]
FROM_THE_ROOT = ("recipes", "tests", "pyproject.toml")
"""Where a path of the table begins with none of these, it is one in switchcli/."""
SECONDS = 120
"""Until a fork that does not end is killed."""


class Row(NamedTuple):
    """A row of the table."""

    num_files: int
    patterns: tuple[str, ...]
    """Paths of the files from the root of the tree."""


def rows() -> dict[str, Row]:
    """Return the rows of CONTRIBUTING's table by what is to be added."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## To add something\n")[1].split("\n## ")[0]
    found = {}
    for line in [line for line in section.splitlines() if line.startswith("|")][2:]:
        what, number, touch = (cell.strip() for cell in line.strip("|").split("|"))
        paths = re.findall(r"`([\w/.]+(?:/|\.\w+))`", touch)
        rooted = [path if path.startswith(FROM_THE_ROOT) else f"switchcli/{path}" for path in paths]
        found[what] = Row(int(number), tuple(path.replace("NAME", "*") for path in rooted))
    return found


class Tree:
    """A copy of the tree, and which of its files were touched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.touched: set[str] = set()
        shutil.copytree(ROOT / "switchcli", root / "switchcli")
        shutil.copytree(ROOT / "recipes", root / "recipes")
        shutil.copy2(ROOT / "pyproject.toml", root)
        (root / "tests/repository").mkdir(parents=True)
        for name in ("repository/test_house.py", "test_recipes.py"):
            shutil.copy2(ROOT / "tests" / name, root / "tests" / name)

    def create(self, path: str, text: str) -> None:
        """Write a new file."""
        assert not (self.root / path).exists()
        (self.root / path).parent.mkdir(exist_ok=True)
        self._write(path, text)

    def insert(self, path: str, text: str, *, after: str = "", before: str = "") -> None:
        """Add text where the one match of a regular expression ends, or where it begins."""
        old = (self.root / path).read_text(encoding="utf-8")
        places = [match.end() if after else match.start() for match in re.finditer(after or before, old, re.MULTILINE)]
        assert len(places) == 1, f"{path}: {after or before} is there {len(places)} times"
        self._write(path, old[: places[0]] + text + old[places[0] :])

    def _write(self, path: str, text: str) -> None:
        (self.root / path).write_text(text, encoding="utf-8")
        self.touched.add(path)


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command(*arguments: object, code: int = 0) -> Done:
    """Run `switchcli ARGUMENTS` in this process, which must end with this exit code."""
    from switchcli.cli import main

    before = sys.argv, sys.stdin, sys.stdout, sys.stderr, os._exit
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    sys.argv, sys.stdin, sys.stdout, sys.stderr = ["switchcli", *map(str, arguments)], io.StringIO(), out, err
    os._exit = _leave  # type: ignore[assignment]
    ended: str | int | None = 0
    try:
        main()
    except SystemExit as end:
        ended = end.code
    finally:
        sys.argv, sys.stdin, sys.stdout, sys.stderr, os._exit = before
        for stream in (out, err):
            stream.flush()
    done = Done(int(ended or 0), *(stream.buffer.getvalue().decode() for stream in (out, err)))  # type: ignore[attr-defined]
    assert done.code == code, f"{' '.join(map(str, arguments))}: exit code {done.code}: {done.out}{done.err}"
    return done


class Fork:
    """What a performance runs its copy by; commands are run in the folder of tiny.yaml and tune.yaml."""

    def __init__(self, tree: Tree, here: Path) -> None:
        self.root = tree.root
        self.out, self.sparse, self.dense = here / tree.root.name, here / "sparse", here / "dense"

    def __call__(self, *arguments: object, code: int = 0) -> Done:
        """Run `switchcli ARGUMENTS`, which must end with this exit code."""
        return command(*arguments, code=code)

    def pretrain(self, *overrides: str) -> Done:
        """Train two steps into `out`."""
        return self("pretrain", "tiny.yaml", *overrides, "log.every_steps=1", "--out", self.out)

    def scores(self, checkpoint: Path, *overrides: str) -> dict[str, Any]:
        """Evaluate a checkpoint, and return what is said of each task."""
        done = self("eval", checkpoint, *overrides, "--out", f"{self.out}-eval", "--json")
        return done.json["passes"][0]["tasks"]

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def module(self, path: str) -> ModuleType:
        """Import a file of the copy that is in no package."""
        return imported(self.root / path)


def imported(path: Path) -> ModuleType:
    """Import a file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _leave(code: int) -> NoReturn:
    raise SystemExit(code)


# A router


def add_router(tree: Tree) -> None:
    router = '''
class Pair(TokenChoiceRouter):
    """The two most probable experts of each token, weighted by their probabilities."""

    kind: Literal["pair"] = "pair"

    @property
    def experts_per_token(self) -> int:
        return 2

    def num_choices(self, num_experts: int) -> int:
        return 2

    def _max_slots_per_token(self, num_choices: int) -> int:
        return 2

    def _gates(self, gate_GNK: torch.Tensor) -> torch.Tensor:
        return gate_GNK

    def _eligible(self, gate_GN: torch.Tensor, assigned_GN: torch.Tensor, training: bool) -> torch.Tensor:
        return assigned_GN.new_ones(assigned_GN.shape)


'''
    tree.insert("switchcli/model/moe/router.py", router, before="^def _default_to_switch")
    tree.insert("switchcli/model/moe/router.py", "Pair | ", after=r"^RouterSpec = Annotated\[\s*")


def use_router(run: Fork) -> None:
    run.pretrain("model.router.kind=pair")
    assert any("balance" in record for record in run.records())
    flops = {
        kind: run("pretrain", "tiny.yaml", f"model.router.kind={kind}", "--dry-run", "--json").json[
            "flops_per_sequence"
        ]
        for kind in ("switch", "pair", "top_k")
    }
    assert flops["pair"] == flops["top_k"] > flops["switch"]
    run("doctor", run.out)
    made = f"{run.out}-upcycled"
    upcycled = run("upcycle", run.dense, made, "--experts", "4", "model.router={kind: pair}", "--json").json
    assert upcycled["corrections"]["encoder"]["wo"] * upcycled["corrections"]["encoder"]["router"] != 1
    run("convert", run.out, f"{run.out}-converted", "--to", "huggingface", code=4)


# Tasks and metrics


def add_task(tree: Tree) -> None:
    tree.create(
        "switchcli/tasks/parity.py",
        '''"""Parity: is a number odd or even?"""

from collections.abc import Iterator
from typing import Literal

from switchcli.tasks.columns import question_example, text
from switchcli.tasks.label_metrics import ACCURACY
from switchcli.tasks.suites import Suite
from switchcli.tasks.task import EmbeddedSource, Example, Purpose, Row, Task


def _rows(split: Literal["train", "validation"]) -> Iterator[Row]:
    for number in range(0 if split == "train" else 1, 40, 2):
        yield {"number": str(number // 2), "parity": ("even", "odd")[number // 2 % 2]}


def _examples(row: Row, purpose: Purpose) -> Iterator[Example]:
    return question_example(f"parity: {text(row, 'number')}", (text(row, "parity"),), purpose)


TASKS: tuple[Task, ...] = (
    Task(
        "parity",
        EmbeddedSource(_rows, lambda: "parity 1"),
        ("number", "parity"),
        _examples,
        (ACCURACY,),
        chance=50.0,
        labels=("odd", "even"),
    ),
)
SUITES = (Suite("arithmetic", ("parity",)),)
''',
    )


def use_task(run: Fork) -> None:
    run("finetune", "tune.yaml", "tasks=[arithmetic]", "--model", run.sparse, "--out", run.out)
    assert any({"tasks/parity", "suites/arithmetic"} <= record.keys() for record in run.records())
    assert run.scores(run.sparse, "tasks=[parity]", "scoring.decoding.max_tokens=2")["parity"]["chance"] == 50
    assert "Did you mean parity?" in run("eval", run.sparse, "tasks=[parety]", code=2).err


# Training


def add_optimizer(tree: Tree) -> None:
    spec = '''
class Momentum(Spec):
    """Gradient descent with momentum."""

    kind: Literal["momentum"] = "momentum"
    decay: float = Field(default=0.9, ge=0.0, lt=1.0)

    def build(self, parameters: NamedParameters, layouts: Layouts = UNSHARDED) -> Optimizer:
        """Return the optimizer of these parameters."""
        from switchcli.training.optimizers import MomentumOptimizer

        return MomentumOptimizer(self, parameters, layouts)


'''
    optimizer = """

class MomentumOptimizer(Optimizer):
    def __init__(self, spec: Momentum, parameters: NamedParameters, layouts: Layouts) -> None:
        super().__init__(parameters, layouts)
        self.spec = spec
        self._mean = {name: torch.zeros_like(local_values(weight)) for name, weight in self.parameters.items()}

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{name}/mean": mean for name, mean in self._mean.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                mean = self._mean[name].lerp_(local_values(parameter.grad), 1.0 - self.spec.decay)
                local_values(parameter).sub_(mean, alpha=learning_rate)
"""
    specs, optimizers = "switchcli/training/optimizer_specs.py", "switchcli/training/optimizers.py"
    tree.insert(specs, spec, before="^OptimizerSpec = ")
    tree.insert(specs, "Momentum | ", after=r"^OptimizerSpec = Annotated\[\s*")
    tree.insert(optimizers, optimizer, after=r"\Z")
    tree.insert(optimizers, ", Momentum", after="^from switchcli.training.optimizer_specs import .*AdamW")


def use_optimizer(run: Fork) -> None:
    run.pretrain("optimizer.kind=momentum")
    resumed = run.pretrain("optimizer.kind=momentum", "train.steps=3")
    assert "step" in resumed.err
    assert run.records()[-1]["step"] == 3
    run("plan", "tiny.yaml", "optimizer.kind=momentum", "--devices", "1")


# Data


def add_objective(tree: Tree) -> None:
    tree.create(
        "switchcli/data/objectives/echo.py",
        '''"""Echo: the targets are the inputs."""

from typing import Literal

import numpy as np
from pydantic import Field

from switchcli.data.objectives.example_packing import pad_rows
from switchcli.data.objectives.span_corruption import Corrupt, Draws, Ids
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.spec import MAX_SIZE, Spec


class Echo(Spec):
    """A text is given, and is to be said again."""

    kind: Literal["echo"] = "echo"
    inputs_length: int = Field(default=512, ge=2, le=MAX_SIZE)

    @property
    def targets_length(self) -> int:
        return self.inputs_length

    @property
    def raw_tokens_per_row(self) -> int:
        return self.inputs_length - 1

    @property
    def num_draws(self) -> int:
        return 1

    def build(self, tokenizer: Tokenizer) -> Corrupt:
        return self.corrupt

    def corrupt(self, raw_RL: Ids, draws: Draws) -> tuple[Ids, Ids]:
        """Inputs and targets [R, inputs_length] of raw ids [R, raw_tokens_per_row]."""
        rows, length = len(raw_RL), self.raw_tokens_per_row
        echoed = pad_rows(raw_RL.ravel(), np.full(rows, length), np.arange(rows), (rows, self.inputs_length))
        return echoed, echoed
''',
    )
    config, imported = "switchcli/data/config.py", "from switchcli.data.objectives.echo import Echo\n"
    tree.insert(config, imported, before="^from switchcli.data.objectives.packed_documents import")
    tree.insert(config, "Echo | ", after="^TextObjective = ")


def use_objective(run: Fork) -> None:
    run.pretrain("data.objective={kind: echo, inputs_length: 32}")
    [sample, *_] = json.loads((run.out / "result.json").read_text())["samples"]
    assert sample["input"] == sample["target"]


# Recipes


def add_recipe_key(tree: Tree) -> None:
    key = """    multiplier: float = Field(default=1.0, gt=0.0, le=1e6)
    \"\"\"Factor of the whole schedule.\"\"\"
"""
    tree.insert("switchcli/training/schedules.py", key, after=r'^    """Learning rate of the constant part; .*\n')
    tree.insert("switchcli/training/schedules.py", "self.multiplier * ", after=r"^        rate = ")


def use_recipe_key(run: Fork) -> None:
    def resolved(*overrides: str) -> float:
        return run("pretrain", "tiny.yaml", *overrides, "--dry-run", "--json").json["recipe"]["schedule"]["multiplier"]

    assert (resolved(), resolved("schedule.multiplier=3")) == (1.0, 3.0)
    definitions = run("recipes", "schema", "pretrain").json["$defs"]
    assert definitions["InverseSquareRoot"]["properties"]["multiplier"]["default"] == 1.0
    assert "schedule.multiplier" in run("pretrain", "tiny.yaml", "schedule.multiplier=0", "--dry-run", code=2).err
    run.pretrain("schedule.multiplier=3")
    assert next(record["learning_rate"] for record in run.records() if "learning_rate" in record) == pytest.approx(0.03)


# Verbs


def add_verb(tree: Tree) -> None:
    tree.create(
        "switchcli/commands/count.py",
        '''"""`switchcli count`: the parameters of a checkpoint."""

import typer

from switchcli.commands._options import Checkpoint, Json
from switchcli.commands._result import finish
from switchcli.terminal.table import Table

app = typer.Typer()


@app.command()
def count(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Count the parameters of a checkpoint."""
    from switchcli.terminal.console import silent
    from switchcli.runs.inputs.loading import open_model

    weights = open_model(checkpoint, silent()).weights()
    count = sum(weight.numel() for weight in weights.values())
    finish({"parameters": count}, as_json, [Table(("", ""), [("parameters", count)], str(checkpoint))])
''',
    )


def use_verb(run: Fork) -> None:
    assert "Usage" in run("count", "--help").out
    assert "count" in run("--help").out
    result = json.loads((run.sparse / "result.json").read_text())
    assert run("count", run.sparse, "--json").json == {"parameters": result["parameters"]}
    assert f"{result['parameters']:,}" in run("count", run.sparse).out


def add_training_verb(tree: Tree) -> None:
    tree.create(
        "switchcli/commands/rehearse.py",
        '''"""`switchcli rehearse`: pre-training whose result says so."""

from switchcli.commands._options import epilog
from switchcli.commands._training import training_app

app = training_app("rehearse", "Train as `pretrain` does, and say so.", epilog("tutorial", "switchcli rehearse a.yaml"))
''',
    )
    tree.create(
        "switchcli/runs/train/rehearsing.py",
        '''"""Rehearsing: the task of `switchcli rehearse`."""

from typing import TYPE_CHECKING, Any

from switchcli.runs.train.training_task import Pretraining

if TYPE_CHECKING:
    from switchcli.runs.train.trainer import Trainer


class Rehearsing(Pretraining):
    """Pretraining, and a word in the result."""

    verb = "rehearse"

    def results(self, trainer: "Trainer") -> dict[str, Any]:
        return {"rehearsed": super().results(trainer) == {}}
''',
    )
    recipe = '''
class RehearseRecipe(TextRecipe):
    """One run of `switchcli rehearse`."""

    verb: Literal["rehearse"] = "rehearse"
    """The command that runs this recipe."""


'''
    tree.insert("switchcli/recipe/schema.py", recipe, before="^RECIPES: ")
    tree.insert("switchcli/recipe/schema.py", '"rehearse": RehearseRecipe, ', before='"pretrain": PretrainRecipe')
    line = "from switchcli.runs.train.rehearsing import Rehearsing\n"
    tree.insert("switchcli/runs/train/start.py", line, before="^from switchcli.runs.train.trainer import")
    tree.insert("switchcli/runs/train/start.py", "Rehearsing, ", after=r"^TASKS.* in \(")


def use_training_verb(run: Fork) -> None:
    assert "Usage" in run("rehearse", "--help").out
    assert run("rehearse", "tiny.yaml", "verb=rehearse", "--out", run.out, "--json").json["rehearsed"] is True
    run("rehearse", run.out / "recipe.yaml", "train.steps=3", "--out", run.out)
    run("eval", run.out, "text.sequences=4", "--out", f"{run.out}-eval")
    run("generate", run.out, "red", "--max-tokens", "2")
    run("recipes", "validate", run.out / "recipe.yaml")
    assert run("recipes", "schema", "rehearse").json["properties"]["verb"]["const"] == "rehearse"
    assert "rehearse" in run("pretrain", run.out / "recipe.yaml", "--dry-run", code=2).err
    run("rehearse", run.sparse / "recipe.yaml", "--dry-run", code=2)


ADDITIONS: dict[str, tuple[Callable[[Tree], None], Callable[[Fork], None]]] = {
    "a router": (add_router, use_router),
    "a family of tasks, a suite": (add_task, use_task),
    "an optimizer": (add_optimizer, use_optimizer),
    "a pre-training objective": (add_objective, use_objective),
    "a recipe key": (add_recipe_key, use_recipe_key),
    "a verb": (add_verb, use_verb),
    "a verb that trains": (add_training_verb, use_training_verb),
}
"""How a row is performed, and what shows that it works: one row of each way to add, not those that are like another."""

TUNING = """\
tasks:
  - {kind: files, name: own, train: [train.jsonl], validation: [train.jsonl], input: "say {text}", target: label,
     labels: [red, green], metrics: [accuracy]}
data: {inputs_length: 32, targets_length: 32}
train: {steps: 2, batch_tokens: 128, device: cpu}
eval: {every_steps: 2, sequences: 4}
scoring: {batch_examples: 8, decoding: {max_tokens: 4}}
checkpoint: {save_every_steps: 2}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny.yaml and tune.yaml, with two runs, which nobody writes into.

    They are made in this process: so the forks find what training imports of other packages.
    """
    folder = tmp_path_factory.mktemp("adding")
    write_text(folder / "text.txt")
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "tune.yaml").write_text(TUNING)
    (folder / "train.jsonl").write_text('{"text": "which", "label": "red"}\n' * 16)
    with contextlib.chdir(folder):
        for name, experts in (("sparse", 4), ("dense", 1)):
            overrides = (f"model.num_experts={experts}", "log.every_steps=1")
            command("pretrain", "tiny.yaml", *overrides, "--out", folder / name)
    return folder


def perform(tree: Tree, use: Callable[[Fork], None], here: Path) -> None:
    """Call `use` in a fork whose package is the copy's. An error there is one here."""
    told = tree.root / "error.txt"
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            for name in [name for name in sys.modules if name.split(".")[0] == "switchcli"]:
                del sys.modules[name]
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(tree.root))
            os.environ["PYTHONPATH"] = str(tree.root)
            os.chdir(here)
            import switchcli

            assert Path(switchcli.__file__).is_relative_to(tree.root)
            use(Fork(tree, here))
        except BaseException:  # noqa: BLE001 - the test reports it
            told.write_text(traceback.format_exc())
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"killed: exit code {code}"
    if told.exists():
        pytest.fail(told.read_text(), pytrace=False)


@pytest.mark.unit("a router", "a family of tasks, a suite", "a verb")
@pytest.mark.parametrize("what", ADDITIONS)
def test_what_the_table_says_is_to_be_touched_is_enough(
    what: str, here: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tree = Tree(tmp_path_factory.mktemp("tree"))
    add, use = ADDITIONS[what]
    add(tree)
    row = rows()[what]
    assert len(tree.touched) == row.num_files
    assert [path for path in tree.touched if not any(fnmatch(path, pattern) for pattern in row.patterns)] == []
    perform(tree, use, here)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("switchcli/tasks/other.py", "from switchcli.tasks.glue import TASKS\n"),
        ("switchcli/tasks/other.py", "from switchcli.tasks.text_metrics import METRICS\n"),
        (
            "switchcli/tasks/other.py",
            'from switchcli.tasks.registry import Suite\n\nSUITES = (Suite("rte", ("rte",)),)\n',
        ),
    ],
    ids=["task", "metric", "suite"],
)
def test_two_definitions_of_one_name_are_an_error(path: str, text: str, here: Path, tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.create(path, text)

    def use(run: Fork) -> None:
        with pytest.raises(AssertionError, match="name"):
            importlib.import_module("switchcli.tasks.registry")

    perform(tree, use, here)
