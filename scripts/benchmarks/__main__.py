"""The benchmark behind scripts/bench: jobs in processes of their own take turns; tables in Markdown on stdout.

A ratio is taken within a round, of runs side by side, and printed as median (least to most): machines are noisy.
"""

import argparse
import json
import os
import platform
from pathlib import Path

from attention import attention
from busy import WORK
from contestants import AGAINST_OTHERS
from data import data
from distill import distill
from expert_products import expert_products
from generate import generate
from layer import layer
from machine import PRECISIONS, SIZES, ceilings
from optimizer import optimizer
from paper import paper
from parts import parts
from peers import ROWS, chosen
from products import products
from recompute import recompute
from report import report
from saving import saving
from scaling import scaling
from serving import serving
from small import small
from startup import startup
from tables import EXPERTS, TABLES

from switchcli.system.processor import available_processors

SECTIONS = {
    "ceilings": ceilings,
    "layer": layer,
    "parts": parts,
    "products": products,
    "recompute": recompute,
    "attention": attention,
    "small": small,
    "optimizer": optimizer,
    "expert_products": expert_products,
    "generate": generate,
    "serving": serving,
    "distill": distill,
    "scaling": scaling,
    "saving": saving,
    "startup": startup,
    "data": data,
    "paper": paper,
    "report": report,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(TABLES)}; all when none is named")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=available_processors())
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, *EXPERTS], help="1 is the dense model, of `step`")
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--megabytes", type=int, default=32, help="of text, of `data`")
    parser.add_argument("--checkpoint", default="", help="of `serving`: a dense run on tasks; default: random weights")
    parser.add_argument("--against", default="", metavar="FOLDER", help="of `startup`: another checkout, in turns")
    parser.add_argument("--openmp", default="", metavar="LIBRARY", help="of `busy`: another OpenMP runtime")
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK), help="verbs of `busy`")
    parser.add_argument("--shape", default="base", choices=list(SIZES), help="of `layer`, `step` and `generate`")
    parser.add_argument("--optimizers", nargs="+", default=["adafactor", "adamw"], choices=["adafactor", "adamw"])
    parser.add_argument("--dropout", type=float, default=0.1, help="of `step`")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only the tables against others, and of them the rows with one of these names, or with a part of it such "
        f"as sdpa or compiled: {'; '.join(dict.fromkeys(row.name for row in ROWS))}",
    )
    parser.add_argument("--limit", type=int, default=900, help="seconds until a contestant must be ready, or compiled")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = json.loads(options.job)
        result = json.dumps(SECTIONS[job["section"]](job))
        if os.environ.get("RANK", "0") == "0":
            print(result)
        return
    if unknown := set(options.sections) - set(TABLES):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    if unknown := [name for name in options.rows if not chosen(ROWS, [name])]:
        parser.error(f"no row has {', '.join(unknown)} in its name; --help lists them")
    common = {"device": options.device, "threads": options.threads, "rounds": options.rounds}
    print(f"{processor()}, {options.threads} threads, {platform.python_version()}, torch {version('torch')}\n")
    against = {"shape": options.shape, "rows": options.rows}
    against |= {"optimizers": options.optimizers, "dropout": options.dropout, "limit": options.limit}
    settings = {
        **dict.fromkeys(AGAINST_OTHERS, against),
        "data": {"megabytes": options.megabytes},
        "serving": {"checkpoint": options.checkpoint},
        "startup": {"against": options.against},
        "busy": {"openmp": options.openmp, "work": options.work},
    }
    for name in options.sections or TABLES:
        TABLES[name]({**common, **settings.get(name, {})}, options.precision, options.experts)


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
