"""The planner's meshes: refusals in words, and those that divide least first."""

import re
from typing import Any

import pytest
import torch

from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.model.moe.router import SwitchRouter, TopKRouter
from switchcli.planner.meshes import Machine, Parameters, Plan, Planner, Rejection, meshes, microbatch_sizes
from switchcli.planner.step import Mesh, Step
from switchcli.recipe.sizes import SIZES
from switchcli.training.optimizer_specs import Adafactor, Muon

SHAPE: dict[str, Any] = {"vocab_size": 512, "d_model": 64, "d_ff": 256, "d_kv": 16, "num_heads": 4, "num_layers": 2}
SPARSE = ModelSpec(**SHAPE, num_experts=8, sparse_every=1, router=SwitchRouter(capacity_factor=1.25))
DENSE = ModelSpec(**SHAPE)
STEP = Step(64, 512, 114)


def state_of(weights: Parameters) -> dict[str, torch.Tensor]:
    return Adafactor().build(weights).state()


def muon_of(weights: Parameters) -> dict[str, torch.Tensor]:
    return Muon().build(weights).state()


def planned(spec: ModelSpec, devices: int, microbatch: int | None = None, step: Step = STEP, gib: float = 80) -> Plan:
    return Planner(spec, step, state_of, microbatch).plan(Machine(devices, int(gib * 2**30)))


def test_every_mesh_is_planned_or_refused() -> None:
    found = planned(SPARSE, 16)
    assert {fit.mesh for fit in found.fits} | {one.mesh for one in found.rejected} == set(meshes(SPARSE, 16))
    assert all(mesh.data * mesh.model == 16 and mesh.data % mesh.expert == 0 for mesh in meshes(SPARSE, 16))


@pytest.mark.parametrize(
    ("spec", "devices", "gib", "microbatch", "first"),
    [
        (DENSE, 1, 80, None, Mesh(1)),
        (DENSE, 8, 80, None, Mesh(8)),
        (SPARSE, 8, 80, None, Mesh(8)),
        (SPARSE, 8, 0.036, 1, Mesh(8)),
        (SPARSE, 8, 0.035, 1, Mesh(8, expert=2)),
        (SPARSE, 8, 0.024, 1, Mesh(8, expert=4)),
        (SPARSE, 8, 0.0190, 1, Mesh(8, expert=8, shard="zero2")),
        (SPARSE, 8, 0.0180, 1, Mesh(8, expert=8, shard="zero3")),
        (SPARSE, 8, 0.0175, 1, Mesh(4, expert=2, model=2)),
        (DENSE, 8, 0.0170, 1, Mesh(8, shard="zero2")),
        (DENSE, 8, 0.0160, 1, Mesh(8, shard="zero3")),
        (DENSE, 2, 0.0165, 1, Mesh(1, model=2)),
    ],
)
def test_the_mesh_that_divides_least_is_first(
    spec: ModelSpec, devices: int, gib: float, microbatch: int | None, first: Mesh
) -> None:
    """In the order: no division, experts, zero2, zero3, the model axis; then the larger microbatch."""
    best = planned(spec, devices, microbatch, gib=gib).best
    assert best is not None
    assert best.mesh == first


def test_a_larger_microbatch_is_before_fewer_parts_of_the_experts() -> None:
    fits = [fit for fit in planned(SPARSE, 8, gib=0.06).fits if fit.mesh.shard == "none" and fit.mesh.model == 1]
    divided = [fit.microbatch for fit in fits if fit.mesh.expert > 1]
    assert divided == sorted(divided, reverse=True)


def test_the_seconds_of_a_step_are_its_flops_over_those_of_the_devices() -> None:
    planner, flops = Planner(SPARSE, STEP, state_of), 3 * 64 * count(SPARSE, 512, 114).flops
    assert planner.seconds(Machine.of_gpu(8, "h100")) == pytest.approx(flops / (8 * 0.4 * 989e12))
    float32 = Planner(SPARSE, STEP._replace(product_bytes=4), state_of)
    assert float32.seconds(Machine.of_gpu(8, "h100")) == pytest.approx(flops / (8 * 0.4 * 67e12))
    assert planner.seconds(Machine(8, 2**40)) is None


def reason(found: Plan, **mesh: Any) -> str:
    (only,) = {one.reason for one in found.rejected if one.mesh._asdict().items() >= mesh.items()}
    return only


def test_a_mesh_is_refused_by_the_models_sizes() -> None:
    found = planned(SPARSE, 16)
    assert re.search(r"parallel\.expert \(16\).*\b8 experts\b.*model\.num_experts", reason(found, expert=16))
    assert re.search(r"model\.num_heads \(4\).*parallel\.model \(8\)", reason(found, model=8))
    odd = SPARSE.model_copy(update={"d_ff": 255, "vocab_size": 511})
    assert re.search(r"model\.d_ff \(255\).*parallel\.model \(2\)", reason(planned(odd, 2), model=2))
    odd = SPARSE.model_copy(update={"vocab_size": 511})
    assert re.search(r"model\.vocab_size \(511\).*parallel\.model \(2\)", reason(planned(odd, 2), model=2))
    both = SPARSE.model_copy(update={"sparse": "both"})
    assert re.search(r"parallel\.model \(2\).*\bexperts\b.*\battention\b", reason(planned(both, 2), model=2))


def test_a_mesh_is_refused_by_the_batch() -> None:
    too_many = reason(planned(DENSE, 128), data=128)
    assert re.search(r"train\.batch_tokens\b.*\b64 sequences\b.*\b128 ranks\b", too_many)
    grouped = SPARSE.model_copy(update={"router": SwitchRouter(group_sequences=8)})
    no_groups = reason(planned(grouped, 16), data=16, expert=1)
    assert re.search(r"\b4 sequences\b.*\b16 ranks\b.*model\.router\.group_sequences: 8\b", no_groups)
    uneven = reason(planned(DENSE, 16, microbatch=3), data=16)
    assert re.search(r"train\.microbatch_tokens \(1536\).*train\.batch_tokens \(32768\).*\b16 ranks\b", uneven)


def test_a_mesh_is_refused_by_the_memory() -> None:
    refused = {one.mesh: one for one in planned(SPARSE, 8, gib=0.02).rejected}
    one = refused[Mesh(8)]
    assert isinstance(one, Rejection)
    assert one.kind == "memory"
    assert re.search(r"\b0\.0321 GiB\b.*\b0\.02 GiB\b.*\b1 sequence.*\bweights\b", one.reason)
    assert one.bytes_needed > 0.02 * 2**30


def test_the_microbatch_is_the_most_that_fits() -> None:
    roomy, tight = planned(DENSE, 1).fits[0], planned(DENSE, 1, gib=0.2).fits[0]
    assert (roomy.microbatch, tight.bytes.total <= 0.2 * 2**30) == (64, True)
    assert 1 <= tight.microbatch < 64
    assert planned(DENSE, 1, microbatch=16).fits[0].microbatch == 16
    assert microbatch_sizes(24, 4) == [24, 12, 8, 4]


ONE_MATRIX = 5 * (2 * 64**2 * 256 + 2 * 64**3 + 2 * 64**2 * 256)
"""Products x x^T, its square, and that times x, of a matrix [64, 256], in five iterations."""
SQUARE = 5 * 6 * 64**3


def test_muon_takes_the_products_of_each_matrix_once() -> None:
    planner = Planner(SPARSE, STEP, muon_of)
    # Two layers of each stack with 8 experts of two matrices; q, k, v and o of 2 + 4 attentions.
    assert planner.optimizer_flops_per_step == 4 * 8 * 2 * ONE_MATRIX + 6 * 4 * SQUARE
    dense = Planner(DENSE, STEP, muon_of)
    assert dense.optimizer_flops_per_step == 4 * 2 * ONE_MATRIX + 6 * 4 * SQUARE
    assert (dense.orthogonal_share, Planner(SPARSE, STEP, state_of).orthogonal_share) == (0, 0)
    assert Planner(SPARSE, STEP, state_of).optimizer_flops_per_step == 0


@pytest.mark.parametrize(
    ("size", "batch_tokens", "share"),
    [("switch-base-128", 2**20, 0.35), ("switch-base-128", 2**16, 5.6), ("switch-c", 2**20, 15.8)],
)
def test_for_an_expert_muon_takes_the_more_the_fewer_tokens_it_gets(size: str, batch_tokens: int, share: float) -> None:
    spec = ModelSpec(**SIZES[size]._asdict())
    planner = Planner(spec, Step(batch_tokens // 512, 512, 114), muon_of)
    assert planner.orthogonal_share == pytest.approx(share, rel=0.01)
    twice = spec.model_copy(update={"router": TopKRouter(k=2), "decoder_router": None})
    two = Planner(twice, Step(batch_tokens // 512, 512, 114), muon_of)
    assert two.orthogonal_share == pytest.approx(planner.orthogonal_share / 2)
