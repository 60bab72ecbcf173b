"""Every verb on a CUDA device against the same command on the CPU (tests/devices.py says which rows run where).

Bounds on differences of losses, in nats a token:

- float32: 1e-4. CUDA adds up products in another order, which changes a product by about 1e-7 of its size. Initial
  weights changed by 1e-5 of their size, a hundred times as much, moved no loss in twelve steps by more than 2e-5.
- bfloat16 and selective: 0.02. Products are rounded to 2**-9 of their size, and the kernels of two devices round at
  different points. On the CPU these precisions differ from float32 by at most 0.003 in eight steps.

The gradient norm may differ by ten times as much, relative to its size: it is a sum of squares, and Adafactor's and
AdamW's first updates have the size of the learning rate even where a gradient is rounding noise. Nothing random is
drawn in these comparisons: the generators of two devices give different dropout masks from one seed.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from devices import DEVICES, on_devices
from tiny_run import SwitchCLI, records

pytestmark = pytest.mark.nightly  # on a CPU, which is compared with itself; `pytest -m gpu` runs the rows for CUDA

BOUND = {"float32": 1e-4, "bfloat16": 0.02, "selective": 0.02}
QUIET = ("model.dropout=0", "model.router.jitter=0", "log.every_steps=1")
"""Nothing random in a step."""
ROUTERS = {
    "switch": (),
    "top_k": ("model.router={kind: top_k, jitter: 0, keep_threshold: 0}",),
    "no_token_left_behind": ("model.router={kind: no_token_left_behind, jitter: 0}",),
    "expert_choice": (
        "model.router={kind: expert_choice, jitter: 0}",
        "model.decoder_router={kind: switch, jitter: 0}",
    ),
}
DROPLESS = ("model.router.capacity_factor=dropless", "model.router.eval_capacity_factor=dropless")
ROUTING = {
    **ROUTERS,
    **{f"{name} dropless": (*ROUTERS[name], *DROPLESS) for name in ROUTERS if name != "expert_choice"},
}
VARIANTS = {
    "dense": ("model.num_experts=1",),
    "switch attention": ("model.sparse=both",),
    "adamw": ("optimizer.kind=adamw",),
    "packed": ("data.packing=documents",),
    "packed dropless": ("data.packing=documents", *DROPLESS),
    "recomputed": ("train.activation_checkpointing=blocks",),
    "clipped": ("train.clip_norm=0.5",),
    "checked before updates": ("train.nonfinite=skip",),
}
CASES = {f"{precision}, {name}": (precision, keys) for precision in BOUND for name, keys in ROUTING.items()}
CASES |= {
    f"{precision}, {name}": (precision, VARIANTS[name]) for precision in ("float32", "selective") for name in VARIANTS
}
CHEAP = ("float32, switch", "selective, packed dropless")
PROMPTS = ("the red <extra_id_0> is blue", "a green <extra_id_0> of alpha", "walk", "beta <extra_id_0> gamma delta")

Run = Callable[..., Any]


@pytest.fixture
def run(switchcli: SwitchCLI) -> Iterator[Run]:
    """`switchcli ARGUMENTS --json` in this process, which must succeed: what it printed."""

    def command(*arguments: object) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the first device of a process
        done = switchcli(*arguments, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    yield command
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_same_course(one: str, other: str, bound: float) -> None:
    """Every logged loss of two runs is equal within `bound`, and the gradient norm within ten times that."""
    ours, theirs = records(one), records(other)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    compared = 0
    for record, expected in zip(ours, theirs, strict=True):
        assert record.keys() == expected.keys()
        for name in record:
            if name.endswith("neg_log_perplexity"):
                assert record[name] == pytest.approx(expected[name], abs=bound), (record["step"], name)
                compared += 1
        if "gradient_norm" in record:
            assert record["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=10 * bound)
            compared += 1
    assert compared > len(ours)


@pytest.mark.parametrize(("device", "case"), on_devices(CASES, CHEAP))
def test_pretraining_has_the_losses_of_the_cpu(device: str, case: str, recipe: str, run: Run) -> None:
    precision, keys = CASES[case]
    common = ("pretrain", recipe, *QUIET, *keys, f"train.precision={precision}", "train.steps=6")
    run(*common, "train.device=cpu", "--out", "on_cpu")
    run(*common, f"train.device={device}", "--out", "on_device")
    assert_same_course("on_device", "on_cpu", BOUND[precision])


@pytest.mark.parametrize("precision", [pytest.param("float32"), pytest.param("selective")])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_compiled_pretraining_has_the_losses_of_the_cpu(device: str, precision: str, recipe: str, run: Run) -> None:
    """Compiled parts add up in an order of their own as well: the same bounds."""
    common = ("pretrain", recipe, *QUIET, f"train.precision={precision}", "train.steps=6")
    run(*common, "train.device=cpu", "--out", "on_cpu")
    run(*common, f"train.device={device}", "train.compile=true", "--out", "on_device")
    assert_same_course("on_device", "on_cpu", BOUND[precision])


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_and_jitter_follow_from_the_seed(device: str, recipe: str, run: Run) -> None:
    """Two runs of one seed have the same losses within float32 rounding, another seed has others."""
    keys = ("train.steps=4", "log.every_steps=1", f"train.device={device}")
    for out, seed in (("one", 1), ("again", 1), ("other", 2)):
        run("pretrain", recipe, *keys, f"train.seed={seed}", "--out", out)
    assert_same_course("again", "one", BOUND["float32"])
    losses = [[record.get("neg_log_perplexity") for record in records(out)] for out in ("one", "other")]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_goes_on_from_the_others_checkpoint(device: str, recipe: str, run: Run) -> None:
    """Weights and optimizer state change devices twice, and the losses are those of a run that stayed on the CPU."""
    run("pretrain", recipe, *QUIET, "train.steps=6", "train.device=cpu", "--out", "straight")
    for steps, where in ((2, "cpu"), (4, device), (6, "cpu")):
        run("pretrain", recipe, *QUIET, f"train.steps={steps}", f"train.device={where}", "--out", "moved")
    ours, theirs = ({r["step"]: r.get("neg_log_perplexity") for r in records(out)} for out in ("moved", "straight"))
    assert ours[6] == pytest.approx(theirs[6], abs=BOUND["float32"])


@pytest.mark.parametrize(("device", "case"), on_devices(["SIGKILL", "SIGTERM"], ["SIGKILL"]))
def test_a_killed_run_goes_on_as_if_it_had_not_been(device: str, case: str, recipe: str, run: Run) -> None:
    keys = (*QUIET, f"train.device={device}", "checkpoint.save_every_steps=2", "eval.every_steps=4")
    command = [sys.executable, "-m", "switchcli", "pretrain", recipe, *keys, "train.steps=100000", "--out", "killed"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not saved_steps("killed", at_least=4) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.Signals[case])
        _, words = process.communicate(timeout=60)
    assert process.returncode == (75 if case == "SIGTERM" else -signal.SIGKILL), words
    steps = f"train.steps={max(saved_steps('killed')) + 4}"
    resumed = run("pretrain", recipe, *keys, steps, "--out", "killed")
    straight = run("pretrain", recipe, *keys, steps, "--out", "straight")
    assert resumed["step"] == straight["step"]
    ours, theirs = ({r["step"]: r.get("neg_log_perplexity") for r in records(out)} for out in ("killed", "straight"))
    # A longer run than those that the bound was measured on: rounding grows with the steps.
    assert ours[resumed["step"]] == pytest.approx(theirs[resumed["step"]], abs=10 * BOUND["float32"])


def saved_steps(out: str, at_least: int = 1) -> list[int]:
    """Return the steps that have a finished checkpoint."""
    steps = [int(path.name.removeprefix("step-")) for path in Path(out, "checkpoints").glob("step-*")]
    return [step for step in steps if step >= at_least]


@pytest.mark.parametrize(("device", "precision"), on_devices(BOUND, ["float32"]))
def test_fine_tuning_and_its_scores_are_those_of_the_cpu(
    device: str, precision: str, trained: Path, tuning: str, run: Run
) -> None:
    keys = ("model.dropout=0", "model.expert_dropout=0", "model.router.jitter=0", "log.every_steps=1")
    scored = {}
    for out, where in (("on_cpu", "cpu"), ("on_device", device)):
        train = (f"train.device={where}", f"train.precision={precision}", "--model", trained)
        run("finetune", tuning, *keys, *train, "--out", out)
        found = run("eval", "on_cpu", f"device={where}", f"precision={precision}", "scoring.decoding.beams=2",
                    "eval.capacity=[paper, dropless]", "--out", f"eval_{out}")  # fmt: skip
        scored[out] = found["passes"]
    assert_same_course("on_device", "on_cpu", BOUND[precision])
    for ours, theirs in zip(scored["on_device"], scored["on_cpu"], strict=True):
        assert ours["tasks"].keys() == theirs["tasks"].keys() == {"colour", "last"}
        for task, figures in ours["held_out"].items():
            expected = theirs["held_out"][task]["neg_log_perplexity"]
            assert figures["neg_log_perplexity"] == pytest.approx(expected, abs=BOUND[precision])
        if precision == "float32":  # an answer that bfloat16 changes may change a score by one example
            assert {task: ours["tasks"][task]["score"] for task in ours["tasks"]} == {
                task: theirs["tasks"][task]["score"] for task in theirs["tasks"]
            }


@pytest.mark.parametrize(("device", "precision"), on_devices(BOUND, ["float32"]))
def test_distillation_has_the_losses_of_the_cpu(
    device: str, precision: str, trained: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out, where in (("on_cpu", "cpu"), ("on_device", device)):
        keys = (*QUIET[::2], f"train.device={where}", f"train.precision={precision}", "train.steps=4")
        found = run("distill", "--teacher", trained, *keys, "--out", out)
        assert found["step"] == 4
        assert found["distillation"]["student"]["metrics"].keys() == found["distillation"]["teacher"]["metrics"].keys()
    assert_same_course("on_device", "on_cpu", BOUND[precision])


DECODING = {
    "greedy": (),
    "a batch": ("--batch", 4),
    "beams": ("--beams", 3, "--batch", 2),
    "beams with a penalty": ("--beams", 4, "--length-penalty", 2.0),
    "sampling": ("--temperature", 1.5, "--top-p", 0.9, "--seed", 3),
    "paper capacity": ("--capacity", "paper", "--batch", 4),
}


@pytest.mark.parametrize(("device", "case"), on_devices(DECODING))
def test_answers_are_those_of_the_cpu(device: str, case: str, trained: Path, run: Run) -> None:
    """Token for token, in float32.

    Logits of two devices differ by about 1e-6, and what is drawn comes from a generator on the host: an answer can
    differ only where two tokens are as close as that, about once in 10,000 tokens. Here are 48.
    """
    command = ("generate", trained, *PROMPTS, "--max-tokens", 12, *DECODING[case])
    expected = run(*command, "--device", "cpu")
    assert len({answer["output"] for answer in expected["answers"]}) > 1 or case != "sampling"
    assert run(*command, "--device", device) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_of_a_device_is_upcycled_pruned_converted_and_examined(
    device: str, recipe: str, trained: Path, run: Run, switchcli: SwitchCLI
) -> None:
    """Files are written from the device, and what is made of them is measured there and on the CPU.

    Experts of an upcycled model are copies and tie: its routing may differ between devices, its outputs may not.
    """
    run("pretrain", recipe, *QUIET[1:], "model.num_experts=1", f"train.device={device}", "--out", "dense")
    run("upcycle", "dense", "sparse", "--experts", 4)
    wanted = ("eval.capacity=[dropless]", "text.sequences=8")
    figures = {}
    for model in ("dense", "sparse"):
        for where in ("cpu", device):
            found = run("eval", model, f"device={where}", *wanted, "--out", f"{model}-{where}")
            figures[model, where] = found["passes"][0]["held_out"]["text"]["neg_log_perplexity"]
    assert list(figures.values()) == pytest.approx([figures["dense", "cpu"]] * len(figures), abs=BOUND["float32"])
    pruned = [
        run("prune", trained, f"pruned_{number}", "--experts", 2, f"device={where}")
        for number, where in enumerate(("cpu", device))
    ]
    before_and_after = [[found["held_out"]["text"][when] for when in ("before", "after")] for found in pruned]
    assert before_and_after[1] == pytest.approx(before_and_after[0], abs=BOUND["float32"])
    assert switchcli("convert", "pruned_1", "hf", "--to", "huggingface").code == 0
    converted = [
        run("eval", "hf", f"device={where}", *wanted, "--out", f"hf-{number}")["passes"][0]["held_out"]["text"]
        for number, where in enumerate(("cpu", device))
    ]
    expected = converted[0]["neg_log_perplexity"]
    assert converted[1]["neg_log_perplexity"] == pytest.approx(expected, abs=BOUND["float32"])
    assert switchcli("doctor", "pruned_1").code == 0
    routing = [run("report", "--routing", trained, f"device={where}") for where in ("cpu", device)]
    loads = [{name: layer["load"] for name, layer in one["routing"]["layers"].items()} for one in routing]
    assert loads[1] == loads[0]
