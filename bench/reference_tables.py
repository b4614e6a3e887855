"""Tables of the site that the code itself gives: docstrings of strategies and kernels, options of the command."""

import argparse
import ast
import inspect
import re
from collections.abc import Mapping
from pathlib import Path

from bench.table import lines_of
from ses_fast import cli
from ses_fast import strategies as of_ses_fast
from ses_fast.strategies import Strategy

BANDS = {"lowest": "the lowest band", "high": "as many high numbers", "whole": "the whole noise"}


def known_strategies() -> Mapping[str, Strategy]:
    return of_ses_fast.STRATEGIES


def strategies(known: Mapping[str, Strategy]) -> str:
    """A line a strategy: its name, what it searches, its function's docstring."""
    rows = [
        [f"`{name}`", BANDS[strategy.moves], _named(inspect.getdoc(strategy.draw) or "", known)]
        for name, strategy in known.items()
    ]
    return "\n".join(lines_of(("`strategy=`", "searches", "how the next generation is drawn"), rows)) + "\n"


def _named(text: str, known: Mapping[str, Strategy]) -> str:
    """One line of it, with arXiv's numbers as links."""
    line = " ".join(text.split()).replace("|m|", "‖m‖")  # a bar would end the cell
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", line)


def parsers() -> Mapping[str, argparse.ArgumentParser]:
    """The parser of each command."""
    action = next(each for each in cli._parser()._actions if isinstance(each, argparse._SubParsersAction))
    return {name: parser for name, parser in action.choices.items()}


def commands(of: Mapping[str, argparse.ArgumentParser]) -> str:
    """A table of arguments for each command."""
    parts = []
    for name, parser in of.items():
        parts.append(f"## ses-fast {name}")
        rows = []
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            option = ", ".join(f"`{each}`" for each in action.option_strings) or f"`{action.dest}`"
            default = (
                ""
                if action.default is None or action.default is False or not action.option_strings
                else f"`{action.default}`"
            )
            rows.append([option, default, _sentence(action.help or "")])
        parts.append("\n".join(lines_of(("argument", "default", "meaning"), rows)) if rows else "No arguments.")
    return "\n\n".join(parts) + "\n"


def _sentence(text: str) -> str:
    return text.replace("|", "\\|")


def kernel_files() -> Mapping[str, str]:
    """Each file of kernels/ that says what it moves -> its docstring. Read, not imported: that needs Triton."""
    paths = sorted((Path(__file__).parents[1] / "kernels").glob("*.py"))
    texts = {path.name: ast.get_docstring(ast.parse(path.read_text())) or "" for path in paths}
    return {name: text for name, text in texts.items() if "Bytes: " in text}


def kernels(of: Mapping[str, str]) -> str:
    """A line a file: its first sentence, and its bytes."""
    rows = []
    for name, text in of.items():
        about, bytes_ = " ".join(text.split()).split("Bytes: ")
        rows.append([f"`{name}`", about.split(": ")[0].split(". ")[0].rstrip(".") + ".", bytes_])
    return "\n".join(lines_of(("file", "what it does", "bytes read and written"), rows)) + "\n"
