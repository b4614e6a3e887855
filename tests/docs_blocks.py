"""The code of the documentation, and how each block is run: as it is shown, with small models in place of large ones.

The Python blocks of a page run one after the other in one namespace, its commands between them in one folder. What a
command would take long for is given shorter: arguments that come later win.
"""

import importlib.util
import os
import re
import shlex
import string
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ses_fast import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ses_fast/embedded/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r'^( *)```(\w+)(?: title="([^"]+)")?\n(.*?)^ *```$', re.MULTILINE | re.DOTALL)
PROMPTS = "prompt\ntwo red squares left of three blue rings\none green cross above two yellow rings\n"

SHORTER = [  # what a block shows -> what is run
    (r"(ses_eval_budget|total_eval_budget)=\d+", r"\1=3"),
    (r"(ses_inference_steps)=\d+", r"\1=2"),
    (r"num_inference_steps=\d+", "num_inference_steps=2"),
    (r'"(num_inference_steps|ses_inference_steps)": \d+', r'"\1": 2'),
    (r'"ses_eval_budget": \d+', '"ses_eval_budget": 3'),
    (r'"(height|width)": 1024', r'"\1": 64'),
    (r"(height|width)=1024", r"\1=64"),
    (r"time_limit=\d+", "time_limit=1"),
    (r'\.to\("cuda"\)', ""),
]
SEARCH = ["--budget", "3", "--steps", "2", "--preview-steps", "2"]
SMALL = {
    "z-image-turbo": ["--height", "64", "--width", "64"],
    "diffsynth": ["--height", "64", "--width", "64"],
    "diffusers": ["--height", "32", "--width", "32"],
}
OPTIONS = {
    "generate": SEARCH,
    "batch": SEARCH,
    "compare": [
        *("--budgets", "2", "--steps", "1", "--methods", "reference,random"),
        *("--workers", "1", "--rounds", "1", "--seeds", "1"),
    ],
    "calibrate": ["--noises", "2", "--steps", "2"],
    "rewards": [],
    "doctor": [],
}


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    title: str | None  # the file that it shows
    code: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    for match in BLOCK.finditer(text):
        indent, language, title, code = match.groups()
        code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        found.append(Block(page, text[: match.start()].count("\n") + 1, language, title, code))
    return found


@dataclass
class Shell:
    """Runs the blocks of one page, in the working folder."""

    replaced: dict[str, str] = field(default_factory=dict)  # other texts -> what is run in their place
    names: dict[str, Any] = field(default_factory=dict)

    def run(self, block: Block) -> None:
        if block.title:
            Path(block.title).write_text(block.code)
        if block.language == "python":
            code = block.code
            for shown, run in SHORTER:
                code = re.sub(shown, run, code)
            for shown, run in self.replaced.items():
                code = code.replace(shown, run)
            # As many lines before it as on the page, so that an error names the page's line.
            exec(compile("\n" * block.line + code, block.where, "exec"), self.names)
        elif block.language == "bash":
            for words in commands(block.code):
                run_command(words)


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command, without comments; variables that are set before it, or in lines before, are put in."""
    known: dict[str, str] = {}
    for line in code.replace("\\\n", " ").splitlines():
        words = [string.Template(word).safe_substitute(known) for word in shlex.split(line, comments=True)]
        while words and (match := re.fullmatch(r"([A-Za-z_]+)=(.*)", words[0])):
            known[match[1]] = match[2]
            del words[0]
        if words:
            yield words


def run_command(words: list[str]) -> None:
    """Runs a command of ours; of others checks that what they name is there. Raises AssertionError for unknown ones."""
    first = Path(words[0]).name
    assert first in RUNNERS, f"no test knows how to run {' '.join(words)!r}: teach docs_blocks.RUNNERS"
    RUNNERS[first](words[1:])


def ses_fast(arguments: list[str]) -> None:
    command, *rest = arguments
    if command in ("compare", "calibrate") and not Path(rest[0]).exists():  # a number of captions, or all
        rest[0] = {"compare": "2", "calibrate": "1"}[command]
    model = rest[rest.index("--model") + 1].partition(":")[0] if "--model" in rest else "embedded"
    cli.main([command, *rest, *OPTIONS[command], *SMALL.get(model, [])])


def pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install", arguments
    for argument in arguments[1:]:
        if match := re.fullmatch(r"(?:\.|ses-fast)(?:\[(.+)\])?", argument):
            assert set((match[1] or "all").split(",")) <= set(extras), argument


def make(arguments: list[str]) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {each for each in arguments if "=" not in each} <= targets, arguments


def python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), arguments
    else:
        assert (ROOT / arguments[0]).is_file(), arguments


def torchrun(arguments: list[str]) -> None:
    """The module's command in this process alone: its own tests start several."""
    module = arguments.index("-m") + 1
    assert arguments[module] == "ses_fast", arguments
    ses_fast(arguments[module + 1 :])


def pytest(arguments: list[str]) -> None:
    paths = [each for each in arguments if each.startswith(("tests", "bench"))]
    assert all((ROOT / path).exists() for path in paths), arguments


def script(arguments: list[str]) -> None:
    assert os.access(ROOT / "bench" / "gpu.sh", os.X_OK)


RUNNERS: dict[str, Callable[[list[str]], None]] = {
    "ses-fast": ses_fast,
    "pip": pip,
    "make": make,
    "python": python,
    "torchrun": torchrun,
    "pytest": pytest,
    "gpu.sh": script,
    "git": lambda arguments: None,
    "cd": lambda arguments: None,
}
