"""The table of sizes against the parameters and FLOPs of the paper (section 5.6 and Table 9)."""

import re

import pytest
from messages import naming_words

from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.recipe.sizes import SIZES, size_problem


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("t5-small", 60_506_624),
        ("t5-base", 222_903_552),
        ("t5-v1_0-base", 222_903_552),
        ("t5-large", 750_251_008),
        ("t5-v1_0-large", 737_668_096),
        ("t5-xxl", 11_003_736_064),
        ("t5-v1_1-xxl", 11_135_332_352),
        ("t5-3b", 2_851_598_336),
        ("t5-11b", 11_307_321_344),
        ("t5-v1_1-small", 76_961_152),
        ("t5-v1_1-base", 247_577_856),
        ("t5-v1_1-large", 783_150_080),
        ("t5-v1_1-xl", 2_849_757_184),
        ("switch-base", 7_415_217_408),
        ("switch-base-128", 7_415_217_408),
        ("switch-large", 27_120_888_832),
        ("switch-large-128", 26_309_291_008),
        ("switch-xxl", 201_263_656_960),
        ("switch-xxl-128", 394_675_073_024),
        ("switch-c", 1_571_308_972_448),
        ("switch-c-2048", 1_571_327_875_360),
    ],
)
def test_parameters_to_the_last_digit(name, parameters):
    assert count(ModelSpec(**SIZES[name]._asdict())).parameters == parameters


@pytest.mark.parametrize(
    ("experts", "millions"), [(8, 619.3), (16, 1072.4), (32, 1978.5), (64, 3790.7), (128, 7415.2), (256, 14664.2)]
)
def test_the_sweep_of_table_7(experts, millions):
    parameters = count(ModelSpec(**SIZES[f"switch-base-{experts}"]._asdict())).parameters
    assert round(parameters / 1e6, 1) == millions


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("switch-")])
def test_a_sparse_size_is_sparse(name):
    assert ModelSpec(**SIZES[name]._asdict()).num_experts > 1


@pytest.mark.parametrize("name", ["tiny", "mini", "small"])
def test_a_small_switch_size_has_the_flops_of_the_dense_one(name):
    sparse, dense = (ModelSpec(**SIZES[size]._asdict()) for size in (f"switch-{name}-8", name))
    assert count(sparse).flops == count(dense).flops


def test_an_unknown_size_has_a_way_out():
    assert size_problem("tiny") is size_problem("custom") is None
    assert re.match(naming_words("t5-bass t5-base"), size_problem("t5-bass"))
    assert re.match(naming_words(f"gpt {' '.join(SIZES)}"), size_problem("gpt"))
