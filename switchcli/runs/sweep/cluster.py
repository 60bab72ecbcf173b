"""Job scripts for SLURM, and the torchrun command for machines without a scheduler.

A job script runs the command with srun. It saves and goes back into the queue before its time is over.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from switchcli.distributed.launch import SAVING_SECONDS, has_shutdown_timeout
from switchcli.report.safe_text import shell_word, shell_words
from switchcli.runs.sweep.sweep_list import SweepRun, needed_runs
from switchcli.runs.sweep.sweep_runner import command
from switchcli.system.signals import stop_signals
from switchcli.system.startup import keep_modules_of_current_folder_out


class Nodes(NamedTuple):
    """What a job asks SLURM for."""

    nodes: int = 1
    ranks: int = 1
    """Ranks per node, one per GPU."""
    cpus: int = 8
    """Processors per rank."""
    time: str = "24:00:00"
    has_gpus: bool = True
    """Ask for one GPU per rank."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, such as `--partition=a100`."""

    def lines(self, name: str, saves: bool = True) -> list[str]:
        """Return the `#SBATCH` lines. A job that saves is signaled 300 seconds before its time is over."""
        gpus = [f"--gpus-per-node={self.ranks}"] if self.has_gpus else []
        options = [
            f"--job-name={name}",
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.ranks}",
            *gpus,
            f"--cpus-per-task={self.cpus}",
            f"--time={self.time}",
            *(("--signal=USR1@300", "--requeue") if saves else ()),
            "--open-mode=append",
            *map(shell_word, self.options),
        ]
        return [f"#SBATCH {option}" for option in options]


# Exit code 75: the command has saved after a signal. A rank that fails at the start also stops the others with 75, so a
# job that ends within ten minutes after its third restart does not go back into the queue.
_RUN_AND_REQUEUE = """\
export SRUN_CPUS_PER_TASK="${{SLURM_CPUS_PER_TASK:-1}}"  # srun does not inherit --cpus-per-task since SLURM 22.05
code=0
srun --kill-on-bad-exit=1 {command} || code=$?
if [ "$code" -eq 75 ] && {{ [ "$SECONDS" -gt 600 ] || [ "${{SLURM_RESTART_COUNT:-0}}" -lt 3 ]; }}; then
    if scontrol requeue "{job}"; then
        code=0
    else
        echo "saved, and not requeued: submit the job again to go on" >&2
    fi
fi
exit "$code"
"""
_NEEDS = """\
needs() {
    for run; do
        [ -e "$run/result.json" ] || { echo "not started: $run is not complete" >&2; exit 1; }
    done
}
"""
"""A function of the shell that ends the task unless other runs are complete."""


def slurm_job(arguments: Sequence[str], nodes: Nodes) -> str:
    """Return a job script for one run on all ranks of the nodes."""
    lines = ["#!/usr/bin/env bash", *nodes.lines("switchcli"), "set -uo pipefail", ""]
    body = _RUN_AND_REQUEUE.format(command=shell_words("switchcli", *arguments), job="$SLURM_JOB_ID")
    return "\n".join(lines) + "\n" + body


def slurm_preparation(arguments: Sequence[str], nodes: Nodes) -> str:
    """Return a job script for `data prepare`: an array with a task per node, each of which prepares a share.

    The task that ends last puts the shares together. All tasks need one cache folder. A task that failed or ran out of
    time resumes when the same job is submitted again.
    """
    share = f'"$SLURM_ARRAY_TASK_ID/{nodes.nodes}"'
    processes = '--processes "${SLURM_CPUS_PER_TASK:-1}"'
    task = nodes._replace(nodes=1, ranks=1, has_gpus=False, options=(f"--array=1-{nodes.nodes}", *nodes.options))
    lines = [
        "#!/usr/bin/env bash",
        *task.lines("switchcli-prepare", saves=False),
        "set -euo pipefail",
        "",
        ': "${SWITCHCLI_CACHE:?set it to a folder that all machines see}"',
        f"exec {shell_words('switchcli', *arguments)} {processes} --share {share}",
    ]
    return "\n".join(lines) + "\n"


def slurm_sweep(runs: Sequence[SweepRun], out: Path, nodes: Nodes) -> str:
    """Return a shell script that submits a sweep: a job array for each stage, which starts after the stage before.

    Options of sbatch given to the script apply to every array.
    """
    script = [
        "#!/usr/bin/env bash",
        f"# Submits {len(runs)} runs. Usage: bash SCRIPT [OPTIONS OF SBATCH ...]",
        "set -euo pipefail",
        f"mkdir -p {shell_word(str(out))}",
        "after=()",
    ]
    stages = {run.name: run.stage for run in runs}
    for stage in sorted({*stages.values()}):
        members = [run for run in runs if run.stage == stage]
        log = out / "slurm-%A-%a.log"
        array = nodes._replace(options=(f"--array=0-{len(members) - 1}", f"--output={log}", *nodes.options))
        cases = []
        for number, run in enumerate(members):
            earlier = [out / name for name in needed_runs(run, out) if stages.get(name, stage) < stage]
            needs = f"needs {shell_words(*earlier)}; " if earlier else ""
            cases.append(f"    {number}) {needs}set -- {shell_words(*command(run, out))} ;;")
        # `afterany`, not `afterok`: a run that needs no failed run still starts; one that does ends with an error.
        script += [
            'job=$(sbatch --parsable ${after[@]+"${after[@]}"} "$@" <<\'JOB\'',
            "#!/usr/bin/env bash",
            *array.lines("switchcli-sweep"),
            "set -uo pipefail",
            _NEEDS.rstrip(),
            'case "$SLURM_ARRAY_TASK_ID" in',
            *cases,
            "esac",
            _RUN_AND_REQUEUE.format(command='"$@"', job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}").rstrip(),
            "JOB",
            ")",
            f'echo "stage {stage}: job $job"',
            'after=(--dependency="afterany:${job%%;*}")',
        ]
    return "\n".join(script) + "\n"


def torchrun_command(
    arguments: Sequence[str], head: str, port: int, nodes: int, ranks: int | None, restarts: int
) -> list[str]:
    """Return the command that runs one machine's ranks. The same command runs on each of the machines.

    `head` is the host at which the machines meet. Without `ranks` there is one rank per GPU; one without GPUs. When a
    rank dies, all ranks start again from the last checkpoint, at most `restarts` times.
    """
    if ranks is None:
        import torch

        ranks = max(1, torch.cuda.device_count())
    # With `env` the command has the variables when it is pasted, too. Ranks that restart must not meet where those
    # before them did.
    variables = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    keep_modules_of_current_folder_out(variables)
    return [
        *("env", *(f"{name}={value}" for name, value in variables.items())),
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={nodes}",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={head}:{port}",
        "--rdzv-id=switchcli",
        f"--max-restarts={restarts}",
        # torchrun ends at other signals, and leaves its ranks behind; by default it waits 30 s for their saves.
        f"--signals-to-handle={','.join(signal.Signals(number).name for number in (*stop_signals(), signal.SIGQUIT))}",
        *([f"--shutdown-timeout={SAVING_SECONDS}"] if has_shutdown_timeout() else []),
        *("-m", "switchcli"),
        *arguments,
    ]
