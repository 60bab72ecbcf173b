"""switchcli: Switch Transformers (Fedus, Zoph, Shazeer 2021) in PyTorch, from the command line and from Python.

The names of the Python API are imported from `switchcli.api` when they are first used: `import switchcli` is fast.
"""

import os

TYPE_CHECKING = False  # not from typing: until __main__ has run, a Ctrl-C ends in a traceback of the module in import
if TYPE_CHECKING:
    from typing import Any

    from switchcli import errors
    from switchcli.api import (
        Best,
        Evaluation,
        LabelCounts,
        LayerRouting,
        Model,
        Recipe,
        Score,
        Scores,
        TextRouting,
        TrainResult,
        load,
        train,
    )

__version__ = "0.2.0"
__all__ = [
    "Best",
    "Evaluation",
    "LabelCounts",
    "LayerRouting",
    "Model",
    "Recipe",
    "Score",
    "Scores",
    "TextRouting",
    "TrainResult",
    "errors",
    "load",
    "train",
]


def __getattr__(name: str) -> "Any":
    """Import a name of the API. Python calls this for names that the module does not have yet."""
    if name not in __all__:
        raise AttributeError(f"module 'switchcli' has no attribute {name!r}")
    if name == "errors":
        import switchcli.errors  # which sets the name

        return switchcli.errors
    from switchcli.system import startup

    startup.limit_spinning(os.environ)  # before torch is imported, as in the command line
    from switchcli import api

    globals()[name] = value = getattr(api, name)
    return value


def __dir__() -> list[str]:
    """Return the names of the module, with those that have not been imported yet."""
    return sorted({*globals(), *__all__})
