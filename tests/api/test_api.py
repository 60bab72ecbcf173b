"""The Python API does what the commands do: the same runs, answers and scores; and it can be called again and again."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doubles import NoWarnings
from messages import lacking
from tiny_run import records
from torch import nn
from typer.testing import CliRunner

import switchcli
from switchcli import api, errors
from switchcli.cli import app
from switchcli.model.moe.layer import sparse_layers
from switchcli.runs.inputs import text_sets
from switchcli.runs.inputs.loading import choose_device, load_checkpoint
from switchcli.training.loss import cross_entropy

GAP = "the red <extra_id_0> is blue"
TIMES = {"seconds", "tokens_per_second", "flops_per_second", "seconds_left", "data_wait_fraction"}
"""Measurements of time, which differ from run to run."""


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in records(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run, torch.device("cpu"), NoWarnings()).model.state_dict()


# Importing


@pytest.mark.integration
def test_import_is_fast_and_lists_the_names() -> None:
    script = """
import sys
import switchcli
assert {"load", "train", "Recipe", "Model", "errors"} <= set(dir(switchcli)), dir(switchcli)
assert not {"torch", "numpy", "pydantic"} & set(sys.modules), "imported too early"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert callable(switchcli.train)


# Recipes


def test_a_recipe_is_resolved_and_checked() -> None:
    recipe = switchcli.Recipe.load("quickstart/switch", {"model.num_experts": 16, "train": {"seed": 3}})
    assert (recipe.verb, recipe.spec.model.num_experts, recipe.spec.train.seed) == ("pretrain", 16, 3)
    assert recipe == switchcli.Recipe.load("quickstart/switch", ["model.num_experts=16", 'train={"seed": 3}'])
    assert not lacking(repr(recipe), "pretrain quickstart/switch model.num_experts=16")


def test_the_yaml_of_a_recipe_is_the_same_recipe(recipe: Path, tmp_path: Path) -> None:
    loaded = switchcli.Recipe.load(recipe, {"train.steps": 7})
    (tmp_path / "saved.yaml").write_text(loaded.to_yaml())
    assert switchcli.Recipe.load(tmp_path / "saved.yaml").spec == loaded.spec


def test_overrides_alone_are_a_recipe(recipe: Path) -> None:
    spec = switchcli.Recipe.load(recipe).spec
    sections = {key: value for key, value in spec.model_dump(mode="json").items() if value is not None}
    assert switchcli.Recipe.load(overrides=sections).spec == spec


def test_the_verb_can_be_given_and_values_may_be_paths_and_any_text(tmp_path: Path, recipe: Path) -> None:
    loaded = switchcli.Recipe.load(recipe, {"distill.teacher": "a"}, verb="distill")
    assert (loaded.verb, loaded.spec.verb) == ("distill", "distill")
    odd = tmp_path / "a \U0001f600 'b'\n"
    loaded = switchcli.Recipe.load(recipe, {"start.checkpoint": odd})
    assert loaded.spec.start.checkpoint == str(odd)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        ("quickstart/swich", None, "quickstart/switch"),
        ("quickstart/switch", {"model.num_expert": 4}, "model.num_expert num_experts"),
        ("quickstart/switch", {"train.steps": "many"}, "train.steps many"),
        ("quickstart/switch", {"data.held_out_fraction": 1.0}, "data.held_out_fraction 1"),
        ("quickstart/switch", {"train.steps": object()}, "train.steps number"),
        ("quickstart/switch", {"train.seed": float("nan")}, "train.seed number"),
        ("quickstart/switch", "train.steps=1", "overrides mapping"),
        (None, {"verb": "eval"}, "overrides evaluate"),
    ],
)
def test_a_wrong_recipe_is_a_recipe_error(source: str | None, overrides: Any, words: str) -> None:
    with pytest.raises(errors.RecipeError) as raised:
        switchcli.Recipe.load(source, overrides)
    assert not lacking(str(raised.value), words)


def test_scalars_of_numpy_are_values_of_keys(recipe: Path) -> None:
    spec = switchcli.Recipe.load(recipe, {"train.steps": np.int64(3), "train.clip_norm": np.float32(0.5)}).spec
    assert (spec.train.steps, spec.train.clip_norm) == (3, 0.5)


@pytest.mark.parametrize(("verb", "words"), [("nope", "verb nope finetune"), ("finetune", "verb pretrain leave")])
def test_a_wrong_verb_is_a_recipe_error(verb: Any, words: str) -> None:
    with pytest.raises(errors.RecipeError) as raised:
        switchcli.Recipe.load("quickstart/switch", {"verb": "pretrain"}, verb=verb)
    assert not lacking(str(raised.value), words)


def test_a_recipe_is_that_of_the_time_it_was_loaded(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe.read_text())
    loaded = switchcli.Recipe.load(file)
    before = loaded.spec
    assert hash(loaded) == hash(switchcli.Recipe.load(file))
    file.write_text(recipe.read_text().replace("steps: 2", "steps: 3"))
    assert loaded.spec == before != switchcli.Recipe.load(file).spec
    assert switchcli.train(loaded, tmp_path / "run").step == 2


# Training


def test_a_run_equals_that_of_the_command(recipe: Path, trained: Path, tmp_path: Path) -> None:
    result = switchcli.train(switchcli.Recipe.load(recipe), tmp_path / "run")
    assert untimed(tmp_path / "run") == untimed(trained)
    assert {path.name for path in result.path.iterdir()} == {path.name for path in trained.iterdir()}
    assert (result.path / "recipe.yaml").read_bytes() == (trained / "recipe.yaml").read_bytes()
    ours, theirs = weights(result.path), weights(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    record = json.loads((result.path / "result.json").read_text())
    assert result.record == record
    name = "held_out/neg_log_perplexity"
    assert (result.step, result.parameters, result.tokens) == (2, record["parameters"], 512)
    assert (result.metrics[name], result.seconds) == (record[name], record["seconds"])
    assert result.best[name].value >= result.metrics[name]
    assert result.load().step == 2


@pytest.mark.integration
def test_runs_follow_one_another_in_a_process(recipe: Path, trained: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    first = switchcli.Recipe.load(recipe, {"train.seed": 1})
    switchcli.train(first, tmp_path / "first")
    switchcli.train(switchcli.Recipe.load(recipe), tmp_path / "second")
    assert untimed(tmp_path / "second") == untimed(trained) != untimed(tmp_path / "first")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    more = switchcli.train(switchcli.Recipe.load(recipe, {"train.steps": 3}), tmp_path / "second")
    assert more.step == 3
    with pytest.raises(errors.RecipeError, match="seed"):
        switchcli.train(first, tmp_path / "second")
    assert switchcli.train(first, tmp_path / "second", resume=False).step == 2


@pytest.mark.integration
def test_a_stopped_run_is_resumed_by_the_same_call(
    recipe: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return cross_entropy(*arguments)

    loaded = switchcli.Recipe.load(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(text_sets, "cross_entropy", interrupt)
        with pytest.raises(errors.Interrupted) as stopped:
            switchcli.train(loaded, tmp_path / "run")
    assert not lacking("\n".join(stopped.value.__notes__), f"switchcli.train {tmp_path / 'run'}")
    assert switchcli.train(loaded, tmp_path / "run").step == 2
    ours, theirs = weights(tmp_path / "run"), weights(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_each_record_is_handed_over_and_may_stop_the_run(recipe: Path, trained: Path, tmp_path: Path) -> None:
    """The last record stops nothing: the run is complete."""
    seen: list[Any] = []

    def stop_at(step: int) -> Callable[[Any], bool]:
        return lambda record: seen.append(record) or record["step"] == step

    loaded = switchcli.Recipe.load(recipe, {"log.every_steps": 1})
    run = tmp_path / "run"
    with pytest.raises(errors.Interrupted):
        switchcli.train(loaded, run, on_record=stop_at(1))
    assert switchcli.load(run).step == 1
    with pytest.raises(ZeroDivisionError):
        switchcli.train(loaded, run, on_record=lambda record: 1 // 0)
    assert switchcli.train(loaded, run, on_record=stop_at(2)).step == 2
    assert seen == [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ours, theirs = weights(run), weights(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_stop_before_training_says_how_to_go_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = switchcli.Recipe.load(recipe)
    with monkeypatch.context() as patch:
        patch.setattr("switchcli.runs.train.trainer.preflight", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt) as stopped:
            switchcli.train(loaded, tmp_path / "run")
    assert not lacking("\n".join(stopped.value.__notes__), "switchcli.train")
    assert switchcli.train(loaded, tmp_path / "run").step == 2  # the lock was released


def test_a_thread_can_train_from_a_checkpoint_and_progress_goes_to_stderr(
    recipe: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results: list[switchcli.TrainResult] = []

    def work() -> None:
        loaded = switchcli.Recipe.load(recipe, {"train.steps": 1})
        results.append(switchcli.train(loaded, tmp_path / "run", model=trained, verbose=True))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    out, err = capsys.readouterr()
    assert out == ""
    assert not lacking(err, "1/1")
    spec = switchcli.Recipe.load(results[0].path / "recipe.yaml").spec
    assert spec.start.checkpoint.startswith(str(trained))  # type: ignore[attr-defined]
    more = switchcli.Recipe.load(recipe, {"train.steps": 2})
    branched = switchcli.train(more, tmp_path / "new", branch_from=f"{tmp_path / 'run'}@1")
    assert branched.record["start"]["step"] == 1
    assert capsys.readouterr() == ("", ""), "a script says what it wants to say"
    assert branched.loss == -branched.metrics["held_out/neg_log_perplexity"]


def test_distill_takes_a_teacher_also_as_an_entry_of_a_folder_listing(
    trained: Path, distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (entry,) = (entry for entry in os.scandir(trained.parent) if entry.name == trained.name)
    distilling = switchcli.Recipe.load(verb="distill")
    result = switchcli.train(distilling, tmp_path / "run", teacher=entry, baseline=-9.0)
    theirs = json.loads((distilled / "result.json").read_text())
    assert result.record["verb"] == "distill"
    assert result.metrics["held_out/neg_log_perplexity"] == theirs["held_out/neg_log_perplexity"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("pretrain", {"teacher": "a"}, "teacher distill"),
        ("distill", {"model": "a", "teacher": "b"}, "model student"),
        ("distill", {}, "distill.teacher"),
    ],
)
def test_a_checkpoint_of_another_verb_is_refused(
    recipe: Path, tmp_path: Path, verb: str, arguments: dict[str, str], words: str
) -> None:
    with pytest.raises(errors.RecipeError) as raised:
        switchcli.train(api.read_recipe(str(recipe), (), verb), tmp_path / "run", **arguments)  # type: ignore[arg-type]
    assert not lacking(str(raised.value), words)
    assert not (tmp_path / "run").exists()


# A loaded model


@pytest.fixture(scope="module")
def model(trained: Path) -> switchcli.Model:
    return switchcli.load(trained)


def test_a_model_has_its_parts(model: switchcli.Model, trained: Path) -> None:
    assert (model.path, model.step) == (trained / "checkpoints/step-00000002", 2)
    assert isinstance(model.model, nn.Module)
    assert not model.model.training
    assert model.recipe.model.num_experts == 4
    assert model.tokenizer.decode(model.tokenizer.encode("red")).strip() == "red"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, []),
        ({"temperature": 2.0, "top_p": 0.9, "seed": 5}, ["--temperature", "2", "--top-p", "0.9", "--seed", "5"]),
        ({"capacity": "paper"}, ["--capacity", "paper"]),
    ],
)
def test_answers_are_those_of_the_command(
    model: switchcli.Model, trained: Path, settings: dict[str, Any], options: list[str]
) -> None:
    texts = [GAP, "a green <extra_id_0>", "walk"]
    done = CliRunner().invoke(app, ["generate", str(trained), *texts, "--max-tokens", "5", *options, "--json"])
    answers = [answer["output"] for answer in json.loads(done.stdout)["answers"]]
    assert model.generate(texts, max_tokens=5, **settings) == answers


def test_an_evaluation_is_that_of_the_command(model: switchcli.Model, trained: Path, tmp_path: Path) -> None:
    arguments = ["eval", str(trained), "text.sequences=4", "--out", str(tmp_path / "theirs"), "--json"]
    theirs = json.loads(CliRunner().invoke(app, arguments).stdout)
    ours = model.evaluate(overrides={"text.sequences": 4}, out=tmp_path / "ours")
    assert ours.result == theirs == json.loads((tmp_path / "ours/result.json").read_text())
    assert ours.held_out["text"] == theirs["passes"][0]["held_out"]["text"]
    assert ours.scores == {}


def test_an_evaluation_writes_nothing_unless_asked(
    model: switchcli.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "red", "label": 0}, {"text": "blue", "label": 1}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        **{"kind": "files", "name": "color", "validation": ["rows.jsonl"], "input": "color: {text}", "target": "label"},
        **{"labels": ["red", "blue"], "metrics": ["accuracy"]},
    }
    found = model.evaluate([task])
    score = found.scores["color"].score
    assert score is not None
    assert 0 <= score.value <= 100
    assert found.scores["color"].num_examples == 2
    assert (list(found.held_out), list(found.targets)) == ([], ["color"])
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


def test_a_loop_of_the_users_own_trains(trained: Path) -> None:
    """The loop of docs/reference/python-api.md."""
    model = switchcli.load(trained)
    module = model.model.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    rows = model.recipe.model.group_sequences
    inputs, targets = torch.full((rows, 8), 5), torch.tensor([[6, 7, 1, 0]]).repeat(rows, 1)
    losses = []
    for _ in range(5):
        output = module(inputs, targets)
        loss = F.cross_entropy(output.logits_BTV.flatten(0, 1), targets.flatten(), ignore_index=0)
        (loss + output.auxiliary.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_changed_weights_can_be_saved_and_used_as_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    changed = switchcli.load(trained)
    with torch.no_grad():
        changed.model.embedding.mul_(0.5)
    changed.save(tmp_path / "new")
    again = switchcli.load(tmp_path / "new")
    assert again.step == 0
    ours, theirs = changed.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    metrics = [model.evaluate().held_out for model in (changed, again)]
    assert metrics[0] == metrics[1] != switchcli.load(trained).evaluate().held_out
    recipe = switchcli.Recipe.load(tmp_path / "new/recipe.yaml", {"train.steps": 1})
    assert switchcli.train(recipe, tmp_path / "more").step == 1
    with pytest.raises(errors.CheckpointError, match="exists already"):
        changed.save(tmp_path / "new")
    for rounded in (switchcli.load(trained, precision="selective"), changed):
        rounded.model.bfloat16()
        with pytest.raises(errors.RecipeError, match="float32"):
            rounded.save(tmp_path / "rounded")


def test_training_leaves_the_random_numbers_of_the_caller(recipe: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    switchcli.train(switchcli.Recipe.load(recipe, {"train.steps": 1}), tmp_path / "run")
    assert torch.equal(torch.rand(1), expected)


def test_two_threads_cannot_train_at_once(recipe: Path, tmp_path: Path) -> None:
    loaded, seen = switchcli.Recipe.load(recipe), list[BaseException]()

    def second() -> None:
        try:
            switchcli.train(loaded, tmp_path / "second")
        except errors.RecipeError as error:
            seen.append(error)

    def start_second(record: Any) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    switchcli.train(loaded, tmp_path / "run", on_record=start_second)
    assert "trains already" in str(seen[0])
    assert switchcli.train(loaded, tmp_path / "second").step == 2


def test_each_rank_loads_onto_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda", 0)
    for local_rank, number in (("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert choose_device("cuda") == torch.device("cuda", number)
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(errors.RecipeError, match="LOCAL_RANK is 'x'"):
        choose_device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(errors.RecipeError, match=r"device \(cuda:1\)"):
        choose_device("cuda:1")


def test_routing_is_the_argmax_of_the_routers(model: switchcli.Model) -> None:
    texts = ["the red is blue", "walk"]
    logits: dict[str, torch.Tensor] = {}
    layers = {name: layer for name, layer in sparse_layers(model.model).items() if name.startswith("encoder")}
    for text, found in zip(texts, model.routing(texts), strict=True):
        handles = [
            layer.router.register_forward_hook(lambda _, __, output, name=name: logits.update({name: output}))
            for name, layer in layers.items()
        ]
        ids = [*model.tokenizer.encode(text), 1]
        with torch.no_grad():
            model.model(torch.tensor([ids]), torch.tensor([[1]]))
        for handle in handles:
            handle.remove()
        assert list(found.tokens) == model.tokenizer.pieces(ids)
        assert found.layers.keys() == layers.keys()
        for name, layer in found.layers.items():
            probability, expert = logits[name][0].softmax(-1).max(-1)
            assert [list(numbers) for numbers in layer.experts] == [[number] for number in expert.tolist()]
            assert [list(values) for values in layer.probabilities] == [[value] for value in probability.tolist()]
            assert not any(layer.dropped)
        rows = str(found).splitlines()
        assert len(rows) == 1 + len(ids)
        assert rows[1].split()[0] == found.tokens[0]


def test_routing_shows_what_a_capacity_drops(model: switchcli.Model) -> None:
    (found,) = model.routing(["red " * 12], capacity=0.25)
    (layer,) = found.layers.values()
    assert any(layer.dropped)
    chosen = [numbers[0] for numbers in layer.experts]
    slots = max(model.recipe.model.router.min_capacity, int(len(chosen) * 0.25 / 4))
    for position, (expert, dropped) in enumerate(zip(chosen, layer.dropped, strict=True)):
        assert dropped == (chosen[:position].count(expert) >= slots)
    assert str(found).count(" x") == sum(layer.dropped)


def test_a_group_of_several_sequences_gives_a_text_the_slots_of_its_own_tokens(
    model: switchcli.Model, recipe: Path, tmp_path: Path
) -> None:
    wide = switchcli.Recipe.load(recipe, {"model.router.group_sequences": 2, "train.steps": 1})
    switchcli.train(wide, tmp_path / "wide")
    twice = switchcli.load(tmp_path / "wide")
    twice.model.load_state_dict(model.model.state_dict())
    for capacity in (0.25, "paper", "dropless"):
        alone, grouped = (one.routing(["red " * 12], capacity=capacity)[0] for one in (model, twice))
        assert alone.layers == grouped.layers


def test_a_table_of_routing_has_a_line_for_each_token(model: switchcli.Model) -> None:
    (found,) = model.routing(["a\nb\x1b"])
    assert len(str(found).splitlines()) == 1 + len(found.tokens)


def test_wrong_use_of_a_model_is_explained(model: switchcli.Model, trained: Path, tmp_path: Path) -> None:
    misspelled: Any = "papr"
    cases: list[tuple[Any, type[errors.SwitchError], str]] = [
        (lambda: switchcli.load(tmp_path), errors.CheckpointError, f"{tmp_path} run"),
        (lambda: model.generate("one text"), errors.RecipeError, "list"),
        (lambda: model.generate(["a"], beams=2, temperature=1.0), errors.RecipeError, "beams temperature"),
        (lambda: model.generate(["a"], batch_size=0), errors.RecipeError, "batch_size 1"),
        (lambda: model.generate(["a"], batch_size="2"), errors.RecipeError, "batch_size 1"),  # type: ignore[arg-type]
        (lambda: model.generate(["a", 3]), errors.RecipeError, "text 1 int"),  # type: ignore[list-item]
        (lambda: switchcli.train(model.recipe, tmp_path / "run"), errors.RecipeError, "Recipe.load"),  # type: ignore[arg-type]
        (lambda: switchcli.train(switchcli.Recipe.load("quickstart/switch"), ""), errors.RecipeError, "out folder"),
        (lambda: model.generate(["a"], capacity=misspelled), errors.RecipeError, "capacity paper dropless papr"),
        (lambda: model.routing(["a"], capacity=0), errors.RecipeError, "capacity paper dropless 0"),
        (lambda: model.generate(["a\ud800"]), errors.DataError, "UTF-8"),
        (lambda: model.evaluate(["no_such_task"]), errors.RecipeError, "no_such_task"),
        (lambda: model.evaluate("rte"), errors.RecipeError, "list"),
        (lambda: model.routing([" "]), errors.DataError, "blank"),
        (lambda: switchcli.train("tiny.yaml", tmp_path / "run"), errors.RecipeError, "Recipe.load str"),  # type: ignore[arg-type]
    ]
    for call, kind, words in cases:
        with pytest.raises(kind) as raised:
            call()
        assert not lacking(str(raised.value), words)


def test_a_dense_model_routes_nothing(dense: Path) -> None:
    with pytest.raises(errors.CheckpointError, match="sparse"):
        switchcli.load(dense).routing(["red"])
