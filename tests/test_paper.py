"""The figures of the paper that the model, the data, the schedule and the routing must give.

Table and section numbers are of arXiv 2101.03961v3; what T5 decides is said so. Parameters of the sizes that are not
printed are worked out from the formula of section 5.6 and kept in tests/recipe/test_sizes.py. paper.md says of every
equation where it is done and which test proves it; the last tests here hold that its references exist.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.model.moe.losses import auxiliary_loss
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.moe.stats import RouterStats
from switchcli.recipe.sizes import SIZES
from switchcli.training.schedules import InverseSquareRoot


def sized(name: str, **changes: object) -> ModelSpec:
    return ModelSpec(**{**SIZES[name]._asdict(), **changes})


def of_expert_count(num_experts: int) -> ModelSpec:
    return sized("switch-base", num_experts=num_experts)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("t5-base", 223),
        ("t5-xxl", 11_000),
        ("switch-base", 7_410),
        ("switch-xxl-128", 395_000),
        ("switch-c", 1_571_000),
    ],
)
def test_parameters_as_printed_in_millions(name: str, printed: int) -> None:
    """They agree within a fifth of a percent, to which the printed figures are rounded. Switch-XXL is untied, as
    released."""
    assert count(sized(name)).parameters / 1e6 == pytest.approx(printed, rel=2e-3)


@pytest.mark.parametrize(
    ("names", "printed", "unit"),
    [
        (("t5-base", "switch-base"), 124, 1e9),
        (("t5-v1_0-large", "switch-large-128"), 425, 1e9),  # the shape as released: the printed one gives 433
        (("t5-xxl", "switch-xxl", "switch-xxl-128"), 6.3, 1e12),
        (("switch-c",), 890, 1e9),
    ],
)
def test_flops_a_sequence_of_table_9(names: tuple[str, ...], printed: float, unit: float) -> None:
    """To half a percent, or to the digits printed: 124.6 and 894.0 are what comes out of 124B and 890B."""
    flops = {count(sized(name)).flops for name in names}
    assert len(flops) == 1  # a sparse model costs what the dense one does
    found = flops.pop() / unit
    assert round(found, 1) == printed or found == pytest.approx(printed, rel=5e-3)


def test_flops_do_not_depend_on_the_number_of_experts() -> None:
    assert len({count(of_expert_count(experts)).flops for experts in (1, 2, 8, 128, 2048)}) == 1


@pytest.mark.parametrize(("inputs", "raw", "targets"), [(512, 568, 114), (256, 284, 58), (128, 141, 29), (64, 70, 14)])
def test_span_corruption_of_t5(inputs: int, raw: int, targets: int) -> None:
    corruption = SpanCorruption(inputs_length=inputs)
    assert (corruption.raw_tokens_per_row, corruption.targets_length) == (raw, targets)


def test_a_chunk_of_568_hides_85_tokens_in_28_spans() -> None:
    corruption = SpanCorruption(inputs_length=512, noise_density=0.15, mean_span_length=3.0)
    assert corruption.num_sentinels == 28
    assert corruption.num_noise == 85
    assert corruption.raw_tokens_per_row - 85 + 28 + 1 == corruption.inputs_length


@pytest.mark.parametrize(("step", "rate"), [(0, 0.01), (9_999, 0.01), (40_000, 0.005)])
def test_learning_rates_of_t5(step: int, rate: float) -> None:
    assert InverseSquareRoot()(step, 550_000) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("factor", "capacity"),
    [(1.0, 2), (1.25, 2), (1.5, 3), (2.0, 4)],
)
def test_expert_capacity_of_equation_3(factor: float, capacity: int) -> None:
    """Six tokens on three experts: two slots each at a factor of 1.0, and half as many again at 1.5."""
    router = SwitchRouter(capacity_factor=factor, min_capacity=1)
    assert router.capacity(6, 3, mode="training") == capacity
    logits_GNE = torch.tensor([[0, 0, 0, 1, 1, 2]]).eq(torch.arange(3)[:, None, None]).float().permute(1, 2, 0)
    dropped = router.assign(logits_GNE, torch.ones(1, 6, dtype=torch.bool), mode="training").stats.dropped
    assert dropped == max(0, 3 - capacity)  # three of the six choose the first expert


def auxiliary(report: RouterStats) -> float:
    """alpha * loss of one layer, as the paper sets alpha."""
    loss = auxiliary_loss([(SwitchRouter(), (report,)), (SwitchRouter(), ())], "sum")
    assert loss is not None
    return loss.mean().item()


@pytest.mark.parametrize("num_experts", [2, 8, 128, 2048])
def test_the_balance_loss_is_alpha_at_uniform_routing(num_experts: int) -> None:
    tokens = 2 * num_experts
    choice_GNE = torch.nn.functional.one_hot(torch.arange(tokens) % num_experts, num_experts).float().unsqueeze(0)
    report = SwitchRouter().assign(1e-3 * choice_GNE, torch.ones(1, tokens, dtype=torch.bool), mode="training").stats
    assert auxiliary(report) == pytest.approx(0.01, rel=1e-5)


def test_the_balance_loss_of_a_collapse_is_alpha_times_experts_times_the_probability() -> None:
    logits_GNE = torch.tensor([4.0, 0.0, 0.0, 0.0]).expand(1, 9, 4)
    report = SwitchRouter().assign(logits_GNE, torch.ones(1, 9, dtype=torch.bool), mode="training").stats
    assert auxiliary(report) == pytest.approx(0.01 * 4 * logits_GNE.softmax(-1)[0, 0, 0].item())


def test_switch_base_has_a_balance_loss_of_twelve_alphas() -> None:
    """Every other feed-forward of 12 + 12: the losses of the layers are summed, so the balanced floor is 0.12."""
    spec = sized("switch-base")
    assert spec.sparse_layers("encoder") == spec.sparse_layers("decoder") == (1, 3, 5, 7, 9, 11)
    assert sized("switch-c").sparse_layers("encoder") == tuple(range(15))


def test_a_router_has_the_papers_settings_and_mesh_tensorflows_where_the_paper_has_none() -> None:
    router = SwitchRouter()
    assert (router.capacity_factor, router.eval_capacity_factor, router.min_capacity) == (1.25, 2.0, 4)
    assert (router.balance_coef, router.z_loss_coef, router.overflow) == (0.01, 0.0, "position")
    assert (router.jitter, router.input_dropout, router.sample_temperature) == (0.01, 0.0, None)


# paper.md


ROOT = Path(__file__).resolve().parent.parent
REFERENCE = re.compile(r"`([\w./-]+)::([\w.]+)`")


@cache
def symbols(path: Path) -> frozenset[str]:
    """Functions, classes, their methods and the constants of a module."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def rows(text: str) -> list[tuple[int, list[str]]]:
    """The rows of the tables, without their heads, each with the number of its line."""
    lines = list(enumerate(text.splitlines(), start=1))
    rules = {number for number, line in lines if re.fullmatch(r"[|-]+", line)}  # beneath the heads
    return [
        (number, line.strip("|").split("|"))
        for number, line in lines
        if line.startswith("|") and not {number, number + 1} & rules
    ]


def faults(text: str) -> Iterator[str]:
    """References to what is not there, and rows that do not say where a thing is done or what proves it."""
    for number, line in enumerate(text.splitlines(), start=1):
        for path, symbol in REFERENCE.findall(line):
            if not (ROOT / path).is_file() or symbol not in symbols(ROOT / path):
                yield f"{number}: there is no {path}::{symbol}"
    for number, cells in rows(text):
        if len(cells) != 4:
            yield f"{number}: {len(cells)} columns, not 4"
            continue
        done, proved = (REFERENCE.findall(cell) for cell in cells[1:3])
        if not done or not all(path.startswith("switchcli/") for path, _ in done):
            yield f"{number}: the second column names what does it, in switchcli/"
        if not proved or not all(path.startswith("tests/") and name.startswith("test_") for path, name in proved):
            yield f"{number}: the third column names the tests that prove it"


def test_every_row_of_the_table_says_where_and_by_which_test_and_both_exist() -> None:
    text = (ROOT / "tests/paper.md").read_text(encoding="utf-8")
    assert len(rows(text)) > 50
    assert not list(faults(text))
