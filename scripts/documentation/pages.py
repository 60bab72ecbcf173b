"""The parts of docs/reference that are made from the code: recipe keys, commands, Python API."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer

import switchcli
from switchcli.cli import app
from switchcli.commands._options import DOCS
from switchcli.recipe import key_index
from switchcli.recipe.key_info import KeyInfo

# Recipe keys


def recipes() -> str:
    """Return one heading for each top-level key, and one item for each meaning of a key."""
    infos = key_index.all_keys()
    lines: list[str] = []
    for top in dict.fromkeys(_top(info.key) for info in infos):
        group = [info for info in infos if _top(info.key) == top]
        verbs = {info.verbs for info in group}
        lines.append(f"## `{top}`\n")
        if len(verbs) == 1:
            lines.append(f"In recipes of {_list(group[0].verbs)}.\n")
        lines += [_item(info, with_verbs=len(verbs) > 1) for info in group]
        lines.append("")
    return "\n".join(lines)


def _top(key: str) -> str:
    return re.split(r"[.\[]", key)[0]


def _list(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _item(info: KeyInfo, with_verbs: bool) -> str:
    words = [_type(info)]
    words.append("required" if info.default is None else f"default {_code(info.default)}")
    if kinds := key_index.kinds(info):
        where = info.when[0].partition("=")[0]
        name = "kind" if where.rpartition(".")[0].removesuffix("[]") == _parent(info.key) else where
        words.append(f"if {_code(name)} is {_list([_code(kind) for kind in kinds], 'or')}")
    if with_verbs:
        words.append(_list(info.verbs))
    return f"- **{_code(info.key)}**: {'; '.join(words)}.<br>\n  {escape(info.description)}"


def _parent(key: str) -> str:
    return key.rpartition(".")[0].removesuffix("[]")


def _type(info: KeyInfo) -> str:
    """Return the type, with the choices in place of the word for them."""
    if not info.choices:
        return info.type
    choices = " or ".join([", ".join(map(_code, info.choices[:-1])), _code(info.choices[-1])])
    choices = choices if len(info.choices) > 1 else _code(info.choices[0])
    found = re.sub(r"\bchoices?\b", lambda match: choices, info.type)
    return found if found != info.type else f"{info.type}: {choices}"


def _code(text: str) -> str:
    return f"`{text}`"


def escape(text: str) -> str:
    """Return text with the characters of Markdown and HTML escaped, except in `code`."""
    parts = re.split(r"(``?[^`]+``?)", text)
    return "".join(part if part.startswith("`") else _escape(part) for part in parts)


def _escape(text: str) -> str:
    return re.sub(r"(?<!\w)_|_(?!\w)|[*\\]", r"\\\g<0>", text.replace("<", "&lt;"))


# Commands


def commands() -> str:
    """Return the usage, arguments, options with defaults, and examples of all commands."""
    leaves = _leaves(typer.main.get_command(app), ())
    return "\n".join(_command_section(words, command) for words, command in leaves)


def _leaves(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command that does something, with its words."""
    children = getattr(command, "commands", None)
    if children is None:
        yield words, command
        return
    for name, child in children.items():
        yield from _leaves(child, (*words, name))


def _command_section(words: Sequence[str], command: Any) -> str:
    name = " ".join(["switchcli", *words])
    context = command.make_context(name, [], resilient_parsing=True)
    parameters = [item for item in command.get_params(context) if not item.hidden and item.name != "help"]
    arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
    options = [parameter for parameter in parameters if parameter.param_type_name == "option"]
    in_usage = [piece for argument in arguments for piece in argument.get_usage_pieces(context)]
    usage = " ".join([name, *in_usage, *(["[OPTIONS]"] if options else [])])
    lines = [f"## {name}\n", f"{escape(_plain(command.help))}\n", f"```text\n{usage}\n```\n"]
    for title, shown in (("argument", arguments), ("option", options)):
        if shown:
            lines.append(f"| {title} | meaning | default |\n|---|---|---|")
            lines += [
                f"| {_names(parameter)} | {_cell(parameter.help)} | {_default(parameter)} |" for parameter in shown
            ]
            lines.append("")
    return "\n".join([*lines, *_epilog(command.epilog)])


def _plain(text: str | None) -> str:
    """Return a help text without the escapes of rich, on one line."""
    return " ".join((text or "").replace("\\[", "[").split())


def _cell(text: str | None) -> str:
    return escape(_plain(text)).replace("|", "\\|")


def _names(parameter: Any) -> str:
    """Return how a parameter is written, as code: `-q, --quiet`, `--out PATH`, `RECIPE`."""
    if parameter.param_type_name == "argument":
        return _cell_code(parameter.metavar)
    names = [*parameter.opts, *parameter.secondary_opts]
    return ", ".join(
        _cell_code(f"{name} {parameter.metavar}".strip() if name.startswith("--") else name) for name in names
    )


def _cell_code(text: str) -> str:
    return _code(text.replace("|", "\\|"))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    if isinstance(default, bool):
        return _code(parameter.opts[0]) if default else ""
    if default is None or default in ((), [], ""):
        return ""
    return _code(str(default))


def _epilog(text: str) -> Iterator[str]:
    """Yield the examples and the link of a command's epilog as Markdown."""
    *examples, more = [line.strip() for line in text.replace(r"\[", "[").splitlines()[1:] if line]
    commands = "\n".join(examples)
    before, after = f"More: {DOCS}".split("{page}")
    page = more.removeprefix(before).removesuffix(after)
    yield f"<!-- not run: the examples of `--help` -->\n```bash\n{commands}\n```\n"
    yield f"More: [{page}](../{page}.md)\n"


# The Python API


def python_api() -> str:
    """Return each name of `switchcli.__all__` with its public members."""
    lines: list[str] = []
    names = [name for name in switchcli.__all__ if not inspect.ismodule(getattr(switchcli, name))]
    for name in sorted(names, key=lambda name: (inspect.isclass(getattr(switchcli, name)), name)):
        section = _class_section if inspect.isclass(getattr(switchcli, name)) else _function_section
        lines.append(section(name, getattr(switchcli, name)))
    return "\n".join(lines)


def _class_section(name: str, cls: type[Any]) -> str:
    lines = [f"## switchcli.{name}\n", _docstring(cls)]
    members = [(key, member) for key, member in vars(cls).items() if not key.startswith("_")]
    docs = _attribute_docs(cls)
    rows = [f"| `{key}` | `{_type_name(hint)}` | {_cell(docs.get(key, ''))} |" for key, hint in _fields(cls).items()]
    for key, member in members:
        if isinstance(member, property):
            hint = _type_name(inspect.signature(member.fget).return_annotation)
            meaning = (inspect.getdoc(member) or "").partition("\nRaises:")[0]
            rows.append(f"| `{key}` | `{hint}` | {_cell(meaning)} |")
    if rows:
        lines.append("| attribute | type | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    for key, member in members:
        if inspect.isfunction(member) or isinstance(member, classmethod):
            lines.append(_method_section(f"{name}.{key}", member))
    return "\n".join(lines)


def _fields(cls: type[Any]) -> dict[str, Any]:
    if dataclasses.is_dataclass(cls):
        return {field.name: field.type for field in dataclasses.fields(cls) if not field.name.startswith("_")}
    return dict(inspect.get_annotations(cls)) if issubclass(cls, tuple) else {}


def _attribute_docs(cls: type[Any]) -> dict[str, str]:
    """Return the docstrings below the fields of a class, by the name of the field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for before, after in itertools.pairwise(body):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[before.target.id] = " ".join(str(after.value.value).split())  # type: ignore[union-attr]
    return docs


def _type_name(annotation: Any) -> str:
    return _plain_type(annotation).replace("|", "\\|")


def _method_section(name: str, member: Any) -> str:
    """Return the section of a method, without its first parameter."""
    function = member.__func__ if isinstance(member, classmethod) else member
    start = "@classmethod\n" if isinstance(member, classmethod) else ""
    parameters = [*inspect.signature(function).parameters.values()][1:]
    return f"### {name}\n\n```python\n{start}{_signature(function, parameters)}\n```\n\n{_docstring(function)}"


def _function_section(name: str, function: Any) -> str:
    """Return the section of a function: its signature as Python, and its docstring."""
    parameters = [*inspect.signature(function).parameters.values()]
    return f"## switchcli.{name}\n\n```python\n{_signature(function, parameters)}\n```\n\n{_docstring(function)}"


def _signature(function: Any, parameters: Sequence[inspect.Parameter]) -> str:
    """Return the signature of a function with these parameters as Python."""
    parts = [*map(_parameter, parameters)]
    for place, parameter in enumerate(parameters):
        if parameter.kind is parameter.KEYWORD_ONLY:
            parts.insert(place, "*")
            break
    start = f"def {function.__name__}("
    returns = f") -> {_plain_type(inspect.signature(function).return_annotation)}: ..."
    signature = f"{start}{', '.join(parts)}{returns}"
    if len(signature) > 100:
        signature = start + "\n" + "".join(f"    {part},\n" for part in parts) + returns
    return signature


def _plain_type(annotation: Any) -> str:
    """Return a type without the names of modules, and without what only pydantic reads."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_plain_type(member) for member in get_args(annotation))
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text).strip("'\"").replace("NoneType", "None")


def _parameter(parameter: inspect.Parameter) -> str:
    text = parameter.name
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {_plain_type(parameter.annotation)}"
    if parameter.default is not inspect.Parameter.empty:
        text += f" = {parameter.default!r}"
    return text


def _docstring(thing: Any) -> str:
    """Return a docstring as Markdown: sections `Args:` and `Raises:` as lists, indented examples as code."""
    lines: list[str] = []
    section = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line in ("Args:", "Raises:", "Returns:", "Yields:"):
            section = line.removesuffix(":")
            lines += [f"**{ {'Args': 'Arguments'}.get(section, section) }**\n"]
        elif section and (match := re.fullmatch(r"    ([\w, ]+): (.*)", line)):
            lines.append(f"- `{match[1]}`: {escape(match[2])}")
        elif section and line.startswith("        "):
            lines.append(f"  {escape(line.strip())}")
        elif not section and line.startswith("    "):
            lines.append(line)
        else:
            lines.append(escape(line))
    return "\n".join(lines) + "\n"
