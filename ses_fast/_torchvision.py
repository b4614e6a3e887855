"""Makes torchvision importable beside a torch that its compiled part does not fit.

diffsynth imports torchvision, and so do transformers' models. PyPI's torchvision for Linux wants CUDA
libraries; beside a CPU torch its compiled part does not load, its operators are never declared, and `import
torchvision` ends in "operator torchvision::nms does not exist". Nothing here calls those operators: declaring
them is enough.
"""

import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None  # a Library takes its schemas with it when it is collected


def declare_torchvision_ops() -> None:
    """Declares torchvision's operators where its compiled part cannot.

    To call right before an import of diffsynth or transformers. Does nothing where torchvision loads,
    is imported already or is not installed, or where the schemas exist.
    """
    global _library
    if "torchvision" in sys.modules or any(map(_declared, _SCHEMAS)):
        return  # a second Library(..., "DEF") of one namespace raises
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _compiled_part_loads(Path(spec.origin).parent):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name, signature in _SCHEMAS.items():
        _library.define(name + signature)


def _declared(name: str) -> bool:
    return hasattr(torch.ops.torchvision, name)


def _compiled_part_loads(folder: Path) -> bool:
    """Whether the library that declares torchvision's operators loads, as torchvision is about to do."""
    for library in sorted([*folder.glob("_C*.so"), *folder.glob("_C*.pyd"), *folder.glob("_C*.dylib")]):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue  # its own libraries are missing: the case to help
        if _declared("nms"):
            return True
    return False
