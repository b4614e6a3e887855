"""README and site: every block runs, every table is what makes it, every link leads somewhere, and the site builds."""

import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import pytest
import tiny
import tiny_any
import tiny_diffusers
import torch
from docs_blocks import PAGES, PROMPTS, ROOT, Block, Shell, blocks, commands, run_command
from docs_tables import GUIDES, TABLES, renewed
from test_page import browser  # noqa: F401  a fixture
from test_vlm_reward import server  # noqa: F401  a fixture
from tiny import brightness

import ses_fast
from ses_fast import embedded, evolution, rewards
from ses_fast.pipelines.diffsynth.any import AnyImage

DOCS = ROOT / "docs"
# DiffSynth's classes that pages load, and what stands in for their published weights.
DIFFSYNTH = {
    "z_image.ZImagePipeline": tiny.tiny_z_image,
    "flux_image.FluxImagePipeline": tiny.tiny_flux,
    "flux2_image.Flux2ImagePipeline": lambda: tiny.tiny_flux2(klein=True),
    "qwen_image.QwenImagePipeline": tiny.tiny_qwen_image,
    "stable_diffusion_xl.StableDiffusionXLPipeline": lambda: tiny_any.make("stable_diffusion_xl"),
}
DIFFUSERS = {"StableDiffusionXLPipeline": "SDXL", "DiffusionPipeline": "SDXL", "FluxPipeline": "FLUX.1"}


def loaded(make, dtype=torch.bfloat16, device="cuda", model_configs=(), *words, **named):
    """In place of DiffSynth's from_pretrained, which is given the files of models and of tokenizers."""
    words = (*words, *named.values())
    from diffsynth.core.loader.config import ModelConfig

    assert dtype in (torch.float16, torch.bfloat16) and device == "cuda"
    assert all(isinstance(each, ModelConfig) and each.model_id for each in (*model_configs, *words))
    assert all(each.origin_file_pattern.endswith(".safetensors") for each in model_configs)
    assert all(each.origin_file_pattern.startswith("tokenizer") for each in words)
    return make()


@pytest.fixture
def small(monkeypatch, tmp_path, server):  # noqa: F811
    """Small models in place of published ones, in an empty folder with two files of prompts. Returns a Shell."""
    diffusers = pytest.importorskip("diffusers")
    for library in ("diffsynth", "diffusers"):  # a block without a budget would search with 50 previews of 10 steps
        documented = importlib.import_module(f"ses_fast.pipelines.{library}.call").SESPipeline.__call__
        few = {"ses_eval_budget": 3, "ses_inference_steps": 2}
        monkeypatch.setattr(documented, "__kwdefaults__", documented.__kwdefaults__ | few)
    for place, make in DIFFSYNTH.items():
        module, name = place.split(".")
        cls = getattr(importlib.import_module(f"diffsynth.pipelines.{module}"), name)
        stand_in = functools.partial(loaded, make)
        stand_in.__signature__ = inspect.signature(cls.from_pretrained)  # which the command asks for its tokenizers
        monkeypatch.setattr(cls, "from_pretrained", stand_in)
        call = inspect.unwrap(cls.__call__)  # whose default of 1024 pixels would take minutes
        defaults = inspect.signature(call).parameters.values()
        shorter = {"height": 64, "width": 64, "num_inference_steps": 2}
        values = tuple(shorter.get(each.name, each.default) for each in defaults if each.default is not each.empty)
        monkeypatch.setattr(call, "__defaults__", values)
    for name, kind in DIFFUSERS.items():
        monkeypatch.setattr(
            getattr(diffusers, name), "from_pretrained", lambda *_, kind=kind, **__: tiny_diffusers.make(kind).pipe
        )
    config = {"_class_name": "StableDiffusionXLPipeline"}  # what the command reads before any weights
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda source: config)
    monkeypatch.setattr("ses_fast.embedded.pipeline.SIZE", 128)
    stock = rewards.load_reward

    def load_reward(name, weights=None, device=None, dtype=None):
        if isinstance(name, Mapping) or weights is not None:
            return stock(name, weights, device, dtype)
        return brightness if rewards.known_name(name) else None

    monkeypatch.setattr(rewards, "load_reward", load_reward)
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.csv", "more.csv"):
        (tmp_path / name).write_text(PROMPTS)
    (tmp_path / "prompts.txt").write_text(PROMPTS.partition("\n")[2])
    return Shell({"http://localhost:8000/v1": server.url})


PAGES_WITH_CODE = [page for page in PAGES if any(b.language in ("python", "bash") for b in blocks(page))]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_page_runs(page, small):
    for block in blocks(page):
        try:
            small.run(block)
        except SystemExit as error:
            pytest.fail(f"{block.where}: the command ended with code {error.code}")
        except Exception as error:
            error.add_note(block.where)
            raise


def test_a_block_that_is_wrong_fails(small):
    page = ROOT / "README.md"
    with pytest.raises(ZeroDivisionError):
        small.run(Block(page, 1, "python", None, "1 / 0"))
    with pytest.raises(AssertionError, match="no test knows"):
        run_command(["rm", "-r", "out"])
    for command in ("make dema", 'pip install ".[diffsinth]"', "python -m bench.nothing", "pytest tests/none.py"):
        with pytest.raises(AssertionError):
            run_command(next(commands(command)))
    for launcher in ("ses-fast", "torchrun --nproc-per-node=2 -m ses_fast"):
        with pytest.raises(SystemExit):
            run_command([*launcher.split(), "generate", "a cat", "--bugdet", "3"])


def test_variables_of_a_block_are_put_in():
    code = """
    # a comment
    id=some/model
    files=$id:a,b
    GPU=1 ses-fast generate "a cat" --model x:$files \\
        --out ${id}/out  # another
    """
    assert list(commands(code)) == [
        ["ses-fast", "generate", "a cat", "--model", "x:some/model:a,b", "--out", "some/model/out"]
    ]


def test_json_on_a_page_is_json():
    for page in PAGES:
        for block in blocks(page):
            if block.language == "json":
                json.loads(block.code)


def test_the_demo_is_the_command_that_the_pages_name():
    shown = re.search(r"(ses-fast generate .* --out out/)", (ROOT / "Makefile").read_text())[1]
    assert shown in (DOCS / "start.md").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("guide", TABLES)
def test_a_guide_has_a_row_for_every_class(guide):
    assert renewed(guide) == (GUIDES / guide).read_text(), "run `make readme-tables`"


def rows_of(page: Path, first: str) -> dict[str, list[str]]:
    """The rows of the table with this first column, by their first cell."""
    lines = page.read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = {}
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[name.strip("` ")] = [cell.strip("` ") for cell in cells]
    return rows


@pytest.mark.parametrize("settings", [ses_fast.SESConfig, ses_fast.Preview])
def test_every_setting_stands_in_its_table(settings):
    shown = rows_of(DOCS / "reference" / "settings.md", f"`ses_fast.{settings.__name__}`")
    fields = {each.name: each.default for each in dataclasses.fields(settings)}
    assert list(shown) == list(fields)
    for name, default in fields.items():
        value = f"{type(default).__name__}()" if dataclasses.is_dataclass(default) else str(default)
        assert shown[name][0].strip('"') == value, name


def test_every_reward_stands_in_its_table():
    shown = rows_of(GUIDES / "rewards.md", "name")
    names = {name for cell in shown for name in re.findall(r"[\w.]+", cell)}
    assert set(rewards.REWARDS) <= names


PUBLIC = [
    *(f"ses_fast.{name}" for name in ses_fast.__all__ if name not in ("batch", "embedded", "ops")),
    *(f"ses_fast.embedded.{name}" for name in embedded.__all__),
    *(f"ses_fast.evolution.{name}" for name in evolution.__all__),
    *(f"ses_fast.rewards.{name}" for name in rewards.__all__),
    *("ses_fast.batch.run", "ses_fast.SearchResult.save", "ses_fast.SearchResult.load"),
    *(
        f"ses_fast.ops.{name}"
        for name in ("haar_dwt2", "haar_idwt2", "split_low_band", "merge_low_band", "sample_population")
    ),
    *("ses_fast.ops.update_elites", "ses_fast.ops.resize_normalize", "ses_fast.ops.set_backend"),
]


def test_the_reference_has_every_public_name(site):
    """With its docstring's first words, and an error where one is said to be raised."""
    shown = {path.stem: path.read_text() for path in (DOCS / "reference").glob("*.md")}
    places = {name: page for page, text in shown.items() for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    found = {resolved(place): page for place, page in places.items()}
    for name in PUBLIC:
        thing = resolved(name)
        assert thing in found, f"no page of docs/reference has {name}"
        html = (site / "reference" / found[thing] / "index.html").read_text()
        text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html))
        words = re.findall(r"\w+", inspect.getdoc(thing).split("\n")[0])[:4]
        assert re.search(r"\W+".join(words), text), f"{name} has no docstring on its page"


def resolved(path: str):
    """The object of a dotted path."""
    parts = path.split(".")
    thing = importlib.import_module(parts[0])
    for part in parts[1:]:
        thing = getattr(thing, part) if hasattr(thing, part) else importlib.import_module(f"{thing.__name__}.{part}")
    return thing


# ---------------------------------------------------------------- drawings, links, the site


def test_the_drawings_are_what_their_script_draws(tmp_path):
    """In a process of its own: other tests may have changed matplotlib's settings."""
    subprocess.run([sys.executable, "docs/drawings.py", str(tmp_path)], cwd=ROOT, check=True)
    drawn = sorted(tmp_path.iterdir())
    assert {path.name for path in drawn} == {path.name for path in (DOCS / "how").glob("*.svg")}
    for path in drawn:
        shown = (DOCS / "how" / path.name).read_text()
        if f"Matplotlib v{matplotlib.__version__}" in shown:  # another one places text and lines otherwise
            assert path.read_text() == shown, "run `make drawings`"
        else:
            words = r">([^<>]+)</text>"
            assert sorted(re.findall(words, path.read_text())) == sorted(re.findall(words, shown))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]
    assert not warnings, done.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    """mkdocs checks the links between pages, and their anchors."""
    pages = list(site.rglob("index.html"))
    assert len(pages) > 30 and (site / "results" / "files").is_dir()
    for page in pages:
        text = page.read_text()
        assert "<!-- bench" not in re.sub(r"<!-- /?bench(:\w+)? -->", "", text)
        assert not re.findall(r'(?:src|href)="https?://(?:fonts|cdn|unpkg)', text), page  # it asks no other server


# As the title: how far a page is wider than its window, and how many pictures did not load.
SEEN = """<script>addEventListener("load", () => {
const broken = [...document.images].filter(image => !image.naturalWidth).length;
document.title = [document.documentElement.scrollWidth - innerWidth, broken, innerWidth];
})</script></body>"""


@pytest.mark.parametrize("width", [1400, 500])
def test_a_browser_shows_pages_whole(browser, site, width):  # noqa: F811
    """The start page, a guide with wide tables, and one of results: nothing but a table or code is scrolled."""
    for page in ("start", "guides/diffsynth", "results/speed"):
        seen = site / page / "seen.html"
        seen.write_text((site / page / "index.html").read_text().replace("</body>", SEEN))
        command = [*browser, f"--window-size={width},900", "--dump-dom", seen.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert re.search(r"<title>([^<]*)</title>", done.stdout)[1] == f"0,0,{width}", f"{page}: {done.stderr}"
        seen.unlink()


def test_docstrings_become_lists():
    sys.path.insert(0, str(DOCS))
    try:
        from docstrings import as_markdown
    finally:
        sys.path.remove(str(DOCS))
    text = """Does it.

    a, b: numbers,
        of one kind: small
    c: another, that
    goes on
    Raises ValueError: for others.

        code: stays
    """
    assert as_markdown(text) == (
        "Does it.\n\n- `a, b`: numbers,\n    of one kind: small\n- `c`: another, that\ngoes on\n\n"
        "Raises ValueError: for others.\n\n    code: stays"
    )


def test_no_placeholder_is_left():
    for page in DOCS.rglob("*.md"):
        marks = re.findall(r"<!-- (.+?) -->", page.read_text())
        assert not [mark for mark in marks if not re.fullmatch(r"/?bench(:\w+)?", mark)], page


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ses_fast/embedded/README.md"])
def test_links_out_of_the_repositorys_own_files(name):
    """Files that are there, and headings in them."""
    page = ROOT / name
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_published_links():
    sys.path.insert(0, str(DOCS))
    try:
        from published import published, rewritten
    finally:
        sys.path.remove(str(DOCS))
    there = Path(next(name for name in published() if name.endswith("-bench.md"))).name
    for link, source, uri, expected in (
        ("(../../bench/results/x.md)", "docs/results/a.md", "results/a.md", "(../../bench/results/x.md)"),  # not there
        (f"(../../bench/results/{there})", "docs/results/a.md", "results/a.md", f"(files/{there})"),
        ("(../../CONTRIBUTING.md#a)", "docs/how/a.md", "how/a.md", "(../contributors/contributing.md#a)"),
        ("(../../docs/embedded.png)", "ses_fast/embedded/README.md", "how/embedded.md", "(../embedded.png)"),
        ("(docs/start.md)", "CONTRIBUTING.md", "contributors/contributing.md", "(../start.md)"),
        ("(other.md)", "docs/how/a.md", "how/a.md", "(other.md)"),
        ("(https://x.org/a.md)", "docs/how/a.md", "how/a.md", "(https://x.org/a.md)"),
    ):
        assert rewritten(f"[x]{link}", source, uri) == f"[x]{expected}"


def test_stand_ins_are_of_the_classes_that_pages_show():
    """So that a page's family is the family that its test runs."""
    for place, make in DIFFSYNTH.items():
        name = place.split(".")[1]
        assert type(make()).__name__ == name
        assert (importlib.import_module("ses_fast.pipelines.diffsynth").family_of(make()) is AnyImage) == (
            name == "StableDiffusionXLPipeline"
        )
