"""Run the parts of the trace, print what they find, and leave OUT/NAME.json. The exit code is 1 if there is a fault."""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A part of the trace: what it shows, and the function that runs it."""

    what: str
    run: Callable[[], tuple[Any, list[str]]]
    """Return figures for the file, and faults."""


def steps() -> tuple[Any, list[str]]:
    from steps import pairwise, trace

    print(
        f"{'size':<16}{'router':<22}{'precision':<11}{'optimizer':<11}{'blocks':<8}{'verb':<10}{'operations':>10}{'s':>7}"
    )
    figures, faults = [], []
    for row in pairwise():
        traced = trace(row)
        figures.append({**row._asdict(), **traced._asdict()})
        size, router, precision, optimizer, blocks, verb = row
        words = f"{size:<16}{router:<22}{precision:<11}{optimizer:<11}{blocks:<8}{verb:<10}"
        print(f"{words}{traced.operations:>10,}{traced.seconds:>7}", *traced.faults, sep="\n    ", flush=True)
        faults += [f"{' '.join(row)}: {fault}" for fault in traced.faults]
    return figures, faults


def meshes() -> tuple[Any, list[str]]:
    from ranks import MESHES, in_own_process, trace_mesh

    figures, faults = [], []
    for mesh in MESHES:
        started = time.perf_counter()
        figure, found = trace_mesh(mesh, in_own_process)
        plan, count = figure["plan"], len(figure.pop("collectives"))
        figures.append({"size": mesh.size, "devices": mesh.devices, **figure, "collectives": count})
        print(f"{mesh.size} on {mesh.devices:,}: {figure['mesh']}, ranks {figure['ranks']}, {count} collectives each")
        for name in plan:
            print(f"    {name:<12}{figure[name]:>18,} bytes, {figure[name] / plan[name]:.4f} of the plan")
        print(f"    {time.perf_counter() - started:.0f} s", *found, sep="\n    ", flush=True)
        faults += [f"{mesh.size} on {mesh.devices}: {fault}" for fault in found]
    return figures, faults


def compiled() -> tuple[Any, list[str]]:
    """Compile in a process for each compute capability, because a device has one."""
    figures, faults = [], []
    for capability in ("90", "80"):
        command = [sys.executable, __file__, "--compile"]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env={**os.environ, "TRACE_CAPABILITY": capability}
        )
        if done.returncode:
            faults.append(f"sm_{capability}: {done.stderr[-1000:]}")
            continue
        for figure in json.loads(done.stdout.splitlines()[-1]):
            figures.append({"capability": capability, **figure})
            print(f"sm_{capability}", *(f"{name} {value}" for name, value in figure.items()), sep=", ", flush=True)
            faults += [f"sm_{capability}, {figure['size']}, {figure['router']}: {one}" for one in figure["faults"]]
    return figures, faults


def planted() -> tuple[Any, list[str]]:
    from faults import planted as plant

    found = plant()
    for name, words in found.items():
        print(f"{name}: {words[0] if words else 'OVERLOOKED'}", flush=True)
    return found, [f"{name}: overlooked" for name, words in found.items() if not words]


PARTS = {
    "planted": Part("faults that the trace must find", planted),
    "steps": Part("one step of each verb, by pairs of sizes and settings", steps),
    "compiled": Part("compiled blocks: graphs and kernels", compiled),
    "meshes": Part("ranks of large meshes: bytes and collectives", meshes),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu --trace", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; repeatable")
    parser.add_argument("--out", default="runs/trace", help="folder of the results (default: runs/trace)")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    if options.compile:
        from compiled import CASES, compile_case

        print(json.dumps([{**case._asdict(), **compile_case(case)._asdict()} for case in CASES]))
        return 0
    out, faults = Path(options.out), []
    out.mkdir(parents=True, exist_ok=True)
    for name in options.only or PARTS:
        started = time.perf_counter()
        print(f"\n{name}: {PARTS[name].what}", flush=True)
        figures, found = PARTS[name].run()
        (out / f"{name}.json").write_text(json.dumps({"figures": figures, "faults": found}, indent=1) + "\n")
        print(f"{name}: {len(found)} faults, {time.perf_counter() - started:.0f} s", flush=True)
        faults += found
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
