"""What the package says when something is missing or odd."""

import sys
import warnings


def missing_extra(package: str, extra: str) -> ImportError:
    """The error to raise when `package`, which the extra `extra` installs, cannot be imported."""
    return ImportError(f'this needs {package}: pip install "ses-fast[{extra}]"')


def warn(message: str) -> None:
    """A UserWarning at the user's line: at one of the package's own, Python would show it once for all searches."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "ses_fast",
        "diffsynth",
        "diffusers",
    ):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, stacklevel=level)
