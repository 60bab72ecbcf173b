"""The benchmark behind scripts/bench: jobs in processes of their own take turns; tables in Markdown on stdout.

A ratio is taken within a round, of runs side by side, and printed as median (least to most): machines are noisy.
"""

import argparse
import platform
from importlib.metadata import version

from busy import WORK
from machine import PRECISIONS, SIZES
from peers import ROWS, chosen
from tables import EXPERTS, TABLES

from switchcli.system.processor import available_processors, processor_name


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(TABLES)}; all when none is named")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=available_processors())
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, *EXPERTS], help="1 is the dense model")
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--shape", default="base", choices=list(SIZES), help="of `layer`, `step` and `generate`")
    parser.add_argument("--optimizers", nargs="+", default=["adafactor", "adamw"], choices=["adafactor", "adamw"])
    parser.add_argument("--dropout", type=float, default=0.1, help="of `step`")
    parser.add_argument("--beams", type=int, default=1, help="of `generate`")
    parser.add_argument("--megabytes", type=int, default=32, help="of text, of `data`")
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK), help="verbs of `busy`")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of `layer`, `step` and `generate`: only the rows with one of these names, or with a part of it such as "
        f"sdpa or compiled: {'; '.join(dict.fromkeys(row.name for row in ROWS))}",
    )
    parser.add_argument("--limit", type=int, default=900, help="seconds until a contestant must be ready, or compiled")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(TABLES):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    if unknown := [name for name in options.rows if not chosen(ROWS, [name])]:
        parser.error(f"no row has {', '.join(unknown)} in its name; --help lists them")
    print(f"{processor_name()}, {options.threads} threads, {platform.python_version()}, torch {version('torch')}\n")
    for name in options.sections or TABLES:
        TABLES[name](options)


if __name__ == "__main__":
    main()
