"""`switchcli report`: for people, for scripts, as a page and as files; and folders that are not as they should be."""

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from messages import lacking
from report_folders import a_run
from tiny_run import SwitchCLI


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two recipes of two seeds, in the current folder."""
    monkeypatch.chdir(tmp_path)
    names = []
    for name, rate, experts in (("dense", 0.01, 0), ("switch", 0.02, 4)):
        for seed in range(2):
            samples = [{"input": f"in {name}", "target": "t", "prediction": f"out {name}"}]
            a_run(
                Path(f"{name}-{seed}"),
                lambda step, rate=rate, seed=seed: rate * step - 5 + seed / 10,
                seed=seed,
                experts=experts,
                result={"samples": samples},
            )
            names.append(f"{name}-{seed}")
    return names


def rows_of(file: Path) -> list[dict[str, str]]:
    return [*csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))]


def test_what_people_see(runs: list[str], switchcli: SwitchCLI) -> None:
    done = switchcli("report", *runs)
    assert (done.code, done.err) == (0, "")
    for words in ("Held-out", "Speed-up dense", "Size speed", "25.0%"):
        assert not lacking(done.out, words)
    rows = [line.split() for line in done.out.splitlines()]
    quality = next(row for row in rows if row[:1] == ["switch"])
    assert quality[1:4] == ["better", "+1.0000", "2.9500"]  # of the loss
    assert "perplexity" not in done.out
    speed = [row for row in rows if row[:1] == ["switch"]][1]
    assert speed[1:7] == ["2.00", "2.00", "2.00", "2", "of", "2"]


@pytest.mark.integration
def test_a_page_and_files(runs: list[str], switchcli: SwitchCLI) -> None:
    done = switchcli("report", *runs, "--html", "page.html", "--figures", "figures", "--smooth", 3, "--quiet")
    assert done.code == 0, done.err
    page = Path("page.html").read_text(encoding="utf-8")
    for words in ("4 runs", "2 series", "held_out_wall_time", "model.num_experts", "in dense", "out switch", "dense-1"):
        assert words in page
    assert "http" not in page.split("<script>")[0].replace("http-equiv", "")
    names = {path.name for path in Path("figures").iterdir()}
    stems = {name.removesuffix(".svg") for name in names if name.endswith(".svg")}
    axes = ("_steps", "_wall_time")  # tokens and FLOPs are the same multiples of steps in all runs
    shared = {f"{name}{axis}": name for name in ("held_out", "training") for axis in axes}
    shared = {stem: shared.get(stem, stem) for stem in stems}
    tables = {f"{name}.csv" for name in (*shared.values(), "runs")}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")} | tables
    assert {
        "held_out_steps",
        "held_out_wall_time",
        "training_wall_time",
        "dropped",
        "entropy",
        "tokens_per_second",
    } < stems
    rows = rows_of(Path("figures/held_out.csv"))
    last = next(row for row in reversed(rows) if row["series"] == "dense")
    assert (float(last["step"]), float(last["value"])) == pytest.approx((90, 4.05))  # the mean of the last three
    assert float(last["tokens"]) == 90_000
    (dense, switch) = rows_of(Path("figures/runs.csv"))
    assert (dense["series"], switch["series"], switch["seeds"]) == ("dense", "switch", "2")
    load = rows_of(next(Path("figures").glob("load_*.csv")))
    assert {float(row["share"]) for row in load if row["expert"] == "3"} == {1.6}  # 4 of 10 parts, of 4 experts


VICTORY = re.compile(r"\b(best|better|worse|faster|slower|wins?|winner|ahead|speed-up of)\b")


def test_one_seed_each_within_the_spread_of_three_declares_no_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI
) -> None:
    monkeypatch.chdir(tmp_path)
    chance = {0: 0.0, 1: 0.03, 2: -0.03}  # seeds of one recipe differ by up to 0.06
    for name, gain in (("a", 0.0), ("b", 0.02)):
        for seed, shift in chance.items():
            end = gain + (shift if name == "a" else -shift)
            a_run(Path(f"{name}-{seed}"), lambda step, end=end: 0.01 * step - 5 + end, seed=seed, model={"size": name})
    for folders, verdict in (
        (("a-0", "b-0"), "one seed: cannot tell"),
        ([*map(str, sorted(tmp_path.glob("?-?")))], "no difference seen"),
    ):
        done = switchcli("report", *folders, "--html", "page.html")
        assert done.code == 0, done.err
        page = Path("page.html").read_text(encoding="utf-8").partition("<main>")[2].partition("<script")[0]
        for shown in (done.out, page):
            assert verdict in shown
            assert VICTORY.search(shown) is None
        series = json.loads(switchcli("report", *folders, "--json").out)["series"]
        assert [one["verdict"] for one in series] == ["baseline", verdict]
        assert VICTORY.search(json.dumps(series)) is None


def test_the_page_says_when_where_and_by_what_it_was_made(
    runs: list[str], monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI
) -> None:
    command = ["report", *runs, "--html", "a page.html", "s3://user:secret@host/x"]
    monkeypatch.setattr(sys, "argv", ["switchcli", *command])
    assert switchcli(*command[:-1]).code == 0
    page = Path("a page.html").read_text(encoding="utf-8")
    origin = dict(re.findall(r"<dt>(\w+)</dt><dd>([^<]*)</dd>", page.partition("<main>")[0]))
    assert origin.keys() == {"date", "host", "versions", "command"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", origin["date"])
    assert not lacking(origin["versions"], "switchcli Python")
    assert origin["command"].startswith("switchcli report dense-0 ")
    assert "secret" not in page


def test_what_is_no_run_is_told_and_the_rest_is_shown(runs: list[str], switchcli: SwitchCLI) -> None:
    Path("empty").mkdir()
    a_run(Path("going"), steps=40, of=100, model={"size": "other"})
    torn = Path("dense-1/metrics.jsonl")
    torn.write_text(torn.read_text()[:-30])
    Path("switch-1/recipe.yaml").write_text("a: [")
    Path("dangling").symlink_to("nowhere")
    folders = [*runs, "empty", "dangling", "going"]
    done = switchcli("report", *folders, "--html", "page.html")
    assert done.code == 0, done.err
    notes = "\n".join(json.loads(switchcli("report", *folders, "--json").out)["notes"])
    for words in (
        "empty metrics.jsonl result.json",
        "dangling folder",
        "going result.json step 40 100",
        "dense-1/metrics.jsonl line 21 whole",
        "switch-1/recipe.yaml",
    ):
        assert not lacking(done.err, f"warning: {words}")
        assert not lacking(notes, words)
    assert "1, 1 unfinished" in done.out
    assert "step 40" in done.out
    page = Path("page.html").read_text(encoding="utf-8")
    assert not lacking(page, "dense-1/metrics.jsonl line 21")
    assert "40 of 100" in page


DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("metrics.jsonl", '{"step": 200, "held_out/neg_log_perplexity": NaN}', "22 held_out/neg_log_perplexity finite"),
        ("metrics.jsonl", f'{{"step": {DIGITS}}}', "22 whole"),
        ("metrics.jsonl", '{"step": -5, "seconds": 1.0}', "22 step"),
        (
            "metrics.jsonl",
            '{"step": 200, "layers": {"a": {"load": [-1, 2], "entropy": NaN}}}',
            "22 a/entropy finite",
        ),
        ("metrics.jsonl", '{"step": 200, "tokens_per_second": 0.0, "flops_per_second": 0.0}', ""),
        ("result.json", '{"verb": "pretrain", "step": 1e999, "seconds": NaN}', "finite step seconds"),
        ("result.json", f'{{"verb": "pretrain", "parameters": {DIGITS[:400]}}}', "finite parameters"),
    ],
)
def test_numbers_that_are_none_are_told_and_the_rest_is_shown(
    file: str, line: str, words: str, runs: list[str], switchcli: SwitchCLI
) -> None:
    path = Path("switch-0", file)
    path.write_text((path.read_text() if file == "metrics.jsonl" else "") + line + "\n")
    done = switchcli("report", *runs, "--html", "page.html", "--json", "--quiet")
    assert done.code == 0, done.err
    assert not lacking(done.err, words and f"switch-0/{file} {words}")
    assert bool(done.err) == bool(words)
    assert json.loads(done.out)["series"][1]["final"]["mean"] == pytest.approx(2.95)
    assert Path("page.html").exists()


def test_evaluations_show_their_scores_beside_runs_and_alone(runs: list[str], switchcli: SwitchCLI) -> None:
    passes = [{"tasks": {"rte": {"score": {"value": 61.25}}}, "held_out": {"de": {"neg_log_perplexity": -2.5}}}]
    Path("measured").mkdir()
    Path("measured/result.json").write_text(json.dumps({"verb": "eval", "step": 5, "passes": passes}))
    for arguments in ((*runs, "measured"), ("measured",)):
        done = switchcli("report", *arguments, "--html", "page.html")
        assert (done.code, done.err) == (0, "wrote page.html\n")
        assert "61.25" in done.out
        assert re.search(r"de .* 2\.5000", done.out)
        assert "61.25" in Path("page.html").read_text(encoding="utf-8")


def test_scripts_read_each_run_once_however_it_is_named(runs: list[str], switchcli: SwitchCLI) -> None:
    Path("link").symlink_to("switch-0")
    named = [*runs, "./dense-0", str(Path("dense-0").resolve()), "link", "switch-0"]
    done = switchcli("report", *named, "--baseline", "link", "--quality", 4.5, "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert [(one["series"], one["seeds"]) for one in found["series"]] == [("dense", 2), ("switch", 2)]
    assert (found["baseline"], found["measure"]) == ("switch", "held_out/loss")
    dense, switch = found["series"]
    assert dense["over"]["mean"] == pytest.approx(-1)
    assert dense["to_quality"]["steps"]["speed_up"]["mean"] == pytest.approx(0.5)
    assert (dense["verdict"], switch["verdict"]) == ("worse", "baseline")


def test_an_evaluation_of_the_name_of_a_run_has_a_column_of_its_own(runs: list[str], switchcli: SwitchCLI) -> None:
    for folder, score in (("dense-0", 10.5), ("eval/dense-0", 20.5), ("eval/dense", 30.5)):
        file = Path(folder, "result.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = json.loads(file.read_text()) if file.exists() else {"verb": "eval"}
        file.write_text(json.dumps({**whole, "tasks": {"rte": {"score": {"value": score}}}}))
    for arguments in (("dense-0", "eval/dense-0"), ("dense-0", "dense-1", "eval/dense")):
        done = switchcli("report", *arguments)
        assert done.code == 0, done.err
        scores = next(line.split() for line in done.out.splitlines() if line.split()[:1] == ["rte"])
        assert scores[1] == "10.50"
        assert scores[2] in ("20.50", "30.50")


def an_evaluation(folder: str, tokenizer: str | None = None, task: str = "rte") -> str:
    """Write the folder of an evaluation of one task and one text."""
    text = {"de": {"neg_log_perplexity": -2.5, "bits_per_byte": 1.25}}
    passes = [{"tasks": {task: {"score": {"value": 61.25}}}, "held_out": text}]
    Path(folder).mkdir()
    known = {} if tokenizer is None else {"tokenizer": tokenizer}
    Path(folder, "result.json").write_text(json.dumps({"verb": "eval", "passes": passes, **known}))
    return folder


@pytest.mark.parametrize(("other", "alike"), [("one", True), ("two", False), (None, False)])
def test_texts_are_compared_by_tokens_where_the_tokens_are_the_same(
    other: str | None, alike: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI
) -> None:
    monkeypatch.chdir(tmp_path)
    done = switchcli("report", an_evaluation("a", "one"), an_evaluation("b", other), "--html", "page.html")
    assert ("2.5000" in done.out) == alike
    assert "1.2500" in done.out
    assert (not lacking(" ".join(done.err.split()), "tokenizers bits byte")) != alike
    assert "2 evaluations</h1>" in Path("page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({}, None),
        ({"data": {"inputs_length": 512, "folder": "here"}}, "data.inputs_length"),
        ({"text": {"held_out_fraction": 0.1}}, "text.held_out_fraction"),
        ({"scoring": {"examples": 9}}, "scoring.examples"),
        ({"eval": {"capacity": 0.5}}, "eval.capacity"),
        ({"data": {"inputs_length": 64, "folder": "there"}, "device": "cuda"}, None),
    ],
)
def test_evaluations_with_other_settings_are_not_side_by_side_without_a_word(
    changed: dict[str, Any], key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe: dict[str, Any] = {"data": {"inputs_length": 64}, "text": {"held_out_fraction": 0.02}}
    for folder, changes in (("a", {}), ("b", changed)):
        file = Path(an_evaluation(folder, "one"), "result.json")
        result = json.loads(file.read_text())
        result["recipe"] = {**recipe, "scoring": {"examples": 8}, **changes}
        capacity = changes.get("eval", {"capacity": "paper"})["capacity"]
        result["passes"][0]["capacity"] = {"text": capacity, "tasks": capacity}
        file.write_text(json.dumps(result))
    done = switchcli("report", "a", "b", "--json")
    assert done.code == 0, done.err
    notes = json.loads(done.out)["notes"]
    assert notes == [f"The evaluations differ in {key}: their metrics can hardly be compared."] if key else not notes


@pytest.mark.integration
def test_scores_and_recipes_are_numbers_for_scripts_and_in_files(runs: list[str], switchcli: SwitchCLI) -> None:
    for seed in range(2):
        file = Path(f"dense-{seed}/result.json")
        score = {"=cmd": {"score": {"value": 60.0 + seed}}}
        file.write_text(json.dumps({**json.loads(file.read_text()), "tasks": score}))
    Path("switch-0/recipe.yaml").write_text("verb: pretrain\nmodel: {num_experts: 4, size: .nan}\n")
    arguments = ("report", "dense-0", "dense-1", "switch-0", an_evaluation("@b", task="=cmd"))
    done = switchcli(*arguments, "--json", "--figures", "figures", "--html", "page.html")
    found = json.loads(done.out)
    assert found["tables"]["tasks"]["dense"] == {"=cmd": {"mean": 60.5, "least": 60.0, "most": 61.0}}
    assert found["tables"]["texts_bits_per_byte"] == {"@b": {"de": {"mean": 1.25, "least": 1.25, "most": 1.25}}}
    assert found["differences"]["model.num_experts"] == {"dense": 1, "switch-0": 4}
    assert found["differences"]["model.size"] == {"dense": None, "switch-0": "NaN"}
    assert rows_of(Path("figures/tasks.csv")) == [
        {"series": "dense", "task": "'=cmd", "value": "60.5", "least": "60.0", "most": "61.0"},
        {"series": "'@b", "task": "'=cmd", "value": "61.25", "least": "61.25", "most": "61.25"},
    ]
    assert rows_of(Path("figures/texts_loss.csv"))[0]["value"] == "2.5"
    assert not lacking(Path("page.html").read_text(encoding="utf-8"), "3 runs 2 series 1 evaluation")


@pytest.mark.parametrize("arguments", [("dense-0",), ("nowhere",), ("--routing", "nowhere")])
def test_figures_without_their_package_are_refused_before_any_work(
    arguments: tuple[str, ...], runs: list[str], monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    done = switchcli("report", *arguments, "--html", "page.html", "--figures", "figures")
    assert (done.code, done.out) == (2, "")
    assert not lacking(done.err, "error: --figures vl_convert pip install 'switchcli[report]' --html")
    assert done.err.count("\n") == 1
    assert not Path("figures").exists()
    assert not Path("page.html").exists()
    assert switchcli("report", *runs, "--html", "page.html").code == 0
    assert "vegaEmbed" in Path("page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nowhere",), 2, "error: nowhere folder"),
        (("dense-0", "nowhere", "runs/*", "switch-0"), 2, "runs/* folder"),
        (("empty",), 4, "error: none run switchcli pretrain"),
        (("dense-0", "--baseline", "switch-0"), 2, "--baseline switch-0 none dense-0"),
        (("eval", "--baseline", "dense-0"), 2, "--baseline dense-0 evaluations"),
        (("dense-0", "--html", "eval/result.json/page.html"), 4, "eval/result.json/page.html file --html"),
        (("dense-0", "--smooth", 0), 2, "--smooth 1"),
        ((".",), 4, "name ./*"),
        (("dense-0/result.json",), 4, "dense-0/result.json no run"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_it_refuses(arguments: tuple[str, ...], code: int, words: str, switchcli: SwitchCLI) -> None:
    Path("eval").mkdir()
    Path("empty").mkdir()
    Path("eval/result.json").write_text('{"verb": "eval"}')
    done = switchcli("report", *arguments)
    assert (done.code, done.out) == (code, "")
    assert not lacking(done.err, words)
    if "nowhere" in arguments:
        found = json.loads(switchcli("report", *arguments, "--json", "--html", "page.html").out)
        assert found["exit_code"] == 2
        assert not Path("page.html").exists()


def test_a_run_that_failed_is_no_baseline_unless_it_is_named(runs: list[str], switchcli: SwitchCLI) -> None:
    a_run(Path("a-failed"), steps=50, of=100, model={"size": "failed"})
    for words, baseline in (((), "dense"), (("--baseline", "a-failed"), "a-failed")):
        done = switchcli("report", "a-failed", *runs, *words, "--json")
        assert (done.code, json.loads(done.out)["baseline"]) == (0, baseline)


def test_an_archived_run_is_left_out_beside_the_run_that_replaced_it(runs: list[str], switchcli: SwitchCLI) -> None:
    archived = str(a_run(Path("dense-0.before-1"), steps=50, model={"size": "old"}))

    def labels(*words: str) -> set[str]:
        done = switchcli("report", *words, "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        is_told = any(not lacking(note, f"{archived} dense-0 --baseline") for note in found["notes"])
        assert is_told == (archived not in {row["series"] for row in found["series"]})
        return {row["series"] for row in found["series"]}

    assert labels(*runs, archived) == {"dense", "switch"}
    assert labels(*runs, archived, "--baseline", archived) == {"dense", "switch", archived}
    assert labels("switch-0", archived) == {"switch-0", archived}


def test_runs_evaluated_at_different_steps_are_compared_only_where_all_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switchcli: SwitchCLI
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, every, steps in (("mine", 30, 90), ("cc", 20, 40)):
        a_run(Path(name), steps=steps, model={"size": name})
        lines = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        kept = [one for one in lines if "held_out/neg_log_perplexity" not in one or one["step"] % every == 0]
        Path(name, "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    done = switchcli("report", "mine", "cc", "--html", "page.html")
    assert done.code == 0
    assert not lacking(done.err, "warning: step start evaluated eval.every_steps")
    assert "no step in common" in done.out
    assert "no step in common: cannot tell" in Path("page.html").read_text(encoding="utf-8")


def test_a_real_run(trained: Path, dense: Path, tmp_path: Path, switchcli: SwitchCLI) -> None:
    done = switchcli("report", dense, trained, "--json", "--html", tmp_path / "page.html")
    assert done.code == 0, done.err
    first, second = json.loads(done.out)["series"]
    whole = json.loads((trained / "result.json").read_text())
    assert second["final"]["mean"] == whole["held_out/loss"]
    assert second["active_parameters"] == whole["active_parameters"]
    assert first["dropped"]["mean"] is None
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Expert load" in text
    assert "&lt;extra_id_0&gt;" in text  # the samples
