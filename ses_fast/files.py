"""Files that appear whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Of a folder that no file can be synced through: Windows opens none, nor can one that may be written to and not be
# read, and some network file systems sync files alone.
CANNOT_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def as_path(name: str, value: Any) -> Path:
    """`value`, a str or an os.PathLike of one, as a Path. Raises ValueError for what can be the path of no file."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a path, a str or pathlib.Path; got {type(value).__name__}")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid Unicode text: {text!r:.200}") from None
    if "\0" in text:
        raise ValueError(f"{name} holds a null character, which no path does: {text!r:.200}")
    return Path(text)


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Has `write` fill a temporary file beside `path`, and puts it in place once it is complete and on the disk.

    Its name is on the disk too when this returns. A link is followed, so that the file it points to is replaced.
    The new file has the mode of the one it replaces, or the usual one. Raises FileNotFoundError where the folder is
    missing, IsADirectoryError where `path` is a folder, OSError for another thing that is no file; whatever `write`
    raises leaves, and no temporary file stays.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {target.parent}")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {path}: it is no regular file")
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """Makes the folder and those that it lies in, where they are missing; their names are then on the disk."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        sync_folder(each.parent)


def sync_folder(path: Path) -> None:
    """Has what was made, renamed and removed in the folder on the disk.

    By POSIX a file's own fsync says nothing of its name: a power cut may take a rename back, or lose a new file. Does
    nothing where folders cannot be synced; raises OSError where the disk fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
