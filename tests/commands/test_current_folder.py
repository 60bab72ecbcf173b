"""Modules in the current folder never run, whatever process a command starts: the folder may be a stranger's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_text

SWITCHCLI = str(Path(sys.executable).with_name("switchcli"))
_TEXTS = [f"{{kind: files, paths: [{name}.txt], sample_by: line}}" for name in ("text", "more")]
TEXTS = f"data.corpora=[{','.join(_TEXTS)}]"
TRAIN = ("pretrain", "tiny.yaml")
RUN_SBATCH = f"bash {Path(__file__).parents[2] / 'recipes/cluster/run.sbatch'}"
DEPENDENCIES = (
    "accelerate",
    "numpy",
    "psutil",
    "pydantic",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "typer",
    "yaml",
)
TRAP = "import os\nos.close(os.open(f'{os.environ[\"TRAPPED\"]}/{__name__}', os.O_CREAT))\n"
PROGRAM = f"""
import switchcli
from switchcli.data.prepare import pipeline

pipeline.PROCESSES_FROM = 0
pipeline.available_processors = lambda: 2
if __name__ == "__main__":
    switchcli.train(switchcli.Recipe.load("tiny.yaml", [{TEXTS!r}]), out="run")
"""


@pytest.fixture
def trapped(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder whose modules are named like all others. Return the folder that lists those that were run."""
    for name in {*sys.stdlib_module_names, *DEPENDENCIES} - {"os"}:
        (tmp_path / f"{name}.py").write_text(TRAP)
    for name in ("switchcli", "torch"):
        (tmp_path / name).mkdir()
        for file in ("__init__.py", "__main__.py", "run.py"):
            (tmp_path / name / file).write_text(TRAP)
    write_text(tmp_path / "more.txt")
    ran = tmp_path / "ran"
    ran.mkdir()
    monkeypatch.setenv("TRAPPED", str(ran))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PATH", f"{Path(SWITCHCLI).parent}:{os.environ['PATH']}")
    return ran


@pytest.mark.integration
@pytest.mark.parametrize(
    "command",
    [
        (SWITCHCLI, *TRAIN, "--processes", "2"),
        (SWITCHCLI, "sweep", *TRAIN, "train.seed=0,1", "--jobs", "1"),
        (SWITCHCLI, "data", "prepare", "tiny.yaml", TEXTS, "--processes", "2"),
        (
            "bash",
            "-c",
            f'srun() {{ shift; "$@"; }}; export -f srun; SLURM_CPUS_PER_TASK=1 {RUN_SBATCH} {" ".join(TRAIN)}',
        ),
    ],
    ids=["processes", "sweep", "prepare", "job script"],
)
def test_no_module_of_the_current_folder_runs(command: tuple[str, ...], trapped: Path) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert not [*trapped.iterdir()]
    assert done.returncode == 0, done.stderr


@pytest.mark.integration
def test_no_module_of_the_current_folder_runs_when_a_program_of_the_users_prepares_text(trapped: Path) -> None:
    program = trapped / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program], check=False, capture_output=True, text=True)
    assert [path.name for path in trapped.iterdir()] == ["program.py"]
    assert done.returncode == 0, done.stderr
