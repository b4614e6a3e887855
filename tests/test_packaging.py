"""What is installed and published, what an import loads, who imports whom, and torchvision's operators."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

import ses_fast

ROOT = Path(__file__).parent.parent
HEAVY = ("triton", "diffsynth", "diffusers", "transformers", "matplotlib", "pywt")

# Who imports whom, no more and no less (each may also import `errors` and its own package). `loop` receives callables:
# no pipeline or reward.
IMPORTS = {
    "__init__": {"batch", "distributed", "embedded", "loop", "ops", "pipelines", "result", "rewards"},
    "__main__": {"cli"},
    "answers": {"methods", "pipelines", "rewards", "studio"},
    "batch": {"checks", "digests", "distributed", "files", "folder", "page", "pipelines", "prompts", "result"},
    "calibrate": {
        *("evolution", "files", "ops", "pipelines", "result"),
        *("scores", "statistics", "studio", "tables"),
    },
    "checks": {"reference"},
    "cli": {
        *("batch", "commands", "distributed", "folder", "generate", "job", "models", "ops", "page"),
        *("prompts", "rewards", "versions"),
    },
    "commands": {
        *("calibrate", "compare", "embedded", "job", "methods", "models"),
        *("pipelines", "prompts", "report", "rewards", "studio", "tables"),
    },
    "compare": {"answers", "files", "methods", "pipelines", "report", "rewards", "studio", "summary", "tables"},
    "cpu": set(),
    "custom_op": set(),
    "digests": set(),
    "distributed": {"checks"},
    "embedded": {"_torchvision", "checks", "rewards"},
    "evolution": {"checks", "ops", "reference", "spectral", "state", "strategies"},
    "fast_torch": {"custom_op", "reference"},
    "files": set(),
    "generate": {"embedded", "files", "job", "models", "pipelines", "report", "versions"},
    "folder": {"checks", "files", "prompts", "result"},
    "job": {"embedded", "files", "models", "pipelines", "rewards"},
    "kernels": {"custom_op", "reference"},
    "loop": {
        *("checks", "cpu", "digests", "distributed", "evolution", "objective"),
        *("recorder", "result", "state", "stopwatch"),
    },
    "methods": {"pipelines", "strategies"},
    "models": {"_torchvision", "embedded", "pipelines"},
    "objective": {"checks", "distributed", "scores"},
    "ops": {"checks", "fast_torch", "kernels", "reference"},
    "page": {"folder"},
    "pipelines": {
        *("_torchvision", "checks", "cpu", "digests", "distributed", "files", "loop", "objective", "ops"),
        *("evolution", "result", "rewards", "scores", "spectral", "state", "stopwatch"),
    },
    "prompts": {"files"},
    "recorder": {"distributed", "evolution", "objective", "result", "state", "stopwatch"},
    "reference": set(),
    "report": set(),
    "result": {"evolution", "files", "state"},
    "rewards": {"_torchvision", "checks", "cpu", "ops", "scores"},
    "scores": set(),
    "spectral": {"checks", "ops", "reference"},
    "state": {"checks", "spectral", "strategies"},
    "strategies": {"ops", "spectral"},
    "statistics": set(),
    "stopwatch": set(),
    "studio": {"pipelines", "result", "rewards", "scores", "stopwatch"},
    "summary": {"methods", "statistics"},
    "tables": {"methods", "summary"},
    "versions": set(),
    "_torchvision": set(),
    "errors": set(),
}
# The same inside the room with most guests: a library's adapter stands on top, settings and renderer lowest.
IN_PIPELINES = {
    "__init__": {"config"},
    "batching": {"renderer"},
    "compiling": set(),
    "config": set(),
    "diffsynth": {"compiling", "config", "enabled", "renderer", "request", "run"},
    "diffusers": {"compiling", "config", "enabled", "renderer", "request", "run"},
    "enabled": {"compiling", "request"},
    "previews": {"batching", "race", "renderer", "scoring"},
    "race": {"config"},
    "refining": {"previews"},
    "renderer": set(),
    "request": {"config"},
    "run": {
        *("batching", "compiling", "config", "previews", "race"),
        *("refining", "renderer", "request", "scoring", "sharing"),
    },
    "scoring": set(),
    "sharing": {"renderer", "request"},
}
MOST_LINES = 450  # of a file under ses_fast/
LONG = {"reference.py", "embedded/train.py"}
ONLY_IN = {"matplotlib": {"report"}, "triton": {"kernels"}, "jinja2": {"page"}, "filelock": {"folder"}}


def run(code: str) -> str:
    """The standard output of `code` in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources() -> dict[Path, str]:
    """Each source file, and the module (or package) of ses_fast that it belongs to."""
    ours = {
        path: path.relative_to(ROOT / "ses_fast").parts[0].removesuffix(".py")
        for path in (ROOT / "ses_fast").rglob("*.py")
    }
    return ours | {path: "kernels" for path in (ROOT / "kernels").rglob("*.py")}


def imports(path: Path) -> set[tuple[str, ...]]:
    """The dotted names that a file imports, wherever in it; relative ones made absolute."""
    inside = path.relative_to(ROOT).parts[:-1]
    package = ("ses_fast", *inside) if inside[0] == "kernels" else inside
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(name.name.split(".")) for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            start += tuple(node.module.split(".")) if node.module else ()
            found |= {(*start, name.name) for name in node.names}
    return found


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_go_one_way(module):
    names = set().union(*(imports(path) for path, owner in sources().items() if owner == module))
    internal = {name[1] for name in names if name[0] == "ses_fast" and len(name) > 1}
    assert internal - {module, "errors", "__version__"} == IMPORTS[module]
    assert not any(name[0] == "kernels" for name in names), "the kernels are only ever ses_fast.kernels"
    for package, modules in ONLY_IN.items():
        assert module in modules or not any(name[0] == package for name in names), f"{module} imports {package}"


@pytest.mark.parametrize("module", IN_PIPELINES)
def test_imports_go_one_way_inside_the_pipelines_room(module):
    room = ROOT / "ses_fast" / "pipelines"
    files = [path for path in sources() if room in path.parents]
    assert {path.relative_to(room).parts[0].removesuffix(".py") for path in files} == set(IN_PIPELINES)
    mine = [path for path in files if path.relative_to(room).parts[0].removesuffix(".py") == module]
    names = set().union(*map(imports, mine))
    inside = {name[2] for name in names if name[:2] == ("ses_fast", "pipelines") and len(name) > 2}
    assert inside - {module} == IN_PIPELINES[module]


def test_no_file_is_too_long_to_have_one_reason_to_change():
    lines = {str(path.relative_to(ROOT / "ses_fast")): text_lines(path) for path in (ROOT / "ses_fast").rglob("*.py")}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES and name not in LONG}


def text_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_every_module_has_its_place():
    assert set(sources().values()) == set(IMPORTS)


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
        *("examples/README.md", "ses_fast/embedded/README.md"),
    ],
)
def test_the_docs_point_at_what_is_there(name):
    path = ROOT / name
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]
    marks = re.findall(r"<!-- (.+?) -->", path.read_text())
    assert not [mark for mark in marks if not re.fullmatch(r"/?bench(:\w+)?", mark)], "a placeholder was left"


def test_a_missing_package_names_an_extra_that_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        part.value
        for path in sources()
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "missing_extra"
        for part in ast.walk(call.args[1])
        if isinstance(part, ast.Constant)
    }
    assert named and named <= set(extras)


def test_the_reference_imports_torch_alone():
    names = {name[0] for name in imports(ROOT / "ses_fast" / "reference.py")}
    assert names - set(sys.stdlib_module_names) == {"torch"}


def test_kernels_init_imports_nothing():
    assert imports(ROOT / "kernels" / "__init__.py") == set()


def test_the_import_loads_nothing():
    loaded = json.loads(run("import sys, json, ses_fast; print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", *HEAVY} & set(loaded)
    assert not [name for name in loaded if name.startswith("ses_fast.")]


def test_the_public_names_load_no_optional_package():
    code = f"""
import sys, ses_fast
for name in ses_fast.__all__:
    getattr(ses_fast, name)
ses_fast.SESConfig()
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run(code).strip() == "[]"


def test_public_names():
    assert set(ses_fast.__all__) <= set(dir(ses_fast))
    assert ses_fast.search.__module__ == ses_fast.evolve.__module__ == "ses_fast.loop"
    assert ses_fast.ops.sample_population.__module__ == "ses_fast.ops"
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = ses_fast.serach


def test_the_kernels_are_importable_where_they_stand():
    import ses_fast.kernels

    assert Path(ses_fast.kernels.__file__) == ROOT / "kernels" / "__init__.py"
    assert ses_fast.kernels.__version__ == "0.0.0"


SOURCES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "SECURITY.md",
)


def copied_tree(target: Path) -> Path:
    """What is packed, in `target`, so that a build leaves nothing beside the sources."""
    for name in ("ses_fast", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built offline."""
    copy = copied_tree(tmp_path_factory.mktemp("source"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", target, copy], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {file.filename: file.file_size for file in archive.infolist()}
    names = {name for name in sizes if ".dist-info/" not in name}
    assert sum(size for name, size in sizes.items() if "/weights/" in name) <= 25e6
    weights = [path for path in (ROOT / "ses_fast" / "embedded" / "weights").rglob("*") if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in [*sources(), *weights]}
    expected |= {"ses_fast/page.html", "ses_fast/py.typed", "ses_fast/embedded/README.md"}
    assert names == {f"ses_fast/{name}" if name.startswith("kernels/") else name for name in expected}


def test_the_wheel_declares_its_dependencies_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        read = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(read["METADATA"]).decode()
        commands = archive.read(read["entry_points.txt"]).decode()
        assert any(name.endswith("LICENSE") for name in read)
    required = [line.split()[1] for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(core) == 2 and required[0].startswith("torch>") and required[1].startswith("tqdm>")
    assert f"Version: {ses_fast.__version__}\n" in metadata
    assert "ses-fast = ses_fast.cli:main" in commands


def test_the_wheel_imports_where_it_is_unpacked(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import ses_fast.kernels, ses_fast.reference
print(ses_fast.kernels.__file__, ses_fast.reference.__file__, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    files = [tmp_path / "ses_fast" / "kernels" / "__init__.py", tmp_path / "ses_fast" / "reference.py"]
    assert done.stdout.split() == list(map(str, files)), done.stderr


def in_place_of(command: list, **options) -> str:
    """The output of a command that must not fail. PIP_ARGS (of `make`) says where pip finds another build of torch."""
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.mark.slow
def test_a_release_is_built_installed_and_run(wheel, tmp_path):
    """As it is published: an sdist, the wheel made of it, an environment with nothing else, and the command there."""
    tree, dist = copied_tree(tmp_path / "tree"), tmp_path / "dist"
    in_place_of([sys.executable, "-m", "build", tree, "--outdir", dist])
    (sdist,), (built,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert {Path(name) for name in SOURCES} <= packed
    assert not {path.parts[0] for path in packed if path.parts} & {"tests", "bench"}
    with zipfile.ZipFile(built) as one, zipfile.ZipFile(wheel) as other:
        assert set(one.namelist()) == set(other.namelist())

    venv.create(tmp_path / "empty", with_pip=True)
    python, extra = tmp_path / "empty" / "bin" / "python", os.environ.get("PIP_ARGS", "").split()
    constraints = ROOT / "constraints.txt"
    in_place_of([python, "-m", "pip", "install", "--no-compile", f"{built}[embedded,plots]", "-c", constraints, *extra])
    where = in_place_of([python, "-c", "import ses_fast; print(ses_fast.__file__)"], cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "empty")
    prompt = "two red squares left of three blue rings"
    options = ["--budget", "3", "--steps", "2", "--height", "128", "--width", "128", "--seed", "1", "--out", "out"]
    in_place_of([python.parent / "ses-fast", "generate", prompt, *options], cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["evaluations"] == 3
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in ("image.png", "base.png", "budgets.png"))


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (ses_fast.__version__, project["license"])
    assert citation["preferred-citation"]["url"] == project["urls"]["Paper"]
    assert project["urls"]["Paper"].removeprefix("https://") in (ROOT / "README.md").read_text()


def test_no_link_of_the_metadata_names_a_machine():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {urlsplit(url).hostname for url in project["urls"].values()} <= {"arxiv.org", "github.com"}
    assert "email" not in str(project["authors"])


def test_the_workflow_runs_every_python_that_is_allowed_and_the_lowest_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()
    allowed = [f"3.{minor}" for minor in range(int(low), int(high))]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    matrix = jobs["versions"]["strategy"]["matrix"]
    assert named == allowed == jobs["test"]["strategy"]["matrix"]["python"] == matrix["python"]
    (torch,) = [line for line in project["dependencies"] if line.startswith("torch")]
    assert f"torch>={matrix['torch'][0]}" == torch and matrix["torch"][-1] == "newest"


# What holds before the call, and whether it then declares the schemas.
DECLARED = {
    "imported already": ("sys.modules['torchvision'] = types.ModuleType('torchvision')", False),
    "not installed": ("importlib.util.find_spec = lambda name: None", False),
    "declared by someone else": ("declare()", False),
    "compiled part loads": ("torch.ops.load_library = lambda path: declare()", False),
    "compiled part does not load": ("torch.ops.load_library = fail", True),
    "declared already": ("torch.ops.load_library = fail; declare_torchvision_ops()", True),
}


def test_declare_torchvision_ops():
    # Each case in a process of its own: what is declared stays so. Forked, to import torch once.
    code = f"""
import importlib.util, os, sys, types, torch
from ses_fast import _torchvision
from ses_fast._torchvision import declare_torchvision_ops

def declare():
    global other
    other = torch.library.Library("torchvision", "DEF")
    other.define("nms(Tensor x) -> Tensor")

def fail(path):
    raise OSError("a library is missing")

for case, (before, _) in {DECLARED}.items():
    if not os.fork():
        exec(before)
        declare_torchvision_ops()
        print(case, _torchvision._library is not None, sep=":", flush=True)
        os._exit(0)
    os.wait()
"""
    assert run(code).splitlines() == [f"{case}:{declares}" for case, (_, declares) in DECLARED.items()]


def test_it_makes_torchvision_importable_here():
    code = "from ses_fast._torchvision import declare_torchvision_ops; declare_torchvision_ops(); import torchvision"
    assert run(code + ", torch; print(torch.ops.torchvision.nms)").strip() == "torchvision.nms"
