"""The tables of docs/what-can-i-train.md, from the numbers of `switchcli plan`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from switchcli.plan.recipe_plan import RecipePlan, plan_sizes
from switchcli.planner.meshes import GIB, Fit, Machine
from switchcli.terminal.units import si


class Target(NamedTuple):
    """A machine of the page, and the keys that a plan for it sets."""

    title: str
    machine: Machine
    overrides: Sequence[str]
    command: str


def _gpus(title: str, number: int, name: str) -> Target:
    return Target(title, Machine.of_gpu(number, name), (), f"switchcli plan --gpu {name} --devices {number}")


TARGETS = (
    Target(
        "A laptop with 16 GiB, no GPU",
        Machine(1, 13 * GIB),
        ("train.device=cpu", "train.precision=float32", "train.batch_tokens=65536"),
        "switchcli plan train.device=cpu train.precision=float32 train.batch_tokens=65536 --devices 1 --memory 13GiB",
    ),
    _gpus("One GPU with 24 GB", 1, "rtx-4090"),
    _gpus("One GPU with 80 GB", 1, "h100"),
    _gpus("Eight GPUs with 80 GB", 8, "h100"),
)


def sizes_by_machine() -> str:
    """Return for each machine a table of the sizes that fit, and the names of those that do not."""
    return "\n".join(map(_section, TARGETS))


def _section(target: Target) -> str:
    headings = ["size", "parameters", "mesh", "sequences", "GiB"]
    if target.machine.gpu:  # the rates of a laptop are not known
        headings += ["days"]
    lines = [f"## {target.title}\n", f"<!-- not run: as above -->\n```bash\n{target.command}\n```\n"]
    plans = plan_sizes(target.overrides, target.machine)
    rows = [[*_cells(one, one.meshes.best)] for one in plans if one.meshes.best]
    lines += [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)]
    too_large = [_too_large(one) for one in plans if not one.meshes.best]
    lines.append(f"\nToo large, with the number of devices that each fits on: {', '.join(too_large) or 'none'}.\n")
    return "\n".join(lines)


def _too_large(plan: RecipePlan) -> str:
    """Return a size with the number of devices that it needs; without, where no number of them suffices."""
    return f"`{plan.name}`" + (f" ({plan.devices_needed:,})" if plan.devices_needed else "")


def _cells(plan: RecipePlan, fit: Fit) -> Iterator[str]:
    yield f"`{plan.name}`"
    yield si(plan.about["parameters"])
    yield _mesh(fit)
    yield str(fit.microbatch)
    yield f"{fit.bytes.total / GIB:.1f}"
    if plan.days is not None:
        yield f"{plan.days:,.0f}" if plan.days >= 10 else f"{plan.days:.2g}"


def _mesh(fit: Fit) -> str:
    if fit.mesh.data * fit.mesh.model == 1:
        return "1"
    experts = f", experts over {fit.mesh.expert}" if fit.mesh.expert > 1 else ""
    return f"{fit.mesh.data} x {fit.mesh.model}{experts}{'' if fit.mesh.shard == 'none' else f', {fit.mesh.shard}'}"
