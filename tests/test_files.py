"""What the disk is told, and in which order: a name is as lasting as the file."""

import errno
import os
from pathlib import Path

import pytest

from ses_fast.files import make_folder, sync_folder, write_whole
from ses_fast.folder import Folder, Result


@pytest.fixture
def told(monkeypatch, tmp_path):
    """(what was done, the file or folder within `tmp_path`), one after another."""
    steps, fsync, replace = [], os.fsync, Path.replace

    def synced(descriptor):
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)
        steps.append(("fsync", "temporary" if name.endswith(".part") else name))
        fsync(descriptor)

    def replaced(path, target):
        steps.append(("replace", os.path.relpath(target, tmp_path)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    return steps


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's /proc")


@needs_proc
def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(told, tmp_path):
    write_whole(tmp_path / "a", lambda path: path.write_text("whole"))
    assert told == [("fsync", "temporary"), ("replace", "a"), ("fsync", ".")]
    assert (tmp_path / "a").read_text() == "whole"


@needs_proc
def test_of_a_link_the_folder_of_its_file_is_synced(told, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    write_whole(tmp_path / "link", lambda path: path.touch())
    assert told[-1] == ("fsync", "far") and (tmp_path / "link").is_symlink()


@needs_proc
def test_each_new_folder_is_synced_through_the_one_that_it_lies_in(told, tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert told == [("fsync", "."), ("fsync", "a")]
    make_folder(tmp_path / "a" / "b")
    assert len(told) == 2


@needs_proc
def test_the_name_of_the_results_is_on_the_disk_before_the_first_line(told, tmp_path):
    with Folder(tmp_path, {}) as folder:
        told.clear()
        for id in "abc":
            folder.add(Result(id=id, prompt="x", status="failed", seed=0, error="no"))
    assert told == [("fsync", "."), *[("fsync", "results.jsonl")] * 3]  # the folder once


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


# Windows opens no folder (EACCES); some file systems sync none.
@pytest.mark.parametrize("name, number", [("open", errno.EACCES), ("fsync", errno.EINVAL), ("fsync", errno.ENOTSUP)])
def test_a_folder_that_cannot_be_synced_is_left_alone(name, number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, name, failing(number))
    sync_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_an_error(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(number))
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    with pytest.raises(OSError, match=os.strerror(number)):
        sync_folder(tmp_path)
    assert not before or set(os.listdir("/proc/self/fd")) == before  # it was closed


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "none")
