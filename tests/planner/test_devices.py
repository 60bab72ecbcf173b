"""Known devices: names, rates, and the memory that a plan leaves free."""

import re
from pathlib import Path

import pytest

from switchcli.errors import RecipeError
from switchcli.planner import devices
from switchcli.planner.meshes import Machine
from switchcli.recipe.schema import resolve_standalone
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.devices.costs import planner_of


def test_the_page_has_the_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| ([\d,]+) \| (.*?) \| [A-Z].* \|$", page, re.MULTILINE)
    found = {name: [float(cell.replace(",", "")) for cell in (mib, *cells.split(" | "))] for name, mib, cells in rows}
    assert list(found) == [*devices.GPUS]
    for name, gpu in devices.GPUS.items():
        units = (1, 1e12, 1e12)
        assert found[name] == pytest.approx([value / unit for value, unit in zip(gpu, units, strict=True)]), name


def test_an_unknown_device_has_a_nearest_name_and_the_list() -> None:
    with pytest.raises(RecipeError, match=r"rtx4090.*rtx-4090\b.*\bmi300x\b"):
        devices.find("rtx4090")


def test_a_machine_of_known_devices() -> None:
    machine, gpu = Machine.of_gpu(4, "V100-32GB"), devices.GPUS["v100-32gb"]
    assert (machine.devices, machine.gpu, machine.memory_bytes) == (4, "v100-32gb", gpu.memory_bytes)
    assert machine.flops_per_second(4) == devices.UTILIZATION * gpu.float32_flops
    assert machine.flops_per_second(2) == devices.UTILIZATION * gpu.flops
    assert Machine(1, 100).flops_per_second(4) is None
    assert Machine(1, 1000).usable_bytes == 1000 * (1 - devices.RESERVED_FRACTION)


@pytest.mark.parametrize("keys", [(), ("parallel.shard=zero3",), ("parallel.model=2",)], ids=str)
@pytest.mark.parametrize("gib", [0.02, 0.03, 0.04, 2.0])
def test_the_fewest_devices_are_the_first_power_of_two_that_fits(gib: float, keys: tuple[str, ...]) -> None:
    recipe = resolve_standalone("quickstart/switch", ["train.batch_tokens=16384", *keys])
    assert isinstance(recipe, TrainingRecipe)
    planner, machine = planner_of(recipe, fused=True), Machine(1, int(gib * 2**30))
    powers = [2**power for power in range(8)]
    fitting = [devices for devices in powers if planner.plan(machine._replace(devices=devices)).fits]
    assert planner.fewest_devices(machine) == (min(fitting) if fitting else None)
