"""Live comparisons with PyTorch implementations, and where their packages come from.

Without torch, transformers and timm these tests skip and say so. With the environment variable
CONVNEXT_JAX_PARITY=required a missing package is an error, so that no run takes a skip for a pass.
"""

import importlib
import os

import pytest

try:
    import torch
except ImportError:
    torch = None
else:
    # timm imports torchvision, whose compiled operators do not exist beside a torch that it was
    # not built for. Nothing compared here calls them: their declarations are enough to import.
    torchvision_operators = torch.library.Library("torchvision", "DEF")
    torchvision_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.set_num_threads(2)

if os.environ.get("CONVNEXT_JAX_PARITY") == "required":
    for package in ("torch", "transformers", "timm", "torchvision"):
        importlib.import_module(package)

WORST: dict[str, tuple[float, str]] = {}


@pytest.fixture
def record_worst(request):
    """Keeps the largest error of each kind for the summary at the end of the run."""

    def record(kind: str, errors: dict[str, float]) -> None:
        name = max(errors, key=errors.get)
        if errors[name] >= WORST.get(kind, (0.0, ""))[0]:
            WORST[kind] = (errors[name], f"{name} in {request.node.name}")

    return record


def pytest_terminal_summary(terminalreporter):
    """The measured errors, beside the bounds that the tests assert."""
    if WORST:
        terminalreporter.section("largest error relative to each tensor's largest value")
        for kind, (error, where) in sorted(WORST.items()):
            terminalreporter.write_line(f"{kind}: {error:.1e} ({where})")
