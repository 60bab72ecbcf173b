"""scripts/bench against others, with tiny shapes: which rows there are, equal work, and rows that cannot run."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_spec("transformers") is None, reason="it compares with transformers"),
]
FOLDER = Path(__file__).resolve().parents[2] / "scripts/benchmarks"
TINY: dict[str, Any] = {"device": "cpu", "threads": 1, "shape": "tiny", "precision": "float32", "limit": 300}
STEP = {**TINY, "section": "step", "layers": 2, "optimizer": "adamw", "dropout": 0.1}
Import = Callable[[str], ModuleType]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """A function that imports a module of scripts/benchmarks, for one test.

    The names are common: scripts/documentation has a generate.py too, which another test may have imported.
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    ours = {path.stem for path in FOLDER.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in ours & set(sys.modules)}
    threads = torch.get_num_threads()
    yield __import__
    torch.set_num_threads(threads)
    for name in ours & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(others)


def said(benchmark: Import, build: Callable[..., Any], job: dict[str, Any], turns: int = 1) -> list[dict[str, Any]]:
    answers = io.StringIO()
    benchmark("contestants").serve(build, job, io.StringIO("turn\n" * turns), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(FOLDER), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("datasets") is None, reason="it compares with datasets")
def test_texts_are_prepared_and_loaded_with_equal_numbers_of_tokens(benchmark: Import, tmp_path: Path) -> None:
    data = benchmark("data")
    data.write_texts(tmp_path, 4)
    job = {**TINY, "section": "data", "folder": str(tmp_path), "processes": 1, "warm_up": 1}
    done = {
        who: said(benchmark, data.data_contestant, {**job, "who": who, "model": "tiny"})[-1]["done"]
        for who in (*data.PREPARING, "one thread", "a mixture of 8 texts")
    }
    assert done["prepare"] == done["map"] == done["load and map"] > 10**5
    assert done["one thread"] == done["a mixture of 8 texts"] == data.BATCHES * data.BATCH_TOKENS


def test_every_implementation_that_transformers_knows_has_a_row(benchmark: Import) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    peers = benchmark("peers")
    assert set(peers.EXPERTS_IMPLEMENTATIONS) == {"eager", *ALL_EXPERTS_FUNCTIONS.keys()}
    names = {row.name for row in peers.SPARSE_STEP}
    assert {f"transformers, {name} experts" for name in peers.EXPERTS_IMPLEMENTATIONS} <= names
    for rows in (peers.DENSE_STEP, peers.SPARSE_STEP, peers.LAYER, peers.DENSE_GENERATE, peers.SPARSE_GENERATE):
        assert len({row.name for row in rows}) == len(rows)


def test_a_row_or_a_shape_that_does_not_exist_is_refused() -> None:
    for arguments in (("layer", "--rows", "nonsense"), ("layer", "--shape", "huge"), ("nothing",)):
        done = bench(*arguments)
        assert done.returncode == 2, done.stderr
        assert arguments[-1] in done.stderr


@pytest.mark.parametrize("experts", [1, 4])
def test_a_step_of_both_has_equal_parameters_and_turns_with_figures(benchmark: Import, experts: int) -> None:
    build = benchmark("step").step_against_others
    found = {
        who: said(benchmark, build, {**STEP, "experts": experts, "who": who, "attention": "eager"}, turns=2)
        for who in ("switchcli", "transformers")
    }
    ours, theirs = found.values()
    assert ours[0]["parameters"] == theirs[0]["parameters"] > 0
    for first, *turns in (ours, theirs):
        assert len(first["warm_up"]) == len(turns) == 2
        assert all(turn["seconds"] > 0 and turn["cpu"] > 0 and turn["peak"] > 2**20 for turn in turns)


def test_an_implementation_that_is_refused_or_not_read_gives_a_reason(benchmark: Import) -> None:
    """transformers raises an error for some names, and accepts others that this model does not read."""
    build, peers = benchmark("step").step_against_others, benchmark("peers")
    for row in (*peers.SPARSE_EXPERTS, *peers.SPARSE_ATTENTION):
        first = said(benchmark, build, {**STEP, **row.job, "experts": 4})[0]
        assert ("refused" in first) == (row.name != "transformers, eager experts"), row.name
        if "refused" in first:
            assert "|" not in first["refused"]
            assert "\n" not in first["refused"]
    sdpa = said(benchmark, build, {**STEP, "experts": 1, "who": "transformers", "attention": "sdpa"})
    assert "refused" not in sdpa[0]


def uneven_layer(benchmark: Import) -> dict[str, Any]:
    """A job with a layer some of whose tokens are dropped."""
    sizes = benchmark("machine").SIZES
    sizes["uneven"] = sizes["tiny"]._replace(batch=4, source=64)
    return {**TINY, "section": "layer", "experts": 8, "shape": "uneven"}


def test_layers_with_a_capacity_keep_the_same_tokens(benchmark: Import) -> None:
    layer = benchmark("layer")
    job = uneven_layer(benchmark)
    ours = said(benchmark, layer.layer_against_others, {**job, "who": "switchcli"})[0]
    theirs = said(benchmark, layer.layer_against_others, {**job, "who": "transformers"})[0]
    assert ours["kept"] == pytest.approx(theirs["kept"], abs=1e-9)
    assert 0.5 < ours["kept"] < 1
    assert ours["parameters"] == theirs["parameters"]
    dropless = said(benchmark, layer.layer_against_others, {**job, "who": "switchcli", "capacity_factor": "dropless"})[
        0
    ]
    assert dropless["kept"] == 1


def test_other_ways_to_compute_the_layer_have_its_output(benchmark: Import) -> None:
    layer, job = benchmark("layer"), uneven_layer(benchmark)
    x_BSD = torch.randn(4, 64, 32)
    outputs = {}
    for who in ("switchcli", "padded", "one-hot"):
        module, forward, _ = layer.layer_of({**job, "who": who})
        with torch.no_grad():
            for number, weight in enumerate(module.parameters()):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
        outputs[who] = forward(x_BSD).reshape(x_BSD.shape)
    ours, *others = outputs.values()
    assert (ours == 0).all(-1).any(), "a token is dropped"
    for other in others:
        torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("experts", [1, 4])
def test_both_generate_the_same_answers(benchmark: Import, experts: int, beams: int) -> None:
    build = benchmark("generate").generate_against_others
    job = {**TINY, "section": "generate", "experts": experts, "beams": beams}
    ours, theirs = (said(benchmark, build, {**job, "who": who})[0] for who in ("switchcli", "transformers"))
    assert ours["answers"] == theirs["answers"]
    assert len(ours["answers"][0]) == benchmark("machine").SIZES["tiny"].target


def test_a_table_has_figures_and_refused_rows() -> None:
    options = ("--device", "cpu", "--threads", "1", "--shape", "tiny", "--rounds", "2", "--precision", "float32")
    done = bench(
        "step", *options, "--experts", "8", "--optimizers", "adamw",
        "--rows", "transformers, eager experts", "transformers, grouped_mm experts",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in done.stdout.splitlines() if line[:1] == "|"}
    assert " to " in rows["transformers, eager experts"]
    assert "not run: ValueError" in rows["transformers, grouped_mm experts"]
    assert len({line.count("|") for line in rows.values()}) == 1
