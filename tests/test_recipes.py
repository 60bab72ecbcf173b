"""Every recipe that ships resolves, describes itself, and builds its model, on the meta device."""

import pytest
import torch

from switchcli.model.count import count
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe import library, resolve
from switchcli.recipe.schema import PretrainRecipe, standing_alone
from switchcli.recipe.training import TrainingRecipe


@pytest.mark.parametrize("name", library.names())
def test_a_shipped_recipe_resolves_and_builds(name, tmp_path):
    recipe = standing_alone(name)
    assert library.description(name)
    assert recipe.verb == (resolve.stated(resolve.load(name), "verb") or "pretrain")
    (tmp_path / "recipe.yaml").write_text(resolve.dump(recipe), encoding="utf-8")
    assert resolve.resolve(str(tmp_path / "recipe.yaml"), [], type(recipe)) == recipe
    if not isinstance(recipe, TrainingRecipe):
        return
    with torch.device("meta"):
        model = SwitchTransformer(recipe.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == count(recipe.model).parameters


def test_the_quickstarts_differ_in_their_experts_alone():
    switch, dense = (resolve.resolve(f"quickstart/{name}", [], PretrainRecipe) for name in ("switch", "dense"))
    assert switch.model.num_experts > 1
    alike = {"description": "", "model": switch.model.model_copy(update={"num_experts": 1})}
    assert switch.model_copy(update=alike) == dense.model_copy(update={"description": ""})
    assert count(switch.model).flops == count(dense.model).flops
