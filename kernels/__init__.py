"""Triton kernels of the ops in `ses_fast.ops`. Imported as `ses_fast.kernels`, never as `kernels`.

This file imports nothing and names a version, because transformers imports any package called `kernels` that
it finds (it means an unrelated one), and finds this folder when the repository root is on `sys.path`.
"""

__version__ = "0.0.0"
