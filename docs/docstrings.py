"""The docstrings of this package on the site: griffe's extension, since they are plain text.

Shapes stand in comments beside arguments and fields, which no tool reads: the signature is shown as it is in the
source. A line "name: what it is" becomes an item of a list.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import griffe

ITEM = re.compile(r"^(?P<names>[a-z_][\w]*(?:(?:, | and )[a-z_]\w*)*): (?P<text>.*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes each docstring once it is read."""

    def on_function_instance(self, *, node: Any, func: griffe.Function, agent: Any, **_: Any) -> None:
        if isinstance(node, ast.FunctionDef):
            self._rewrite(func, source(func, node.lineno, body_of(node).lineno - 1))

    def on_class_members(self, *, node: Any, cls: griffe.Class, agent: Any, **_: Any) -> None:
        if isinstance(node, ast.ClassDef):
            self._rewrite(cls, fields_of(cls, node))

    def _rewrite(self, shown: griffe.Object, signature: str) -> None:
        text = shown.docstring.value if shown.docstring else docstring_of(shown)
        if text is not None:
            shown.docstring = griffe.Docstring(f"```python\n{signature}\n```\n\n{as_markdown(text)}", parent=shown)


def as_markdown(text: str) -> str:
    """The docstring with its "name: what it is" as items, each with its further lines."""
    parts = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.split("\n")
        first = next((number for number, line in enumerate(lines) if ITEM.match(line)), None)
        if first is None or lines[0].startswith("    "):
            parts.append(paragraph)
            continue
        before, items = lines[:first], "\n".join(lines[first:])
        # The items end where a line begins a sentence: names, and further lines of an item, begin small.
        items = re.sub(r"^(?=[A-Z])", "\n", items, flags=re.MULTILINE)
        items = ITEM.sub(lambda match: f"- `{match['names']}`: {match['text']}", items)
        parts += ["\n".join(before), items] if before else [items]
    return "\n\n".join(parts)


def docstring_of(shown: griffe.Object) -> str | None:
    """The docstring that a decorator gives, as of `ses_fast.ops`."""
    if not shown.path.startswith("ses_fast.ops."):
        return None
    found: Any = importlib.import_module("ses_fast.ops")
    return getattr(found, shown.name).__doc__ if hasattr(found, shown.name) else None


def body_of(node: Any) -> ast.stmt:
    """The first statement inside a function."""
    return node.body[0]


def source(shown: griffe.Object, first: int, last: int) -> str:
    """Lines of the file that the object stands in, without their common indentation."""
    assert isinstance(shown.filepath, Path)
    lines = shown.filepath.read_text().splitlines()[first - 1 : last]
    return inspect.cleandoc("\n" + "\n".join(lines))


def fields_of(shown: griffe.Class, node: ast.ClassDef) -> str:
    """The class's first line and its public fields, or the arguments of its constructor."""
    init = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    if init is not None:
        return source(shown, init.lineno, body_of(init).lineno - 1).replace("def __init__", f"def {node.name}", 1)
    lines = [source(shown, node.lineno, node.lineno)]
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and not ast.unparse(each.target).startswith("_"):
            end = each.end_lineno or each.lineno
            lines += [f"    {line}" for line in source(shown, each.lineno, end).splitlines()]
    return "\n".join(lines)
