"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


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

    A link is followed, so that the file it points to is replaced. The new file has the mode of the one it replaces,
    or the usual one. Raises FileNotFoundError where the folder is missing, IsADirectoryError where `path` is a
    folder, OSError for another thing that is no file; whatever `write` raises leaves, and no temporary file stays.
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
