"""The one message for a missing optional package."""


def missing_extra(package: str, extra: str) -> ImportError:
    """The error to raise when `package`, which the extra `extra` installs, cannot be imported."""
    return ImportError(f'this needs {package}: pip install "ses-fast[{extra}]"')
