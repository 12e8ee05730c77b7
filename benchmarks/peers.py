"""What a benchmark does so that its peers import on this machine. The library itself never does."""

from __future__ import annotations

import torch

_KEPT: list[torch.library.Library] = []


def make_torchvision_importable() -> None:
    """Declare the operators that torchvision's published wheel registers metadata for.

    That wheel is compiled against a CUDA build of torch; beside a CPU build its own library does not load, and its
    import fails on the first missing operator. The operators are declared, not implemented: no peer measured here
    calls one. Call this before anything imports torchvision (transformers does, where it is installed).
    """
    if _KEPT:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
