"""The rules between the parts of a recipe, and the schema that editors read."""

import json

import pytest
import torch
from messages import assert_line

from switchcli.data.objectives.packed_documents import WholeDocumentObjective
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.errors import RecipeError
from switchcli.model.moe.router import SwitchRouter, TopKRouter
from switchcli.recipe import resolve
from switchcli.recipe.schema import RECIPES, PretrainRecipe, editor_schema

TEXT = """\
model: {size: switch-tiny-8, vocab_size: 8192}
data:
  tokenizer: {kind: train, vocab_size: 8192}
train:
  steps: 100
  batch_tokens: 4096
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The recipe above with overrides."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(TEXT, encoding="utf-8")

    def recipe(*overrides):
        return resolve.resolve("mine.yaml", overrides, PretrainRecipe)

    return recipe


def test_a_dumped_recipe_resolves_to_an_equal_one(recipe, tmp_path):
    first = recipe("optimizer.kind=adamw", "schedule={kind: linear, warmup_steps: 3}", "log.trackers=[wandb]")
    (tmp_path / "recipe.yaml").write_text(resolve.dump(first), encoding="utf-8")
    again = resolve.resolve("recipe.yaml", [], PretrainRecipe)
    assert again == first
    assert isinstance(again.log.trackers, tuple)


@pytest.mark.parametrize(
    ("overrides", "where", "words"),
    [
        (["train.batch_tokens=1000"], -1, "train.batch_tokens 1000 512 1024"),
        (["train.microbatch_tokens=600"], -1, "train.microbatch_tokens 600 512 1024"),
        (["train.microbatch_tokens=1536"], -1, "train.microbatch_tokens 1536 train.batch_tokens 4096 1024"),
        (["train.microbatch_tokens=8192"], -1, "train.microbatch_tokens 8192 train.batch_tokens 4096 4096"),
        (
            ["model.router.group_sequences=3"],
            0,
            "train.batch_tokens 4096 1536 model.router.group_sequences 4608",
        ),
        (
            ["model.router.group_sequences=4", "train.microbatch_tokens=1024"],
            -1,
            "train.microbatch_tokens 1024 2048 model.router.group_sequences 2048",
        ),
        (["model.num_experts=200"], "mine.yaml:1", "decoder 114 200 model.router.group_sequences=2"),
        (
            ["model.decoder_router={capacity_factor: 0.05}"],
            -1,
            "model.decoder_router.capacity_factor 0.05 8 0.71 114 decoder 0.071",
        ),
        (
            ["model.router.eval_capacity_factor=0.01", "model.sparse_decoder_layers=[]"],
            0,
            "model.router.eval_capacity_factor 0.01 8 0.64 512 encoder 0.016",
        ),
        (
            ["model.router={kind: top_k, k: 3, capacity_factor: 2.9}"],
            0,
            "model.router.capacity_factor 2.9 3 3.75 dropless",
        ),
        (
            ["model.router={kind: top_k, k: 4, eval_capacity_factor: 2}", "model.sparse_encoder_layers=[]"],
            0,
            "model.router.eval_capacity_factor 2 4 5 dropless",
        ),
        (["model.router={kind: top_k, k: 6, keep_threshold: 0.2}"], 0, "model.router.keep_threshold 0.2 6 choices 0"),
        (["model.vocab_size=8000"], 0, "data.tokenizer.vocab_size 8192 8000 model.vocab_size"),
        (["schedule={kind: cosine, warmup_steps: 101}"], 0, "schedule.warmup_steps 101 train.steps 100 10"),
    ],
)
def test_parts_that_do_not_fit(recipe, overrides, where, words):
    """The line begins with the override of that index, or with the line of the file."""
    with pytest.raises(RecipeError) as raised:
        recipe(*overrides)
    (line,) = str(raised.value).splitlines()
    assert_line(line, where if isinstance(where, str) else f"override {overrides[where].partition('=')[0]}", words)


def test_the_line_is_that_of_the_key(recipe):
    with pytest.raises(RecipeError) as raised:
        recipe("data.objective.inputs_length=100", "model.vocab_size=200")
    first, second = str(raised.value).splitlines()
    assert first.startswith("mine.yaml:6: ")
    assert "model.vocab_size" in second


def test_a_key_left_to_its_default_has_the_line_of_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("train: {steps: 1, batch_tokens: 512}\nmodel: {vocab_size: 200}")
    with pytest.raises(RecipeError) as raised:
        resolve.resolve("mine.yaml", [], PretrainRecipe)
    assert_line(str(raised.value), "mine.yaml:2", "data.tokenizer.vocab_size 8192 200 model.vocab_size")


def test_auto_is_a_mapping_to_which_keys_are_added(recipe):
    for keys in (("parallel=auto", "parallel.shard=none"), ("parallel.shard=none", "parallel.auto=true")):
        assert recipe(*keys).parallel.auto
    with pytest.raises(RecipeError, match="auto"):
        recipe("parallel=auto", "parallel.data=2")


def test_a_dense_model_has_no_groups(recipe):
    assert recipe("model.num_experts=1", "model.router.group_sequences=3").model.group_sequences == 1


def test_an_objective_without_a_kind_is_span_corruption(recipe):
    assert recipe("data.objective.inputs_length=128").data.objective == SpanCorruption(inputs_length=128)
    assert recipe("data={objective: {noise_density: 0.5}}").data.objective == SpanCorruption(noise_density=0.5)


def test_another_kind_of_objective_replaces_the_first(recipe):
    found = recipe("data.objective={kind: prefix_lm, inputs_length: 64, targets_length: 32}")
    assert (found.inputs_length, found.targets_length) == (64, 32)
    assert recipe("data.packing=documents").data.rows == WholeDocumentObjective(SpanCorruption())
    assert recipe("data={tokenizer: {alpha: 0.3}, mixture: {kind: temperature}}").data.tokenizer.alpha == 0.3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data={packing: documents, objective: {kind: prefix_lm}}",
            "data.packing documents objective.kind=span_corruption prefix_lm packing=windows",
        ),
        (
            "data.objective={kind: prefix_lm, text_length: 1023}",
            "data.objective.text_length 1023 1022 inputs_length 512 targets_length 512",
        ),
        (
            "data.objective={kind: prefix_lm, mean_span_length: 3}",
            "data.objective.mean_span_length span_corruption",
        ),
        ("data.objective.kind=ul2", "data.objective.kind span_corruption prefix_lm ul2"),
        ("data={tokenizer: {alpha: 0.3}}", "data.tokenizer.alpha 0.3 mixture.kind=temperature"),
        ("data={access: stream, duplicates: drop}", "data.duplicates access=prepared"),
    ],
)
def test_objectives_that_cannot_be(recipe, override, words):
    with pytest.raises(RecipeError) as raised:
        recipe(override)
    assert_line(str(raised.value), f"override {override.partition('=')[0]}", words)


def test_a_router_without_a_kind_is_switch(recipe):
    assert recipe("model.router.jitter=0.5").model.router == SwitchRouter(jitter=0.5)
    assert recipe("model.router={kind: top_k, jitter: 0.5}").model.router == TopKRouter(jitter=0.5)


@pytest.mark.parametrize(("k", "expected"), [(2, (1.25, 2.0, 0.2)), (3, (3.75, 6.0, 0.0)), (8, (10.0, 16.0, 0.0))])
def test_more_than_two_choices_have_slots_for_all_by_default(recipe, k, expected):
    router = recipe("model.router.kind=top_k", f"model.router.k={k}").model.router
    assert (router.capacity_factor, router.eval_capacity_factor, router.keep_threshold) == expected
    assert recipe(f"model.router={{kind: top_k, k: {k}, capacity_factor: {k}}}").model.router.capacity_factor == k


def test_without_a_capacity_none_can_be_too_small(recipe):
    assert recipe("model.router={capacity_factor: dropless, eval_capacity_factor: dropless}")


def test_the_routers_precision_is_that_of_the_papers_arms(recipe):
    arms = {"float32": torch.float32, "selective": torch.float32, "bfloat16": torch.bfloat16}
    for precision, routers in arms.items():
        assert recipe(f"train.precision={precision}").train.router_dtype == routers


def test_t5s_constant_part_may_outlast_the_run(recipe):
    found = recipe("schedule={kind: inverse_square_root, warmup_steps: 10000}")
    assert found.schedule.warmup_steps > found.train.steps


@pytest.mark.parametrize("verb", RECIPES)
def test_the_schema_is_for_completion(verb):
    schema = editor_schema(verb)
    json.dumps(schema)
    kinds = schema.get("anyOf", [schema])
    for kind in kinds:
        assert {"extends", "verb"} <= kind["properties"].keys()
        if verb == "eval":
            assert {"tasks", "eval"} <= kind["properties"].keys()
        else:
            assert {"model", "train"} <= kind["properties"].keys()
        assert kind["additionalProperties"] is False
    if verb == "distill":
        assert ["tasks" in kind["properties"] for kind in kinds] == [False, True]
    if verb != "eval":
        assert "switch-c" in schema["$defs"]["ModelSpec"]["properties"]["size"]["enum"]
    assert not any("required" in part for part in (*kinds, *schema["$defs"].values()))
