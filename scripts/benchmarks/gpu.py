"""Runs the tests for a GPU and the GPU benchmark in calls of under ten minutes, the most important first.

Each call is a process and leaves OUT/NAME.json; a call that has one is skipped, so that the same command goes on after
a stop of any kind. OUT/all.json holds all of them, and the tables are printed at the end. No figures of a GPU exist
yet: the minutes that --dry-run lists are estimates. `--device cpu --tiny` tries the whole script without a GPU.
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_calls import DENSE, EXPERTS, LIMIT_SECONDS, MODELS, WHO, Call, calls

ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1  # Linux, sys/prctl.h
RESULT = "result of the job: "
"""Starts the line of stdout with a job's result; libraries print lines of their own, at exit too."""


def main() -> int:
    options = parser().parse_args()
    if options.job:
        print(f"\n{RESULT}{json.dumps(run_job(json.loads(options.job)))}")
        return 0
    out = Path(options.out).resolve()
    chosen = [call for call in calls() if not options.only or any(name in call.name for name in options.only)]
    if not chosen:
        parser().error(f"no call has {' or '.join(options.only)} in its name: --dry-run lists them")
    left = [call for call in chosen if not is_done(out, call, options)]
    if options.dry_run:
        list_calls(chosen, left)
        return 0
    if options.report:
        report(out)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    failures = run(left, out, options)
    report(out)
    return 1 if failures else 0


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="scripts/gpu [--python PYTHON]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described.add_argument("--out", default="runs/gpu", help="folder of the results (default: runs/gpu)")
    described.add_argument("--dry-run", action="store_true", help="list the calls with estimated minutes")
    described.add_argument("--only", action="append", metavar="NAME", help="calls with NAME in their name; repeatable")
    described.add_argument("--minutes", type=float, help="start no call that is estimated not to fit in so many")
    described.add_argument("--again", action="store_true", help="run again what failed, timed out or was not installed")
    described.add_argument("--report", action="store_true", help="print the tables of the results that are there")
    described.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default: cuda")
    described.add_argument("--tiny", action="store_true", help="tiny shapes, and a few tests: tries the script itself")
    described.add_argument("--job", help=argparse.SUPPRESS)
    return described


def is_done(out: Path, call: Call, options: argparse.Namespace) -> bool:
    """Return whether the call has a result of this device and these shapes; with --again only a good one counts."""
    result = read(out, call.name)
    if result is None or (result.get("device"), result.get("tiny")) != (options.device, options.tiny):
        return False
    return not options.again or result["status"] == "done"


def read(out: Path, name: str) -> dict[str, Any] | None:
    path = out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def list_calls(chosen: Sequence[Call], left: Sequence[Call]) -> None:
    print("call                                  minutes  what (minutes are estimates: no GPU has run this yet)")
    for call in chosen:
        note = "" if call in left else "  [done]"
        print(f"{call.name:<38} {call.minutes:>6.0f}  {call.what}{note}")
    print(f"{len(left)} of {len(chosen)} calls to do, about {sum(call.minutes for call in left):.0f} minutes")


def run(left: Sequence[Call], out: Path, options: argparse.Namespace) -> int:
    """Run the calls in order and return how many failed; stop before one that does not fit in `--minutes`."""
    started = time.monotonic()
    failures = 0
    for number, call in enumerate(left, start=1):
        spent = (time.monotonic() - started) / 60
        if options.minutes is not None and spent + call.minutes > options.minutes:
            print(f"{call.name} takes about {call.minutes:.0f} min, {options.minutes - spent:.1f} are left: stopping")
            break
        print(f"[{number}/{len(left)}] {call.name}: {call.what}", flush=True)
        begun = time.monotonic()
        result = run_call(call, out, options)
        result |= {"call": call.name, "device": options.device, "tiny": options.tiny}
        result["call_seconds"] = round(time.monotonic() - begun, 1)
        write(out / f"{call.name}.json", result)
        everything = {one.name: found for one in calls() if (found := read(out, one.name))}
        write(out / "all.json", everything)
        failures += result["status"] in ("failed", "timed out")
        reason = f": {result['reason'].strip().splitlines()[-1][:200]}" if result.get("reason") else ""
        print(f"    {result['status']} after {result['call_seconds']:.0f} s{reason}", flush=True)
    return failures


def run_call(call: Call, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one call in a process group of its own, which does not outlive this process's interest in it."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "tests.xml")
        job = {**call.job, "out": str(out), "device": options.device, "tiny": options.tiny}
        if job["kind"] == "tests":
            job["command"] = pytest_command(call, xml, options)
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        with started(command, environment) as process:
            try:
                printed, errors = process.communicate(timeout=LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                return {"status": "timed out", "reason": f"more than {LIMIT_SECONDS} s"}
        if call.job["kind"] == "tests":
            return tests_result(xml, process.returncode, printed + errors)
    if process.returncode:
        return {"status": "failed", "reason": errors[-3000:].strip() or f"exit code {process.returncode}"}
    line = next((line for line in reversed(printed.splitlines()) if line.startswith(RESULT)), None)
    if line is None:
        return {"status": "failed", "reason": errors[-3000:].strip() or "it printed no result"}
    result: dict[str, Any] = json.loads(line.removeprefix(RESULT))
    return result


@contextlib.contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """Start a process in a group of its own; at the end the group is killed, and also when this process is stopped."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        signal.signal(signal.SIGTERM, before)


def pytest_command(call: Call, xml: Path, options: argparse.Namespace) -> list[str]:
    """pytest without plugins, and with warnings shown: another machine's packages warn of their own."""
    file, *rest = call.job["arguments"]
    chosen = ["-m", "gpu", file, *rest]
    if options.device == "cpu":  # the same code, the CPU against itself; `tiny`: a few rows
        wanted = rest[rest.index("-k") + 1] if "-k" in rest else ""
        few = {"tests/model/test_gpu_layer.py": "groups", "tests/model/test_gpu_model.py": "packed"}
        few |= {"tests/commands/test_gpu.py": "answers_are_those_of_the_cpu and greedy"}
        narrowed = [
            f"({one})" for one in (wanted if not options.tiny else "", few[file] if options.tiny else "") if one
        ]
        chosen = ["-m", "not gpu", file, "-k", " and ".join(narrowed or ["cpu"])]
    return [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", f"--junitxml={xml}", *chosen,
    ]  # fmt: skip


def tests_result(xml: Path, code: int, printed: str) -> dict[str, Any]:
    """Count pytest's results, with the last line of each failure."""
    if not xml.is_file():
        return {"status": "failed", "reason": printed[-3000:]}
    cases = ET.parse(xml).getroot().findall(".//testcase")
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (found.get("message") or "")[:500]
        for case in cases
        for found in [*case.findall("failure"), *case.findall("error")]
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    status = "done" if code == 0 and passed else "failed"
    reason = {} if status == "done" else {"reason": "; ".join(failed) or f"{passed} passed, {skipped} skipped"}
    slowest = sorted(cases, key=lambda case: -float(case.get("time") or 0))[:3]
    return {
        "status": status,
        "passed": passed,
        "skipped": skipped,
        "failed": failed,
        "slowest": {str(case.get("name")): float(case.get("time") or 0) for case in slowest},
        **reason,
    }


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Do the work of a call, in its own process, which is killed when the one that started it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if job["kind"] == "tests":
        os.execv(job["command"][0], job["command"])
    if job["kind"] == "step":
        from gpu_step import step

        return step(job)
    if job["kind"] == "waits":
        from gpu_waits import waits

        return waits(job)
    from gpu_layer import layer

    return layer(job)


def write(path: Path, value: object) -> None:
    """Write the file completely or not at all."""
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)


def report(out: Path) -> None:
    """Print Markdown tables of what is there."""
    print("\n| tests | passed | failed | skipped |\n|---|---|---|---|")
    for call in calls():
        result = read(out, call.name)
        if result and call.job["kind"] == "tests":
            counted = [
                str(result.get("passed", "")),
                str(len(result.get("failed", ()))),
                str(result.get("skipped", "")),
            ]
            print(f"| {call.name} ({result['status']}) | {' | '.join(counted)} |")
    print("\n| model | who | batch | input tokens/s | of the ceiling | peak GiB | planned tokens/s | planned GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for who in WHO:
            if result := read(out, f"step-{model}-{who}"):
                print(f"| {model} | {who} | {' | '.join(step_cells(result))} |")
    print()
    for name, met, words in targets(out):
        print(f"{name}: {words} ({'met' if met else 'missed'})" if words else f"{name}: not measured")
    for experts in sorted(EXPERTS):
        result = read(out, f"layer-{experts}")
        if result and result["status"] == "done":
            print(f"\n| {experts} experts | milliseconds | over the dense feed-forward | TFLOP/s |\n|---|---|---|---|")
            for way, row in result["ways"].items():
                print(f"| {way} | {' | '.join(way_cells(row))} |")


def step_cells(result: dict[str, Any]) -> list[str]:
    if result["status"] != "done":
        return [result["status"], (result.get("reason") or "").strip().splitlines()[-1][:100], "", "", "", ""]
    tokens, peak, planned = result["tokens_per_second"], result["peak"], result.get("planned")
    return [
        str(result["batch"]),
        f"{tokens['median']:,.0f} ({tokens['least']:,.0f} to {tokens['most']:,.0f})",
        f"{result['share_of_ceiling']:.1%}",
        f"{max(peak.values()):.1f}",
        f"{planned['tokens_per_second']:,.0f} ({planned['gpu']})" if planned else "",
        f"{planned['gib']:.1f}" if planned else "",
    ]


def way_cells(row: dict[str, Any]) -> list[str]:
    if "seconds" not in row:
        return [next(iter(row.values())), "", ""]
    milliseconds, over = sorted(1e3 * each for each in row["seconds"]), row["over_dense"]
    return [
        f"{milliseconds[len(milliseconds) // 2]:.2f} ({milliseconds[0]:.2f} to {milliseconds[-1]:.2f})",
        f"{over['median']:.2f} ({over['least']:.2f} to {over['most']:.2f})",
        f"{row['flops_per_second'] / 1e12:.1f}",
    ]


def targets(out: Path) -> list[tuple[str, bool, str]]:
    """Return the three targets: name, whether it is met, and the figures; none where a GPU has not done the calls."""
    speed = {}
    for model in MODELS:
        found = [read(out, f"step-{model}-{who}") for who in WHO if who != "transformers"]
        done = [one for one in found if one and one["status"] == "done" and one["machine"]["device"] == "cuda"]
        speeds = [one["tokens_per_second"]["median"] for one in done]
        if speeds:
            speed[model] = max(speeds)
    dense, sparse = speed.get(DENSE), [speed[model] for model in MODELS[1:] if model in speed]
    share = speed["switch-base-64"] / dense if dense and "switch-base-64" in speed else 0.0
    cost = max(sparse) / min(sparse) - 1 if len(sparse) == len(MODELS) - 1 else 0.0
    return [
        (f"{DENSE} at 250,000 input tokens/s or more", (dense or 0) >= 250e3, f"{dense:,.0f}" if dense else ""),
        ("switch-base-64 at 0.8 of the dense model or more", share >= 0.8, f"{share:.2f}" if share else ""),
        ("8 to 128 experts cost under 10 %", cost < 0.1, f"{cost:.1%}" if cost else ""),
    ]


if __name__ == "__main__":
    sys.exit(main())
