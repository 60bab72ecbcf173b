"""Layers, overrides, sizes and round trips, on a toy schema with the shapes of the real one."""

import math
import re
import shlex
from itertools import permutations
from typing import Annotated, Literal

import pytest
from cpu_ratio import cpu_ratio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from messages import assert_line, naming_words
from pydantic import Field, model_validator

from switchcli.errors import RecipeError
from switchcli.recipe import library
from switchcli.recipe.resolve import dump, load, padded_vocab_size, resolve
from switchcli.recipe.schema import PretrainRecipe
from switchcli.recipe.sizes import SIZES
from switchcli.spec import Spec


class Router(Spec):
    kind: Literal["switch"] = "switch"
    capacity_factor: float = 1.25


class Model(Spec):
    size: str = "custom"
    d_model: int = Field(default=512, ge=1)
    d_ff: int = 2048
    d_kv: int | None = None
    num_heads: int = 8
    num_layers: int = 6
    num_decoder_layers: int | None = None
    activation: Literal["relu", "geglu"] = "relu"
    tie_embeddings: bool = True
    num_experts: int = Field(default=1, ge=1)
    sparse_every: int = 2
    router: Router = Router()

    @model_validator(mode="after")
    def _rules(self):
        if self.num_experts > 100 and self.d_ff < 10:
            raise ValueError(f"d_ff ({self.d_ff}) is too small", "the model is too wide")
        return self


class Files(Spec):
    kind: Literal["files"] = "files"
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    weight: float = 1.0


class Hub(Spec):
    kind: Literal["hub"] = "hub"
    path: str
    revision: str | None = None


class Train(Spec):
    steps: int = Field(ge=1)
    learning_rate: float = Field(default=0.1, gt=0.0)
    note: str = ""


class Adafactor(Spec):
    kind: Literal["adafactor"] = "adafactor"
    scale_by_parameter: bool = True
    epsilon: float = 1e-30


class AdamW(Spec):
    kind: Literal["adamw"] = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    epsilon: float = 1e-8


class Toy(Spec):
    model: Model = Model()
    corpora: Annotated[tuple[Annotated[Files | Hub, Field(discriminator="kind")], ...], Field(min_length=1)] = (
        Hub(path="a/b"),
    )
    train: Train = Train(steps=1)
    optimizer: Annotated[Adafactor | AdamW, Field(discriminator="kind")] = Adafactor()

    @model_validator(mode="after")
    def _rules(self):
        if self.train.steps == 13:
            raise ValueError("train.steps (13) must be a lucky number: try 7.")
        return self


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    return write


@pytest.fixture
def toy(write):
    """The recipe `text` and overrides, resolved."""

    def toy(text, *overrides):
        write("mine.yaml", text)
        return resolve("mine.yaml", overrides, Toy)

    return toy


@pytest.fixture
def errors(toy):
    """The lines by which they are refused."""

    def errors(text, *overrides):
        with pytest.raises(RecipeError) as raised:
            toy(text, *overrides)
        return str(raised.value).splitlines()

    return errors


def test_a_file_becomes_a_frozen_value(toy):
    recipe = toy("train: {steps: 3, learning_rate: 1}\ncorpora: [{kind: files, paths: [a, b]}]")
    assert recipe.train == Train(steps=3, learning_rate=1.0)
    assert recipe.corpora == (Files(paths=("a", "b")),)


def test_a_chain_of_extends_is_relative_to_each_file(write):
    write("base/one.yaml", "train: {steps: 3, note: one}\ncorpora: [{kind: files, paths: [a]}]")
    write("base/two.yaml", "extends: one.yaml\ntrain: {note: two}")
    write("mine/three.yaml", "extends: ../base/two.yaml\ncorpora: [{kind: hub, path: x}]")
    recipe = resolve("mine/three.yaml", [], Toy)
    assert recipe.train == Train(steps=3, note="two")
    assert recipe.corpora == (Hub(path="x"),)


def test_extends_may_name_a_recipe_that_ships(write):
    write("mine.yaml", "extends: quickstart/switch")
    with pytest.raises(RecipeError, match=r"quickstart/switch\.yaml:\d+: data\b"):  # no key of the toy schema
        resolve("mine.yaml", [], Toy)


@pytest.mark.parametrize(
    ("extends", "where", "words"),
    [
        ("mine.yaml", "mine.yaml:1", "extends mine.yaml"),
        ("other.yaml", "other.yaml:1", "extends mine.yaml"),
        ("none.yaml", "mine.yaml:1", "extends none.yaml"),
        ("quickstart/swich", "mine.yaml:1", "extends quickstart/swich quickstart/switch"),
        ("[a, b]", "mine.yaml:1", "extends path"),
        ("3", "mine.yaml:1", "extends path"),
    ],
)
def test_extends_that_cannot_be_followed(write, extends, where, words):
    write("mine.yaml", f"extends: {extends}")
    write("other.yaml", "extends: mine.yaml")
    with pytest.raises(RecipeError) as raised:
        resolve("mine.yaml", [], Toy)
    assert_line(str(raised.value), where, words)


@pytest.mark.parametrize("text", ["", "\n\n", "- a", "word", "3"])
def test_a_recipe_is_a_mapping(errors, text):
    assert_line(errors(text)[0], "mine.yaml:1", "mapping")


def test_another_kind_keeps_the_keys_that_it_has_too(write, toy):
    write("base.yaml", "optimizer: {kind: adamw, weight_decay: 0.5, beta1: 0.5, epsilon: 0.1}")
    base = AdamW(weight_decay=0.5, beta1=0.5, epsilon=0.1)
    assert toy("extends: base.yaml\noptimizer: {beta1: 0.1}").optimizer == base.model_copy(update={"beta1": 0.1})
    assert toy("extends: base.yaml\noptimizer: {kind: adamw}").optimizer == base
    assert toy("extends: base.yaml\noptimizer: {kind: adafactor}").optimizer == Adafactor(epsilon=0.1)
    assert toy("extends: base.yaml", "optimizer.kind=adafactor").optimizer == Adafactor(epsilon=0.1)


def test_a_kind_over_a_mapping_that_leaves_its_kind_to_the_default_does_the_same(toy):
    text = "optimizer: {scale_by_parameter: false, epsilon: 0.1}"
    assert toy(text, "optimizer.kind=adamw").optimizer == AdamW(epsilon=0.1)
    assert toy(text, "optimizer.kind=adafactor").optimizer == Adafactor(scale_by_parameter=False, epsilon=0.1)


def test_a_default_of_another_meaning_does_not_carry_over(toy):
    """The recipe.yaml of a run states every default."""
    assert toy("optimizer: {kind: adafactor, epsilon: 1e-30}", "optimizer.kind=adamw").optimizer == AdamW()
    assert toy("optimizer: {epsilon: 1e-30}", "optimizer.kind=adamw").optimizer == AdamW()
    assert toy("optimizer: {kind: adamw, epsilon: 1e-8}", "optimizer.kind=adafactor").optimizer == Adafactor()


def test_a_saved_recipe_takes_another_kind(tmp_path):
    saved = tmp_path / "recipe.yaml"
    saved.write_text(dump(resolve("quickstart/switch", [], PretrainRecipe)))
    keys = [
        "optimizer.kind=adamw",
        "schedule.kind=wsd",
        "model.router.kind=expert_choice",
        "model.decoder_router={kind: switch}",
    ]
    found = resolve(str(saved), keys, PretrainRecipe)
    assert (found.optimizer.epsilon, found.schedule.learning_rate) == (1e-8, 0.03)
    assert found.model.router.eval_capacity_factor == 1.25
    with pytest.raises(RecipeError, match=r"data\.tokenizer\.path"):
        resolve("quickstart/switch", ["data.tokenizer.kind=hub"], PretrainRecipe)


def test_a_key_that_no_kind_has_is_an_error_below_another_kind_too(errors):
    (line,) = errors("optimizer: {kind: adafactor, epsilonn: 0.1}", "optimizer.kind=adamw")
    assert_line(line, "mine.yaml:1", "optimizer.epsilonn epsilon")


@pytest.mark.parametrize("kind", ["{}", "[cosine]"])
def test_a_kind_that_is_no_text_is_an_error(kind):
    with pytest.raises(RecipeError, match=r"schedule\.kind: must be one of .*cosine"):
        resolve("quickstart/switch", [f"schedule.kind={kind}"], PretrainRecipe)


# --- sizes


def test_a_size_fills_the_keys_that_its_own_file_does_not_state(toy):
    model = toy("model: {d_ff: 99, size: switch-c}").model
    assert (model.d_ff, model.d_model, model.num_experts, model.sparse_every) == (99, 2080, 2048, 1)


def test_a_size_beats_what_a_parent_states(write, toy):
    write("base.yaml", "model: {size: t5-base, d_model: 96, num_decoder_layers: 3, router: {capacity_factor: 3}}")
    assert toy("extends: base.yaml").model.d_model == 96
    model = toy("extends: base.yaml\nmodel: {size: t5-small}").model
    assert (model.d_model, model.num_decoder_layers, model.activation) == (512, None, "relu")
    assert model.router.capacity_factor == 3


def test_what_a_child_states_beats_the_size_of_its_parent(write, toy):
    write("base.yaml", "model: {size: switch-base-8}")
    model = toy("extends: base.yaml\nmodel: {num_experts: 1}").model
    assert (model.num_experts, model.d_model) == (1, 768)


@pytest.mark.parametrize(
    "overrides",
    [("model.size=tiny", "model.d_ff=7"), ("model.d_ff=7", "model.size=tiny"), ("model={size: tiny, d_ff: 7}",)],
)
def test_the_command_line_is_one_layer(toy, overrides):
    model = toy("model: {size: t5-base, d_model: 5, d_ff: 6}", *overrides)
    assert (model.model.d_ff, model.model.d_model) == (7, 128)


def test_every_size_fills_every_one_of_its_keys(toy):
    for name, size in SIZES.items():
        model = toy(f"model: {{size: {name}}}").model
        assert {key: getattr(model, key) for key in size._fields} == size._asdict()


def test_a_long_word_and_many_errors_are_told_at_once(errors):
    """What is found by a pattern takes time in proportion, and a hundred errors are enough."""

    def tell(count: int) -> None:
        assert len(errors(f"model: {{num_experts: 101, d_ff: 9, size: {'x' * (100 * count)}}}")) == 3
        told = errors("".join(f"unknown_{number}: 1\n" for number in range(count)))
        assert len(told) == 101
        assert f"{count - 100:,}" in told[-1]

    assert cpu_ratio(lambda: tell(2000), lambda: tell(200), turns=2) < 30


def test_an_unknown_size_is_one_of_the_errors(errors):
    size, d_modl = errors("model:\n  size: swich-base-8\n  d_modl: 3")
    assert_line(size, "mine.yaml:2", "model.size swich-base-8 switch-base-8")
    assert_line(d_modl, "mine.yaml:3", "model.d_modl d_model")


# --- overrides


def test_overrides_reach_into_lists_and_split_at_the_first_equals_sign(toy):
    text = "train: {steps: 1}\ncorpora: [{kind: files, paths: [a, b]}, {kind: hub, path: x}]"
    recipe = toy(text, "corpora.0.paths.1=c=d", "corpora.1.path=y", "train.note='5'")
    assert recipe.corpora == (Files(paths=("a", "c=d")), Hub(path="y"))
    assert recipe.train.note == "5"


def test_overrides_are_read_as_yaml_and_the_last_wins(toy):
    recipe = toy(
        "train: {steps: 1}",
        "train.learning_rate=1e-4",
        "train.learning_rate=1e-3",
        "train.note=no",
        "corpora=[{kind: hub, path: z}]",
    )
    assert recipe.train.learning_rate == 1e-3
    assert recipe.train.note == "no"
    assert recipe.corpora == (Hub(path="z"),)


@pytest.mark.parametrize("order", [1, -1])
def test_a_kind_does_not_wipe_out_its_keys_whatever_the_order(toy, order):
    overrides = ["optimizer.weight_decay=0.5", "optimizer.kind=adamw"][::order]
    assert toy("optimizer: {kind: adafactor, scale_by_parameter: false}", *overrides).optimizer == AdamW(
        weight_decay=0.5
    )
    overrides = ["optimizer.beta1=0.5", "optimizer={kind: adamw, weight_decay: 1}"][::order]
    for text in ("{}", "optimizer: {kind: adafactor, scale_by_parameter: false}"):
        assert toy(text, *overrides).optimizer == AdamW(weight_decay=1.0, beta1=0.5)
    overrides = ["corpora.0.path=z", "corpora=[{kind: hub, path: x}]"][::order]
    assert toy("corpora: [{kind: hub, path: a}]", *overrides).corpora == (Hub(path="z"),)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("a..b=3", "KEY=VALUE"),
        ("train.steps=[1", "YAML ']'"),
        ("train.note=*x", "alias 'x'"),
        ("extends=x", "extends file"),
        ("a." * 40 + "b=1", "32"),
        ("corpora.2.path=x", "corpora 2 1 0"),
        ("corpora.x=1", "corpora x 1 0"),
        ("model.d_model=-3", "model.d_model 1 -3 512"),
        ("optimizer.nam=x", "optimizer.nam kind scale_by_parameter"),
        ("steps=3", "steps train.steps"),
        ("train.note='\x1b[2J'", r"'\x1b'"),
    ],
)
def test_an_override_that_is_wrong_is_named_by_its_key(errors, override, words):
    key = override.partition("=")[0] or "''"
    assert_line(errors("corpora: [{kind: hub, path: x}]", override)[0], f"override {key}", words)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_override_reaches_the_last_item_of_a_list_and_none_behind_it(toy, errors, length):
    text = f"corpora: [{', '.join(['{kind: hub, path: x}'] * length)}]"
    assert toy(text, f"corpora.{length - 1}.path=y").corpora[-1] == Hub(path="y")
    (line,) = errors(text, f"corpora.{length}.path=y")
    assert_line(line, f"override corpora.{length}.path", f"corpora {length} {length} 0")


def test_an_override_may_be_32_keys_deep(errors):
    deepest = ".".join(["a"] * 32)
    assert_line(errors("{}", f"{deepest}=1")[0], f"override {deepest}", "a model corpora train optimizer")
    assert_line(errors("{}", f"{deepest}.a=1")[0], f"override {deepest}.a", "32")


# --- round trip


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "train.learning_rate": st.floats(min_value=5e-324, allow_infinity=False, allow_nan=False),
            "train.steps": st.integers(14),
            "model.size": st.sampled_from(["custom", *SIZES]),
            "model.d_model": st.integers(1),
            "model.num_decoder_layers": st.none() | st.integers(-3, 3),
            "model.router.capacity_factor": st.floats(allow_infinity=False, allow_nan=False) | st.integers(-9, 9),
            "optimizer": st.sampled_from(["{kind: adamw}", "{kind: adafactor, scale_by_parameter: false}"]),
        },
    ),
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_dump_resolves_to_an_equal_value(toy, overrides, paths):
    first = toy(
        "train: {steps: 1}", *(f"{key}={value if value is not None else 'null'}" for key, value in overrides.items())
    )
    first = first.model_copy(update={"corpora": (Files(paths=tuple(paths)),)})
    again = toy(dump(first))
    assert again == first
    assert dump(again) == dump(first)
    assert math.copysign(1, again.model.router.capacity_factor) == math.copysign(1, first.model.router.capacity_factor)


# --- errors


def test_all_errors_at_once_each_with_its_line_and_way_out(errors):
    text = """\
model:
  num_expert: 3
  d_ff: '12'
  activation: rely
  tie_embeddings: no
  num_heads: 1.5
  router: {kind: swich, capasity_factor: 1}
corpora:
  - kind: hub
    path: 3
  - {kind: files, path: x}
  - {kind: filez}
  - {path: x}
  - word
train: {learning_rate: .nan, steps: 1_024}
optimizer: {kind: adafactor, weight_decay: 1}
steps: 3
zzz: 1
"""
    wanted = [
        (2, "model.num_expert num_experts"),
        (3, "model.d_ff integer '12' 12 12"),
        (4, "model.activation relu geglu rely relu"),
        (5, "model.tie_embeddings true false 'no' false"),
        (6, "model.num_heads integer 1.5 8"),
        (7, "model.router.kind switch swich"),
        (7, "model.router.capasity_factor capacity_factor"),
        (10, "corpora.0.path 3 3 '3'"),
        (11, "corpora.1.path paths"),
        (12, "corpora.2.kind files hub filez files"),
        (13, "corpora.3.kind files hub"),
        (14, "corpora.4 mapping word"),
        (15, "train.steps integer 1_024 1024"),
        (15, "train.learning_rate finite nan 0.1"),
        (16, "optimizer.weight_decay adamw"),
        (17, "steps train.steps"),
        (18, "zzz model corpora train optimizer"),
    ]
    for line, (number, words) in zip(errors(text), wanted, strict=True):
        assert_line(line, f"mine.yaml:{number}", words)


def test_a_kind_that_is_misspelt_as_a_key_is_named(errors):
    (line,) = errors("corpora: [{kid: files, paths: [a]}]")
    assert_line(line, "mine.yaml:1", "corpora.0.kind files hub kid kind")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: null", "train mapping null"),
        ("train: [1]", "train mapping list"),
        ("corpora: {a: b}", "corpora list mapping"),
        ("corpora: []", "corpora 1 list"),
        ("optimizer: {kind: 3}", "optimizer.kind adafactor adamw 3"),
        ("train:\n  note: x", "train.steps=VALUE"),
        ("train: {steps: 1e3}", "train.steps integer 1000.0 1000"),
        ("train: {steps: .inf}", "train.steps integer inf"),
        ("train: {steps: true}", "train.steps integer true"),
        ("train: {steps: 1, learning_rate: 0}", "train.learning_rate 0 0 0.1"),
        ('"a\\nb": 1', r"'a\nb' model corpora train optimizer"),
    ],
)
def test_one_error(errors, text, words):
    (line,) = errors(text)
    assert_line(line, "mine.yaml:1", words)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("train: {learning_rate: x}", (), "train.learning_rate x 0.5 (base.yaml:1)"),
        ("train: {note: x}", ("train.learning_rate=-1",), "train.learning_rate -1 0.5 (base.yaml:1)"),
        ("train: {learning_rate: 0.25}", ("train.learning_rate=x",), "train.learning_rate x 0.25 (mine.yaml:2)"),
        ("", ("train.learning_rate=2", "train.learning_rate=x"), "x 2 (override train.learning_rate)"),
        ("train: null", (), "train mapping null a mapping (base.yaml:1)"),
        ("model: {size: t5-base, d_model: x}", (), "model.d_model x 768 (mine.yaml:2)"),
        ("model: {num_decoder_layers: x}", (), "model.num_decoder_layers x null (base.yaml:2)"),
        ("optimizer: {weight_decay: x}", (), "optimizer.weight_decay x 0.125 (base.yaml:3)"),
        ("model: {num_heads: x}", (), "model.num_heads x default 8"),
        ("optimizer: {kind: adafactor, epsilon: x}", (), "optimizer.epsilon x default 1e-30"),
    ],
)
def test_a_wrong_value_can_be_left_out_for_the_one_of_the_layer_below_else_the_default(
    write, errors, text, overrides, words
):
    write(
        "base.yaml",
        "train: {steps: 1, learning_rate: 0.5}\nmodel: {num_decoder_layers: null}\n"
        "optimizer: {kind: adamw, weight_decay: 0.125, epsilon: 1e-8}",
    )
    (line,) = errors(f"extends: base.yaml\n{text}", *overrides)
    assert re.search(naming_words(words), line), line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("schedule.warmup_steps=5%", "5% 20 400"),
        ("schedule.warmup_steps=0.25", "0.25 100 400"),
        ("eval.every_steps=12.5 %", "12.5 % 50 400"),
        ("checkpoint.save_every_steps=0.1%", "0.1% 1 400"),
        ("train.clip_norm=20%", "20% 0.2"),
        ("train.steps=5%", "5% 800"),
        ("model.num_layers=5%", "5% 2"),
    ],
)
def test_a_share_of_the_steps_is_answered_with_their_number(override, words):
    steps = [] if override.startswith("train.steps") else ["train.steps=400"]
    with pytest.raises(RecipeError) as error:
        resolve("quickstart/switch", [*steps, override], PretrainRecipe)
    assert_line(str(error.value), f"override {override.partition('=')[0]}", words)


def test_rules_of_a_spec_have_the_line_of_the_key_they_start_with(errors):
    assert errors("model:\n  num_experts: 101\n  d_ff: 3") == [
        "mine.yaml:1: model: the model is too wide",
        "mine.yaml:3: model.d_ff (3) is too small",
    ]
    assert errors("train:\n\n  steps: 13") == ["mine.yaml:3: train.steps (13) must be a lucky number: try 7."]
    assert errors("{}", "train.steps=13")[0].startswith("train.steps (13) must")


def test_an_error_in_a_parent_names_the_parent(write, errors):
    write("base.yaml", "train:\n  stepz: 3\n  steps: 1")
    assert_line(errors("extends: base.yaml\ntrain: {note: x}")[0], "base.yaml:2", "train.stepz steps")


def test_a_rule_of_two_keys_names_the_one_that_is_nearest_to_the_user() -> None:
    """d_model and num_heads are stated by the recipe that ships, and each layer above it may break their rule."""
    with pytest.raises(RecipeError) as error:
        resolve("quickstart/switch", ["model.num_heads=5"], PretrainRecipe)
    assert_line(error.value.lines[0], "override model.num_heads", "model.num_heads (5) d_model (64) num_heads: 4")


def test_a_rule_of_two_keys_names_the_file_that_breaks_it(write) -> None:
    write("mine.yaml", "extends: quickstart/switch\n\nmodel: {num_heads: 5}")
    with pytest.raises(RecipeError) as error:
        resolve("mine.yaml", [], PretrainRecipe)
    assert_line(error.value.lines[0], "mine.yaml:3", "model.num_heads (5) d_model (64) num_heads: 4")


@pytest.mark.parametrize("overrides", [*permutations(("optimizer.kind=adamw", "optimizer.epsilon=1e-30"))])
def test_a_kind_takes_nothing_of_what_stands_beside_it(overrides: tuple[str, ...]) -> None:
    """The epsilon is the default of the kind below, which a recipe with another kind drops."""
    assert resolve("quickstart/switch", [*overrides], PretrainRecipe).optimizer.epsilon == 1e-30


def test_a_recipe_of_another_verb_is_named_with_the_command_that_runs_it(write) -> None:
    write("my tickets.yaml", "extends: quickstart/finetune")
    for name in ("quickstart/finetune", "my tickets.yaml"):
        with pytest.raises(RecipeError) as error:
            resolve(name, [], PretrainRecipe)
        assert f"switchcli finetune {shlex.quote(name)}" in str(error.value)


def test_a_description_is_that_of_its_own_file(write):
    write("mine.yaml", "extends: quickstart/switch")
    assert resolve("quickstart/switch", [], PretrainRecipe).description
    assert resolve("mine.yaml", [], PretrainRecipe).description == ""


@pytest.mark.parametrize(
    ("text", "verb"),
    [
        ("{verb: eval, train: {}}", "eval"),
        ("{distill: {}, train: {}}", "distill"),
        ("{student: {}, train: {}}", "distill"),
        ("{train: {}, tasks: []}", "finetune"),
        ("train: {}", "pretrain"),
        ("model: {}", None),
    ],
)
def test_the_keys_of_a_recipe_tell_its_verb(write, text, verb):
    write("mine.yaml", text)
    assert library.verb_of(load("mine.yaml")) == verb


def test_a_vocabulary_is_padded_to_64_rows():
    assert [padded_vocab_size(pieces) for pieces in (1, 64, 65, 8192)] == [64, 64, 128, 8192]


def test_a_recipe_too_large_to_be_read_again_is_refused_before_it_is_written(toy):
    paths = ", ".join("a" for _ in range(9_985))
    with pytest.raises(RecipeError, match=r"recipe, line \d+: .*\b10000\b"):
        dump(toy(f"corpora: [{{kind: files, paths: [{paths}]}}]"))
