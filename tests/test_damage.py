"""What a disk does to a run, and what a hand or a cut does to its files: a clear error or a right result, row by row.

tests/test_batch.py has the kills, each write that fails, and each edit of one field of results.jsonl.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_batch import ToyPipeline, redness

import ses_fast
from ses_fast import cli, files, folder, job, models, pipelines
from ses_fast.evolution import SearchState, ask

PROMPTS = ["a red fox", "two grey cats in the snow", "a castle on a hill above the sea"]


class Stop(BaseException):
    """As Ctrl-C."""


def ses_fast_batch(out: Path, *options: Any, stop_after: int | None = None) -> int:
    """The exit code of `ses-fast batch` on the three prompts; stop_after: the number of scores that Ctrl-C follows."""
    count = 0

    def reward(images: Any, prompt: str) -> Any:
        nonlocal count
        count += 1
        if stop_after is not None and count > stop_after:
            raise Stop
        return redness(images, prompt)

    reward.__module__, reward.__qualname__ = redness.__module__, redness.__qualname__  # a state knows it by its name
    small = ("--budget", 10, "--popsize", 4, "--elites", 2, "--batch-size", 1)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the search that was kept")
        patch.setitem(models.MODELS, "embedded", ToyPipeline)
        patch.setattr(job, "load_reward", lambda name, weights: reward)
        patch.setattr(pipelines, "enable", lambda pipe: pipe)
        try:
            cli.main(
                ["batch", str(out.parent / "prompts.txt"), "--out", str(out), *map(str, small), *map(str, options)]
            )
        except SystemExit as left:
            return int(left.code or 0)
        except Stop:
            return 130
    return 0


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "images").iterdir()}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the prompts, `whole` (a batch that nothing interrupted) and `half` (one stopped in its second)."""
    room = tmp_path_factory.mktemp("room")
    (room / "prompts.txt").write_text("\n".join(PROMPTS))
    assert ses_fast_batch(room / "whole") == 0
    assert ses_fast_batch(room / "half", stop_after=15) == 130
    assert len(list((room / "half" / "searches").iterdir())) == 1
    return room


# ---------------------------------------------------------------- ways to do damage


@contextmanager
def small_files(out: Path) -> Iterator[None]:
    """No file may grow beyond 600 bytes, by the kernel's own limit: what a full disk does, wherever tests run."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def mounted(spoil: Callable[[Path], Any], mend: str) -> Callable[[Path], Any]:
    """`out` on a small disk of its own, spoilt, then mounted again with other options."""

    @contextmanager
    def disk(out: Path) -> Iterator[None]:
        before = out.with_name("before")
        out.rename(before)
        out.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", out]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small disk")
        try:
            shutil.copytree(before, out, dirs_exist_ok=True)
            spoil(out)
            yield
            remount(out, mend)
            shutil.copytree(out, before, dirs_exist_ok=True)
        finally:
            subprocess.run(["umount", out], check=True)
            out.rmdir()
            before.rename(out)

    return disk


def remount(out: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", out], check=True)


def fill(out: Path) -> None:
    """Leaves 12 kB: a state and a picture have room, and a second of each has none."""
    disk = os.statvfs(out)
    (out / "others").write_bytes(b"\0" * (disk.f_bavail * disk.f_frsize - 12 * 1024))


def refusing(path: str, error: int) -> Callable[[Path], Any]:
    """Temporary files cannot be made in this part of the folder."""

    @contextmanager
    def refuse(out: Path) -> Iterator[None]:
        make = files.tempfile.mkstemp

        def refused(*args: Any, dir: Path, **kwargs: Any) -> Any:
            if Path(dir) == Path(os.path.realpath(out / path)):
                raise OSError(error, os.strerror(error), str(dir))
            return make(*args, dir=dir, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files.tempfile, "mkstemp", refused)
            yield

    return refuse


def edited(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """A file is other than the run left it."""

    @contextmanager
    def edit(out: Path) -> Iterator[None]:
        path = next(out.glob(pattern))
        before = path.read_bytes()
        assert change(before) != before
        path.write_bytes(change(before))
        yield
        path.write_bytes(before)

    return edit


def line_2(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Another line is appended to results.jsonl: the first one, changed."""

    def append(data: bytes) -> bytes:
        value = json.loads(data.splitlines()[0])
        change(value)
        return data + json.dumps(value).encode() + b"\n"

    return append


def many_rows(out: Path) -> Any:
    """results.jsonl holds 10,000 prompts more, of an earlier file."""

    def append(data: bytes) -> bytes:
        value = json.loads(data.splitlines()[0])
        rows = []
        for number in range(10_000):
            stem = folder.file_stem(str(number), value["prompt"])
            names = {"image": f"images/{stem}.png", "base_image": f"images/{stem}.base.png"}
            rows.append(json.dumps(value | names | {"id": str(number)}))
        return data + "\n".join(rows).encode() + b"\n"

    return edited("results.jsonl", append)(out)


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    damage: Callable[[Path], Any]  # a context: the damage is done inside, and mended after it
    code: int  # what the same command then exits with: 0 all is right, 1 it goes on later, 2 refused before any work
    says: str = ""  # the one line on standard error


FULL, DENIED = errno.ENOSPC, errno.EACCES
STATE, RECORD = "searches/*.safetensors", "results.jsonl"
TABLE = {
    "the disk is full (a limit on files)": Row(small_files, 1, r"cannot write .*: .*File too large"),
    "the disk is full (one of 256 kB)": Row(mounted(fill, "size=4m"), 1, "cannot write .*: .*No space left on device"),
    "the disk is full for states": Row(refusing("searches", FULL), 1, "cannot write .*searches.*No space left"),
    "the disk is full for pictures": Row(refusing("images", FULL), 1, "cannot write .*images.*No space left"),
    "the folder is on a read-only disk": Row(
        mounted(lambda out: remount(out, "ro"), "rw"), 2, "cannot write to the folder .*: Read-only"
    ),
    "the pictures' folder is not writable": Row(refusing("images", DENIED), 1, "cannot write .*: Permission denied"),
    "the states' folder is not writable": Row(refusing("searches", DENIED), 1, "cannot write .*: Permission denied"),
    "a state file is cut after 700 bytes": Row(edited(STATE, lambda data: data[:700]), 0),
    "a state file is cut by one byte": Row(edited(STATE, lambda data: data[:-1]), 0),
    "a state file is empty": Row(edited(STATE, lambda data: b""), 0),
    "a state file is of another version": Row(
        edited(STATE, lambda data: re.sub(rb'\\"format\\": \d', rb'\\"format\\": 9', data)), 0
    ),
    "a state file is a picture": Row(edited(STATE, lambda data: b"\x89PNG\r\n\x1a\n" + data), 0),
    "a state's scores are others": Row(edited(STATE, lambda data: data[:-8] + b"\x00" * 8), 0),
    "a result has another score": Row(
        edited(RECORD, line_2(lambda value: value.update(score=1e9))), 0
    ),  # a user may correct what is in the summary
    "a result has a word for a score": Row(
        edited(RECORD, line_2(lambda value: value.update(score="x"))), 2, "results.jsonl, line 2, .*its score is 'x'"
    ),
    "a result has a score that is no number": Row(
        edited(RECORD, line_2(lambda value: value.update(score=float("nan")))), 2, "line 2, .*its score is nan"
    ),
    "a result has another prompt": Row(
        edited(RECORD, line_2(lambda value: value.update(prompt="x"))), 2, "line 2, .*its images are not images/"
    ),
    "a result has another seed": Row(
        edited(RECORD, line_2(lambda value: value.update(seed=9))), 2, "is in .* already, with another prompt, seed"
    ),
    "a result lost its scores": Row(
        edited(RECORD, line_2(lambda value: value.pop("scores"))), 2, "line 2, .*it lacks scores"
    ),
    "a result has a picture elsewhere": Row(
        edited(RECORD, line_2(lambda value: value.update(image="../x.png"))), 2, "line 2, .*its images are not images/"
    ),
    "the results are cut in their last line": Row(edited(RECORD, lambda data: data[:-40]), 0),
    "the results are a spreadsheet": Row(
        edited(RECORD, lambda data: b"id;score\n1;2\n"), 2, "results.jsonl, line 1, is no result of a batch"
    ),
    "the results are not UTF-8": Row(
        edited(RECORD, lambda data: b"\xff\xfe\n" + data), 2, "results.jsonl, line 1, is no result of a batch"
    ),
    "the settings are edited": Row(
        edited("batch.json", lambda data: data.replace(b'"seed": 0', b'"seed": 1')), 2, "seed was 1, and now is 0"
    ),
    "10,000 more rows": Row(many_rows, 0),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_clear_error_or_a_right_result(name: str, room: Path, tmp_path: Path, capsys: Any) -> None:
    """And once the damage is mended, the same command ends as if nothing had happened."""
    row, out = TABLE[name], tmp_path / "out"
    shutil.copytree(room / "half", out)
    shutil.copy(room / "prompts.txt", tmp_path)
    with row.damage(out):
        capsys.readouterr()
        assert ses_fast_batch(out) == row.code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        if row.code:
            last = said.splitlines()[-1]
            assert re.search(row.says, last), last
            assert row.code == 1 or said.count("\n") == 1
        else:
            assert pictures(out) == pictures(room / "whole")
        assert not [path for path in out.rglob("*.part")]
    assert ses_fast_batch(out) == 0 and pictures(out) == pictures(room / "whole")
    assert {json.loads(line)["status"] for line in (out / "results.jsonl").read_text().splitlines()} == {"done"}


# ---------------------------------------------------------------- a saved result, damaged in any way


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "result.safetensors"
    base = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    ses_fast.evolve(base, lambda z: z.mean(), 7, 3, 2, dwt_level=1, seed=0, include_base=True, progress=False).save(
        path
    )
    return path.read_bytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def reread(data: bytes, path: Path) -> None:
    """It is refused by its name, or can be gone on with."""
    path.write_bytes(data)
    try:
        found = ses_fast.SearchResult.load(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert found.evaluations == len(found.trace) and found.latents is not None
    assert found.latents.shape == found.state.base.shape
    candidates, low = ask(found.state)
    assert candidates.isfinite().all() and low.shape == (found.state.config.popsize, len(found.state.mean))


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the rest."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


@pytest.mark.parametrize("effort", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_saved_result_with_other_bytes(effort: int, saved: bytes, tmp_path: Path) -> None:
    @settings(max_examples=effort)
    @given(at=st.integers(0, len(saved) - 1), new=st.binary(max_size=8), cut=st.booleans())
    def run(at: int, new: bytes, cut: bool) -> None:
        reread(saved[:at] + new + (b"" if cut else saved[at + len(new) :]), tmp_path / "result.safetensors")

    run()


@pytest.mark.parametrize("effort", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_saved_result_with_other_facts(effort: int, saved: bytes, tmp_path: Path) -> None:
    header, rest = parts(saved)
    facts = json.loads(header["__metadata__"]["ses_fast"])
    places = [(name,) for name in facts] + [("state", name) for name in facts["state"]]

    @settings(max_examples=effort)
    @given(place=st.sampled_from(places), value=JSON, remove=st.booleans())
    def run(place: tuple[str, ...], value: Any, remove: bool) -> None:
        changed = json.loads(json.dumps(facts))
        inner = changed if len(place) == 1 else changed[place[0]]
        inner.pop(place[-1])
        if not remove:
            inner[place[-1]] = value
        given = header | {"__metadata__": {"ses_fast": json.dumps(changed)}}
        reread(joined(given, rest), tmp_path / "result.safetensors")

    run()


@pytest.mark.parametrize("effort", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_state_with_other_entries(effort: int, saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    path.write_bytes(saved)
    good = ses_fast.SearchResult.load(path).state.state_dict()
    tensors = [
        torch.tensor(1),
        torch.zeros(0),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(7, device="meta"),
        torch.ones(7),
    ]

    @settings(max_examples=effort)
    @given(st.sampled_from(sorted(good)), JSON | st.sampled_from(tensors) | st.sampled_from(sorted(good)).map(good.get))
    def run(name: str, value: Any) -> None:
        try:
            state = SearchState.load_state_dict(good | {name: value})
        except ValueError as error:
            assert re.search(name.removesuffix("_name").replace("_", ".?") + "|state", str(error)), error
        else:
            candidates, _ = ask(state)
            assert candidates.shape == (state.config.popsize, *state.base.shape[1:])

    run()


@settings(max_examples=100)
@given(data=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_settings_file_of_any_bytes(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "ses.json"
    path.write_bytes(data)
    try:
        assert ses_fast.SESConfig.from_file(path) == ses_fast.SESConfig()
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


@settings(max_examples=150)
@given(name=st.sampled_from([*ses_fast.SESConfig().settings()]), value=JSON)
def test_a_settings_file_with_any_value(name: str, value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "ses.json"
    path.write_text(json.dumps({name: value}))
    try:
        assert isinstance(ses_fast.SESConfig.from_file(path), ses_fast.SESConfig)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
