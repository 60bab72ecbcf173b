"""The page docs/what-can-i-train.md, from the numbers of `switchcli plan`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pages import GENERATED

from switchcli.planner.devices import RESERVED_FRACTION, UTILIZATION
from switchcli.planner.plan import GIB, Fit, Machine
from switchcli.report.units import si
from switchcli.runs.planning import RecipePlan, describe, plan_sizes

TOP = f"""\
# What can I train on my machine?

This page says which model sizes fit on a laptop, on one GPU and on eight, by the arithmetic of `switchcli plan`. Name
your own devices, which takes some seconds and needs no GPU:

```bash
switchcli plan --gpu h100 --devices 8
```

How to read the tables:

- A row is a size of `model.size` in the recipe `pretrain/base`: 500,000 steps of 2^20 input tokens, 512 input and 114
  target tokens per sequence, Adafactor, and weights, gradients and optimizer state in float32.
- **GiB** is what one device needs at the peak of a step, as an upper bound. A plan leaves
  {RESERVED_FRACTION:.0%} of the memory free for what it does not count: CUDA, buffers, kernels and fragmentation.
- **Mesh** is data x model, then the ranks that share the experts, then how weights are sharded.
- **Sequences** is the largest microbatch that fits. Gradients are accumulated over microbatches, so the batch of a step
  does not change what fits.
- **Tokens/s** are encoder input tokens of all devices in batches of 2^20 tokens, and **days** are for all steps of the
  recipe.
- **Names**: `t5-base`, `t5-large`, `switch-base` and `switch-large` are those of the paper's Table 9 (GEGLU; both
  Switch models have 128 experts). `switch-base-128`, `t5-v1_0-base` and the like are the released checkpoints (ReLU,
  wider feed-forwards), and `t5-v1_1-base` and the like those of T5 1.1.
- On a laptop, start with `tiny`, `mini` or `small`, or with the same size with experts: `switch-tiny-8`,
  `switch-mini-8`, `switch-small-8`.

The planner's memory was compared with torch's own count on CPUs, where the peak was 0.73 to 1.0 of the total. **Nothing
was measured on a GPU for this page.** Times are arithmetic: {UTILIZATION:.0%} of the FLOP/s of the device's data
sheet, all of its bandwidth, nothing overlapped and no latency. How far they are from a real run is not known; small
models are slower. [Plan memory and time](how-to/plan.md#devices) has the numbers of the devices.
"""

BOTTOM = """\
## If it does not fit

- Use more devices: [many GPUs](how-to/many-gpus.md). The experts are divided over the devices.
- Take fewer experts: `model.num_experts=8`. A token meets one expert, so the FLOPs per token stay the same.
- Recompute activations: `train.activation_checkpointing=blocks` allows larger microbatches, and takes a quarter to a
  third more time.
- Shorten the rows: `data.objective.inputs_length=256`.
- Plan it first: [plan memory and time](how-to/plan.md).
"""


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


def what_can_i_train() -> str:
    """Return the page: for each machine a table of the sizes that fit, and the names of those that do not."""
    source = GENERATED.format(source="scripts/documentation/planner_page.py")
    return "\n".join([source, TOP, *(_section(target) for target in TARGETS), BOTTOM])


def _section(target: Target) -> str:
    headings = ["size", "parameters", "mesh", "sequences", "GiB"]
    if target.machine.gpu:  # the rates of a laptop are not known
        headings += ["tokens/s", "days"]
    lines = [f"## {target.title}\n", f"<!-- not run: as above -->\n```bash\n{target.command}\n```\n"]
    plans = plan_sizes(target.overrides, target.machine)
    rows = [[*_cells(one, one.plan.best)][: len(headings)] for one in plans if one.plan.best]
    lines += [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)]
    too_large = [_too_large(one) for one in plans if not one.plan.best]
    lines.append(f"\nToo large, with the number of devices that each fits on: {', '.join(too_large) or 'none'}.\n")
    return "\n".join(lines)


def _too_large(plan: RecipePlan) -> str:
    """Return a size with the number of devices that it needs; without, where no number of them suffices."""
    return f"`{plan.name}`" + (f" ({plan.devices_needed:,})" if plan.devices_needed else "")


def _cells(plan: RecipePlan, fit: Fit) -> Iterator[str]:
    yield f"`{plan.name}`"
    yield si(describe(plan.recipe)["parameters"])
    yield _mesh(fit)
    yield str(fit.microbatch)
    yield f"{fit.bytes.total / GIB:.1f}"
    yield si(plan.tokens_per_second(fit))
    days = plan.days(fit)
    yield f"{days:,.0f}" if days >= 10 else f"{days:.2g}"


def _mesh(fit: Fit) -> str:
    if fit.mesh.data * fit.mesh.model == 1:
        return "1"
    experts = f", experts over {fit.mesh.expert}" if fit.mesh.expert > 1 else ""
    return f"{fit.mesh.data} x {fit.mesh.model}{experts}{'' if fit.mesh.shard == 'none' else f', {fit.mesh.shard}'}"
