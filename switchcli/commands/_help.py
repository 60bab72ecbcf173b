"""The epilog of a command's help, and the columns of its options."""

from pathlib import Path
from typing import Any, Final

_PACKAGE: Final = Path(__file__).parents[1]
DOCS: Final = (
    "switchcli/docs/{page}.md in site-packages" if (_PACKAGE / "docs").is_dir() else "docs/{page}.md in the repository"
)
"""Where a page of the documentation is: a wheel holds the pages that `--help` names."""


def epilog(page: str, *examples: str) -> str:
    """Return the end of a verb's help: commands to copy, and the page of the documentation that explains the verb.

    A line holds one command of at most 76 characters, so that a terminal of 80 columns does not break it.
    """
    lines = ["Examples:", *(f"  {example}" for example in examples), "", f"More: {DOCS.format(page=page)}"]
    return "\n".join(lines).replace("[", r"\[")  # Typer reads [name] as markup


def simplify(parameter: Any) -> Any:
    """Make a parameter of Typer short in `--help`, and return it.

    An argument is shown by its name in capitals, a flag without a type, a number without its range, which the error
    about a wrong one names.
    """
    if parameter.param_type_name == "argument":
        parameter.metavar = parameter.metavar or parameter.name.upper()
        in_usage = parameter.metavar
        if not parameter.required and not in_usage.startswith("["):
            in_usage = f"[{in_usage}]"
        parameter.get_usage_pieces = lambda context: [in_usage]
        parameter.display_type_rich = lambda ctx: ""
    else:
        if parameter.is_flag:
            parameter.metavar = ""
        parameter.min = parameter.max = None
    return parameter
