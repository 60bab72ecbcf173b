"""Every recipe that ships resolves, describes itself, and builds its model, on the meta device."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np
import pytest
import torch

from switchcli.model.flops import count
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe import library, resolve
from switchcli.recipe.schema import PretrainRecipe, resolve_standalone
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.sweep import sweep_list

ROOT = Path(__file__).resolve().parent.parent
LISTS = sorted((ROOT / "recipes").rglob("*.runs"))


@pytest.mark.parametrize("name", library.recipe_names())
def test_a_shipped_recipe_resolves_and_builds(name, tmp_path):
    recipe = resolve_standalone(name)
    assert library.description(name)
    assert recipe.verb == (resolve.load(name).stated("verb") or "pretrain")
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


@pytest.mark.unit("table1-full", "table2-small", "table9-full", "appendix_b-small")
@pytest.mark.parametrize("path", LISTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_run_of_a_list_resolves_and_finds_what_it_starts_from(path):
    runs = sweep_list.parse_sweep([str(path)], Path("out"))
    # Figure 13 looks at the models of Figure 4.
    before = (
        sweep_list.parse_list(path.parent.parent / "figure1/full.runs", [], Path("out"))
        if "appendix_e" in path.parts
        else []
    )
    made = {run.name: -1 for run in before} | {run.name: run.stage for run in runs}
    for run in runs:
        verb, name, *rest = run.arguments
        keys = [argument for argument in rest if library.is_override(argument)]
        assert resolve_standalone(name, keys).verb == verb
        folders = (argument.partition("@")[0] for argument in rest if argument.startswith("out/"))  # RUN@STEP: a branch
        for needed in (folder.removeprefix("out/") for folder in folders):
            assert made[needed] < run.stage, f"{run.name}: {needed} is not made before it"


PAPER = ROOT / "recipes" / "paper"
RESULTS = ROOT / "docs" / "results" / "paper"


@pytest.mark.parametrize(
    "folder",
    [path for path in sorted(PAPER.iterdir()) if path.is_dir() and path.name != "corpus"],
    ids=lambda path: path.name,
)
def test_a_table_of_the_paper_has_its_runs_at_full_scale_its_results_and_a_line_in_the_summary(folder):
    assert (folder / "full.runs").is_file()
    results = (RESULTS / f"{folder.name}.md").read_text(encoding="utf-8")
    assert f"paper/{folder.name}/" in results
    assert f"({folder.name}.md)" in (RESULTS / "index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shared", [0, 160, 178, 200])
def test_the_corpus_of_the_paper_finds_near_duplicates_at_the_stated_rate(shared):
    """Pairs of texts of 200 words, of which the first ones are shared."""
    loader = SourceFileLoader("make", str(ROOT / "recipes/paper/corpus/make"))
    make = module_from_spec(spec_from_loader("make", loader))
    loader.exec_module(make)
    draw, pairs = np.random.default_rng(7), 200
    first, second = draw.integers(1000, 10000, (2, pairs, 200))
    second[:, :shared] = first[:, :shared]
    found = [*make.near_duplicates(" ".join(map(str, words)) for words in (*first, *second))]
    assert not any(found[:pairs])
    grams = max(shared - 4, 0)
    rate = 1 - (1 - (grams / (2 * 196 - grams)) ** 8) ** 14
    assert abs(np.mean(found[pairs:]) - rate) <= 4 * np.sqrt(rate * (1 - rate) / pairs)
