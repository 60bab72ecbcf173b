"""The benchmark behind scripts/bench: jobs in processes of their own take turns; tables in Markdown on stdout.

A ratio is taken within a round, of runs side by side, and printed as median (least to most): machines are noisy.
"""

import argparse
import json
import os
import platform
from pathlib import Path

from data import data
from distill import distill
from generate import generate
from layer import layer
from machine import PRECISIONS, ceilings
from optimizer import optimizer
from paper import paper
from parts import parts
from recompute import recompute
from report import report
from saving import saving
from scaling import scaling
from step import step
from tables import EXPERTS, TABLES

SECTIONS = {
    "ceilings": ceilings,
    "layer": layer,
    "step": step,
    "parts": parts,
    "recompute": recompute,
    "optimizer": optimizer,
    "generate": generate,
    "distill": distill,
    "scaling": scaling,
    "saving": saving,
    "data": data,
    "paper": paper,
    "report": report,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all when none is named")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, *EXPERTS], help="1 is the dense model, of `step`")
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--megabytes", type=int, default=32, help="of text, of `data`")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        result = json.dumps(SECTIONS[job["section"]](job))
        if os.environ.get("RANK", "0") == "0":
            print(result)
        return
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    common = {"device": options.device, "threads": options.threads, "rounds": options.rounds}
    common["megabytes"] = options.megabytes
    print(f"{processor()}, {options.threads} threads, {platform.python_version()}, torch {version('torch')}\n")
    for name in options.sections or SECTIONS:
        TABLES[name](common, options.precision, options.experts)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def version(package: str) -> str:
    from importlib import metadata

    return metadata.version(package)


if __name__ == "__main__":
    main()
