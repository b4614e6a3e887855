"""Only the package mapping; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# The Triton kernels stand in the top-level folder kernels/ and are installed as `ses_fast.kernels`:
# transformers probes for an unrelated package called `kernels`, and would import ours under that name.
setup(
    packages=[*find_packages(include=["ses_fast", "ses_fast.*"]), "ses_fast.kernels"],
    package_dir={"ses_fast.kernels": "kernels"},
)
