"""The planner's meshes: collectives by hand, refusals in words, the order by time."""

import re
from typing import Any

import pytest
import torch

from switchcli.distributed.layout import is_stacked
from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.model.moe.router import SwitchRouter, TopKRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.planner.plan import Machine, Parameters, Plan, Planner, Rejection, flops_of, meshes, microbatch_sizes
from switchcli.planner.step import Mesh, RankWeights, Step, rank_weights
from switchcli.planner.traffic import Collective, collectives
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


def held_of(spec: ModelSpec, model: int = 1, state: Any = state_of) -> RankWeights:
    with torch.device("meta"):
        weights = dict(SwitchTransformer(spec).named_parameters())
    return rank_weights(weights, state(weights), model)


def calls(spec: ModelSpec, mesh: Mesh, microbatch: int, step: Step = STEP) -> dict[str, Collective]:
    return {
        f"{call.kind} {call.what}": call
        for call in collectives(spec, step, mesh, held_of(spec, mesh.model), microbatch)
    }


def planned(spec: ModelSpec, devices: int, microbatch: int | None = None, step: Step = STEP, gib: float = 80) -> Plan:
    return Planner(spec, step, state_of, microbatch).plan(Machine(devices, int(gib * 2**30)))


def test_one_device_has_no_collective() -> None:
    assert calls(SPARSE, Mesh(1), 64) == {}


def test_data_parallel_reduces_every_gradient_once_a_step() -> None:
    own = held_of(SPARSE)
    found = calls(SPARSE, Mesh(8), 2)
    assert found.keys() == {"all_reduce dense gradients", "all_reduce expert gradients"}
    dense, expert = found.values()
    assert (dense.calls, dense.ranks, dense.payload_bytes) == (1, 8, 4 * own.dense)
    assert (expert.axis, expert.payload_bytes) == ("data", 4 * own.expert)
    assert dense.network_bytes == 2 * 7 * 4 * own.dense / 8


def test_tokens_travel_four_times_a_layer_and_microbatch() -> None:
    found = calls(SPARSE, Mesh(8, expert=8), 2)
    dispatch = found["all_to_all encoder tokens, dispatch"]
    capacity = int(512 * 1.25 / 8)
    assert dispatch.payload_bytes == 2 * 8 * 2 * capacity * 64  # bfloat16: E experts, G groups, C slots, D
    assert (dispatch.calls, dispatch.axis, dispatch.ranks) == (2 * 2 * 4, "expert", 8)  # two layers, four microbatches
    assert dispatch.network_bytes == dispatch.calls * dispatch.payload_bytes * 7 / 8
    combine = found["all_to_all encoder tokens, combine"]
    assert (combine.calls, combine.payload_bytes) == (dispatch.calls, dispatch.payload_bytes)
    assert "all_reduce expert gradients" not in found  # every expert is there once


def test_experts_with_replicas_reduce_their_gradients_among_them() -> None:
    call = calls(SPARSE, Mesh(8, expert=4), 2)["all_reduce expert gradients"]
    assert (call.axis, call.ranks, call.payload_bytes) == ("replica", 2, held_of(SPARSE).expert)  # 4 bytes of a quarter


def test_without_a_capacity_a_row_for_each_choice_travels_after_the_counts() -> None:
    for router, choices in (
        (SwitchRouter(capacity_factor="dropless"), 1),
        (TopKRouter(capacity_factor="dropless", k=3), 3),
    ):
        found = calls(SPARSE.model_copy(update={"router": router}), Mesh(8, expert=8), 2)
        assert found["all_to_all encoder tokens, dispatch"].payload_bytes == 2 * choices * 2 * 512 * 64
        counts = found["all_to_all encoder counts"]
        assert (counts.calls, counts.payload_bytes) == (2 * 4, 8 * 8)


def test_experts_of_attention_send_queries_and_keys_back() -> None:
    found = calls(SPARSE.model_copy(update={"sparse": "both"}), Mesh(8, expert=8), 2)
    dispatch, combine = (
        found[f"all_to_all encoder tokens of attention, {way}"].payload_bytes for way in ("dispatch", "combine")
    )
    assert combine / dispatch == 2 * 64 / 64
    assert "all_to_all encoder tokens of feed_forward, dispatch" in found


def test_the_model_axis_sums_each_attention_and_feed_forward_both_ways() -> None:
    found = calls(DENSE, Mesh(2, model=2), 8)
    encoder, decoder = found["all_reduce encoder layers"], found["all_reduce decoder layers"]
    assert (encoder.calls, encoder.payload_bytes) == (2 * 2 * 2 * 4, 2 * 8 * 512 * 64)  # ways, parts, layers, times
    assert (decoder.calls, decoder.payload_bytes) == (2 * 3 * 2 * 4, 2 * 8 * 114 * 64)
    assert (found["all_reduce loss"].calls, found["all_reduce loss"].payload_bytes) == (2 * 4, 4 * 8 * 114)
    assert all(call.axis in ("model", "data") for call in found.values())


def test_zero_gathers_and_scatters() -> None:
    own = held_of(DENSE)
    for shard, gathers, scatters in (("zero2", 1, 1), ("zero3", 2 * 4, 4)):
        found = collectives(DENSE, STEP, Mesh(8, shard=shard), own, 2)  # type: ignore[arg-type]
        gathered = [call for call in found if call.kind == "all_gather"]
        whole = sum(call.calls * call.payload_bytes * 8 for call in gathered)
        root, blocks = 4 * own.units[0], 4 * (own.dense - own.units[0])
        assert whole == pytest.approx(blocks * gathers + root * (1 if shard == "zero2" else 4), rel=1e-3)
        scattered = sum(call.calls * call.payload_bytes for call in found if call.kind == "reduce_scatter")
        assert scattered == scatters * 4 * own.dense
        assert not [call for call in found if call.kind == "all_reduce"]


def test_every_mesh_is_planned_or_refused() -> None:
    found = planned(SPARSE, 16)
    assert {fit.mesh for fit in found.fits} | {one.mesh for one in found.rejected} == set(meshes(SPARSE, 16))
    assert all(mesh.data * mesh.model == 16 and mesh.data % mesh.expert == 0 for mesh in meshes(SPARSE, 16))
    assert [fit.step_seconds for fit in found.fits] == sorted(fit.step_seconds for fit in found.fits)


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


def test_products_are_those_of_the_formula_and_of_empty_slots() -> None:
    assert flops_of(DENSE, STEP, Mesh(4), 4) == 3 * 16 * count(DENSE, 512, 114).flops
    assert flops_of(DENSE, STEP, Mesh(2, model=2), 4) == flops_of(DENSE, STEP, Mesh(4), 4)
    # On 8 ranks of 8 sequences, each of the 2 layers of a stack also computes the empty slots of 8 experts.
    empty = 8 * 2 * ((8 * int(512 * 1.25 / 8) - 512) + (8 * int(114 * 1.25 / 8) - 114))
    routers = 3 * 2 * 64 * 2 * (512 + 114) * SPARSE.num_experts * SPARSE.d_model  # which each rank computes in full
    alone, halved = (flops_of(SPARSE, STEP, Mesh(1, model=model), 4) for model in (1, 2))
    assert alone - routers == 2 * (halved - routers)
    more = 3 * 2 * empty * 2 * SPARSE.d_model * SPARSE.d_ff
    assert flops_of(SPARSE, STEP, Mesh(8, expert=8), 4) - flops_of(SPARSE, STEP, Mesh(8), 4) == more


def test_what_is_computed_again_is_all_but_the_logits() -> None:
    again, mesh = STEP._replace(recomputed=True), Mesh(4)
    logits = 2 * 16 * DENSE.vocab_size * DENSE.d_model * 114
    assert flops_of(DENSE, again, mesh, 4) == 4 * 16 * count(DENSE, 512, 114).flops - logits
    for spec in (DENSE, SPARSE):
        for mesh in (Mesh(8), Mesh(4, model=2), Mesh(8, expert=8)):
            assert 1.25 < flops_of(spec, again, mesh, 4) / flops_of(spec, STEP, mesh, 4) < 4 / 3
    tokens, layers = (
        [calls(spec, mesh, 2, step)[name].calls for step in (STEP, again)]
        for spec, mesh, name in (
            (SPARSE, Mesh(8, expert=8), "all_to_all encoder tokens, dispatch"),
            (DENSE, Mesh(8, model=2), "all_reduce decoder layers"),
        )
    )
    assert [2 * number for number in (tokens[1], layers[1])] == [3 * number for number in (tokens[0], layers[0])]


def test_what_bounds_a_step_follows_the_rates() -> None:
    planner = Planner(SPARSE, STEP, state_of)
    fast = {"flops": 1e30, "memory_bandwidth": 1e30, "bandwidth": 1e30, "network": 1e30}
    for slow, rate, bound in (
        ("flops", 1e3, {"compute"}),
        ("memory_bandwidth", 1e3, {"memory"}),
        ("bandwidth", 1e3, {"data_axis", "expert_axis", "replica_axis"}),
    ):
        machine = Machine(8, 2**40, **(fast | {slow: rate}))
        assert {fit.bound_by for fit in planner.plan(machine).fits if fit.mesh.model == 1} <= bound


def test_weights_are_read_and_gradients_written_in_each_microbatch_and_the_optimizer_takes_five_accesses() -> None:
    own = held_of(SPARSE)
    held = own.dense + own.expert // 8  # by a rank, in two microbatches
    for recomputed, accesses in ((False, 2 * 3 + 5), (True, 2 * 4 + 5)):
        found = planned(SPARSE, 8, microbatch=4, step=STEP._replace(recomputed=recomputed)).fits
        fit = next(fit for fit in found if fit.mesh == Mesh(8, expert=8))
        assert fit.seconds["memory"] == pytest.approx(accesses * 4 * held / Machine(8, 1).memory_bandwidth)


def test_products_and_memory_access_overlap_and_collectives_add_to_the_step() -> None:
    for fit in planned(SPARSE, 8).fits:
        device = (fit.seconds["compute"], fit.seconds["memory"])
        assert fit.step_seconds == pytest.approx(max(device) + sum(fit.seconds.values()) - sum(device))


def test_a_group_within_a_node_has_the_nodes_bandwidth() -> None:
    machine = Machine(64, 2**40, bandwidth=300.0, network=25.0, node_devices=8)
    for experts, rate in ((4, 300.0), (8, 25.0)):  # of every second device
        experts_of_two = Collective("all_to_all", "expert", experts, "", 1, 1)
        assert machine.rate(experts_of_two, Mesh(16, expert=experts, model=2)) == rate
    mesh, smaller, wider = Mesh(16, expert=2, model=4), Mesh(4, expert=2, model=2), Mesh(8, expert=4, model=2)
    ways = (
        *((mesh, "model", 4, 300.0), (mesh, "expert", 2, 300.0), (mesh, "replica", 8, 25.0), (mesh, "data", 16, 25.0)),
        *((smaller, "replica", 2, 300.0), (wider, "replica", 2, 25.0)),  # every fourth device, every eighth
    )
    for mesh, axis, ranks, rate in ways:
        assert machine.rate(Collective("all_reduce", axis, ranks, "", 1, 1), mesh) == rate  # type: ignore[arg-type]


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


def test_each_device_orthogonalizes_the_dense_matrices_and_the_experts_that_it_has_whole() -> None:
    own = held_of(SPARSE, state=muon_of)
    dense, experts = 6 * 4 * SQUARE, 4 * 8 * 2 * ONE_MATRIX
    for mesh, share in {
        Mesh(8): 1,
        Mesh(8, expert=4): 4,
        Mesh(8, expert=4, shard="zero2"): 8,  # two replicas of two experts: one each
        Mesh(16, shard="zero2"): 1,  # sixteen replicas divide the width of all eight
    }.items():
        assert own.orthogonal_flops(mesh) == dense + experts / share, mesh
    machine = Machine(8, 80 * 2**30, flops=1e12, float32_flops=1e11)
    times = {
        state: {fit.mesh: fit.seconds["compute"] for fit in Planner(SPARSE, STEP, state).plan(machine).fits}
        for state in (state_of, muon_of)
    }
    for mesh, seconds in times[muon_of].items():
        more = held_of(SPARSE, mesh.model, muon_of).orthogonal_flops(mesh) / 1e11
        assert seconds == pytest.approx(times[state_of][mesh] + more), mesh


def test_muon_gathers_what_is_not_whole() -> None:
    own = held_of(SPARSE, state=muon_of)
    dense, experts = 4 * 6 * 4 * 64**2, 4 * own.expert  # float32 bytes of q, k, v and o
    model = held_of(SPARSE, 2, muon_of)
    for mesh, held, expected in (
        (Mesh(8), own, {}),
        (Mesh(8, expert=4), own, {}),
        (Mesh(8, expert=4, shard="zero2"), own, {"data dense": dense // 8}),
        (Mesh(16, shard="zero3"), own, {"data dense": dense // 16, "data expert": experts // 16}),
        (Mesh(4, expert=2, model=2), model, {"model dense": dense // 2, "model expert": experts // 4}),
        (
            Mesh(4, expert=2, model=2, shard="zero2"),
            model,
            {"data dense": dense // 8, "model dense": dense // 2, "model expert": experts // 8},
        ),
    ):
        found = {
            f"{call.axis} {call.what.removesuffix(' updates')}": call.calls * call.payload_bytes
            for call in collectives(SPARSE, STEP, mesh, held, 2)
            if call.what.endswith("updates")
        }
        assert found == expected, mesh


@pytest.mark.parametrize(
    "keys", [{}, {"sparse": "both", "activation": "geglu"}, {"expert_d_ff": 64, "shared_d_ff": 64}, {"num_experts": 1}]
)
def test_what_is_gathered_for_muon_is_what_it_updates(keys: dict[str, Any]) -> None:
    spec = SPARSE.model_copy(update={**keys, "tie_embeddings": False})
    with torch.device("meta"):
        state = muon_of(dict(SwitchTransformer(spec).named_parameters()))
    sizes = {True: 0, False: 0}
    for name, tensor in state.items():
        sizes[is_stacked(name)] += tensor.numel() if name.endswith("/momentum") else 0
    own = held_of(spec, state=muon_of)
    assert sizes == {True: own.expert, False: own.products}
