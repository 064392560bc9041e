"""Write the parts of the reference that are generated from the code, as Markdown files that the pages include."""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import typer

import deploypipe
from deploypipe import errors, recipe, target
from deploypipe.budgets import BUDGETS
from deploypipe.cli import app
from deploypipe.records.stages import STAGES

PACKAGE = Path(deploypipe.__file__).parent


def write_pages(folder: Path) -> None:
    """Write every part; a file whose text is the same is left, so that a second build is quick."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PARTS.items():
        path, text = folder / f"{name}.md", make()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def commands() -> str:
    """The command line: every command with its arguments and options."""
    program = typer.main.get_command(app)
    return "\n".join(_commands_below(program, "deploypipe"))


def _commands_below(group: Any, path: str) -> Iterable[str]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands_below(command, f"{path} {name}")
            continue
        yield f"## `{path} {name}`\n\n{_paragraphs(command.help or '')}\n"
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        usage = " ".join(_argument(each) for each in arguments)
        yield f"```text\n{path} {name} {usage} [OPTIONS]\n```\n"
        if rows := [_parameter_row(each) for each in command.params if not getattr(each, "hidden", False)]:
            yield "| argument or option | meaning | default |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        if command.epilog:
            yield f"{_paragraphs(command.epilog)}\n"


def _argument(parameter: Any) -> str:
    name = (parameter.metavar or parameter.name.upper()).strip("[]")
    many = "..." if parameter.nargs == -1 and not name.endswith("...") else ""
    return f"{name}{many}" if parameter.required else f"[{name}{many}]"


def _parameter_row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"| `{_argument(parameter)}` | {_cell(parameter.help or '')} | {'' if parameter.required else 'none'} |"
    flags = ", ".join([*parameter.opts, *parameter.secondary_opts])
    value = "" if parameter.is_flag else f" {parameter.metavar or _kind(parameter.type_descriptor.annotation)}"
    default = parameter.default
    is_unset = default is None or callable(default) or default in ((), [], "") or "UNSET" in repr(default)
    shown = "off" if default is False else "on" if default is True else "" if is_unset else f"`{default}`"
    return f"| {_code(flags + value)} | {_cell(parameter.help or '')} | {shown} |"


def _kind(annotation: Any) -> str:
    """What an option takes: its choices, or the name of its type."""
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return "|".join(str(each.value) for each in annotation)
    return {str: "TEXT", Path: "PATH", int: "INTEGER", float: "NUMBER"}.get(annotation, "VALUE")


def _paragraphs(text: str) -> str:
    return re.sub(r"\\b\n?", "", inspect.cleandoc(text).replace("<", "\\<"))


def _cell(text: str) -> str:
    """Text for a cell of a table: one line, no bar that ends the cell, no angle that begins a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


def records(*roots: type) -> str:
    """Every field of these dataclasses and of those below them: type, default, meaning from the comments."""
    return "\n".join(_record(each) for each in _with_inner(roots))


def _with_inner(roots: Iterable[type]) -> list[type]:
    found: list[type] = []
    for root in roots:
        if root not in found:
            found.append(root)
            hints = typing.get_type_hints(root)
            inner = [each for field in dataclasses.fields(root) for each in _dataclasses_in(hints[field.name])]
            found += [each for each in _with_inner(inner) if each not in found]
    return found


def _dataclasses_in(hint: Any) -> list[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [each for argument in typing.get_args(hint) for each in _dataclasses_in(argument)]


def _record(record: type) -> str:
    comments, hints = field_comments(record), typing.get_type_hints(record)
    lines = [f"## {record.__name__}", "", _paragraphs(record.__doc__ or ""), ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, annotation, default in _fields_as_written(record):
        lines.append(
            f"| `{name}` | {_code(annotation)} | {_code(default)} | {_meaning(comments.get(name, ''), hints[name])} |"
        )
    return "\n".join(lines) + "\n"


def _meaning(comment: str, hint: Any) -> str:
    """The comment; for a record of its own also where it stands; for the name of a method, what it is for."""
    inner = _dataclasses_in(hint)
    if inner:
        return ", ".join(f"[{each.__name__}](#{each.__name__.lower()})" for each in inner)
    is_name = typing.get_origin(hint) is typing.Literal and len(typing.get_args(hint)) == 1
    return _cell(comment) or ("the name of this method in `--set`" if is_name else "")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else "(required)"


def _fields_as_written(record: type) -> list[tuple[str, str, str]]:
    """Name, annotation and default as the source has them; a factory is shown by the call it makes."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(record))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return [
        (node.target.id, ast.unparse(node.annotation), _default(node.value))
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        factory = next((ast.unparse(each.value) for each in value.keywords if each.arg == "default_factory"), "")
        return {"dict": "{}", "list": "[]", "": ast.unparse(value)}.get(factory, f"{factory}()")
    return ast.unparse(value).replace("'", '"') if value is not None else ""


def field_comments(record: type) -> dict[str, str]:
    """The comments of each field: those on the lines before it, and the one at the end of its line."""
    source = inspect.getsource(record)
    names = {node.lineno: name for node, name in _lines_of_fields(source)}
    found: dict[str, list[str]] = defaultdict(list)
    waiting: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            text = re.sub(r"\s*type: ignore\S*", "", token.string.lstrip("# "))
            is_alone = not token.line[: token.start[1]].strip()
            (waiting if is_alone else found[names.get(line, "")]).append(text)
        elif line in names and waiting:
            found[names[line]] += waiting
            waiting = []
    return {name: " ".join(texts) for name, texts in found.items()}


def _lines_of_fields(source: str) -> list[tuple[ast.AnnAssign, str]]:
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    nodes = [node for node in body.body if isinstance(node, ast.AnnAssign)]
    return [(node, node.target.id) for node in nodes if isinstance(node.target, ast.Name)]


def budgets() -> str:
    """The budgets that a search and a gate know, with their units."""
    lines = ["| key | limits | units | margin that a search leaves |", "|---|---|---|---|"]
    for row in BUDGETS.values():
        units = ", ".join(["x", *row.units])
        lines.append(f"| `{row.name}` | {row.label} | {units} | {100 * row.margin:g} % |")
    return "\n".join(lines) + "\n"


def stages() -> str:
    """The stages in the order of a run, by their name in the run folder and their title in the report."""
    lines = ["| in the run folder | in the report |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{stage.name}` | {stage.title} |" for stage in STAGES)]) + "\n"


def functions() -> str:
    """The public functions, in the order of a run, for autodoc."""
    homes = vars(deploypipe)["_HOMES"]
    listed = [f".. autofunction:: deploypipe.{name}\n" for name in homes]
    return "```{eval-rst}\n" + "\n".join(listed) + "```\n"


def error_catalogue() -> str:
    """Every error class, and the messages that the code raises with it, grouped by the folder that raises them."""
    messages = error_messages()
    parts = []
    for name, kind in vars(errors).items():
        if not inspect.isclass(kind) or not issubclass(kind, errors.DeploypipeError):
            continue
        parts.append(f"## {name}\n\n{_paragraphs(kind.__doc__ or '')}\n")
        for room, texts in sorted(messages.get(name, {}).items()):
            parts.append(f"From `{room}`:\n\n" + "\n".join(f"- {_cell(text)}" for text in sorted(set(texts))) + "\n")
    return "\n".join(parts)


def error_messages() -> dict[str, dict[str, list[str]]]:
    """Error class -> folder or file -> messages. What a message takes from the run stands in braces."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    names = {name for name, kind in vars(errors).items() if inspect.isclass(kind)} | {"ValueError"}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                kind = "ConfigError" if node.func.id == "ValueError" else node.func.id
                texts = [text for argument in node.args if (text := template(argument))]
                if texts and len("".join(texts)) > 20:
                    found[kind][room].append("; ".join(texts))
    return found


def template(node: ast.expr) -> str:
    """The text of a string or f-string, its holes as {name}; empty if it is neither."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    if not isinstance(node, ast.JoinedStr):
        return ""
    return "".join(
        each.value if isinstance(each, ast.Constant) else f"{{{_hole(each)}}}"  # type: ignore[attr-defined]
        for each in node.values
    )


def _hole(node: ast.expr) -> str:
    """A short name of what is filled in: the last name of the expression."""
    names = re.findall(r"[A-Za-z_]\w*", ast.unparse(node.value))  # type: ignore[attr-defined]
    return names[-1].strip("_") if names else "..."


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "recipe": lambda: records(recipe.Recipe),
    "target": lambda: records(target.Target),
    "budgets": budgets,
    "stages": stages,
    "functions": functions,
    "errors": error_catalogue,
}


OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+\.md)(?:#[^)]*)?\)")


def offer_files_outside(app: Any, page: str, source: list[str]) -> None:
    """A link to a Markdown file outside of docs/, which is no page of the site, becomes a download."""
    folder = (Path(app.srcdir) / page).parent

    def changed(link: re.Match[str]) -> str:
        is_page = (folder / link[2]).resolve().is_relative_to(Path(app.srcdir).resolve())
        return link[0] if is_page else f"{{download}}`{link[1]} <{link[2]}>`"

    source[0] = OUTSIDE.sub(changed, source[0])


ARGUMENT = re.compile(r"([a-z_.]+(?:, [a-z_.]+)*): ")


def as_plain_paragraphs(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn our docstrings, plain text with examples, into reStructuredText: a paragraph of arguments becomes a list."""
    lines[:] = [
        line
        for block in "\n".join(lines).split("\n\n")
        for line in ([*block.splitlines(), ""] if block.lstrip().startswith(">>>") else [*_paragraph(block), ""])
    ]


def _paragraph(block: str) -> list[str]:
    texts = [
        re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line.strip().replace("*", "\\*")) for line in block.splitlines()
    ]
    if not texts or not ARGUMENT.match(texts[0]):
        return texts
    return [ARGUMENT.sub(r"- **\1**: ", text, count=1) if ARGUMENT.match(text) else f"  {text}" for text in texts]


def setup(sphinx: Any) -> dict[str, bool]:
    """Called by Sphinx: write the parts before the pages are read."""
    sphinx.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "_generated"))
    sphinx.connect("source-read", offer_files_outside)
    sphinx.connect("autodoc-process-docstring", as_plain_paragraphs)
    return {"parallel_read_safe": True}
