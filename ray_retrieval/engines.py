"""Files that other programs run: what is in them, and how each is written and run.

The graph takes prepared images and does the rest itself: normalisation, network, signs, packing.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from ray_retrieval.methods.hashing import HashingMethod

INPUT, OUTPUTS = "images", ("codes", "relaxed")
Images = npt.NDArray[np.uint8]
Engine = Callable[[Images], tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]]
"""Prepared images, uint8 [n, 3, size, size], to packed codes, uint8 [n, ceil(bits / 8)], and relaxed ones,
float32 [n, bits]."""
_OPSET = 18  # the oldest that torch writes without converting; what reads ONNX reads it


class CodeGraph(nn.Module):
    """What is exported of a method that makes codes.

    Args:
        method: in evaluation mode.
    """

    def __init__(self, method: HashingMethod) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Packed codes, uint8 [n, ceil(bits / 8)], and relaxed ones, float32 [n, bits].

        Args:
            images: uint8 [n, 3, size, size].
        """
        relaxed = self.method.relaxed(images)
        return packed(relaxed), relaxed


def packed(relaxed: Tensor) -> Tensor:
    """`layers.sign.pack_signs` in operations that every engine has, for any number of images.

    Sums of bytes are missing from ONNX, and a length taken by `len` would be built into the graph.
    """
    bits = relaxed.shape[1]
    ones = functional.pad((relaxed >= 0).to(torch.int32), (0, -bits % 8))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.int32, device=relaxed.device)
    total = (ones.reshape(-1, (bits + 7) // 8, 8) * weights).sum(dim=2, dtype=torch.int32)
    return total.to(torch.uint8)


@dataclass(frozen=True)
class Form:
    """A file format.

    Attributes:
        file: name of the file in an export.
        packages: what has to be installed beside torch.
        write: writes a traced graph (which it may change) to a path, and says what it wrote.
        open: an engine that runs such a file on the processor.
    """

    file: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path], dict[str, Any]]
    open: Callable[[Path], Engine]


def trace(method: HashingMethod) -> ExportedProgram:
    """The graph of a method in evaluation mode, in float32, for any number of images from 1.

    Its weights are copies: the method stays as it is, and what is done to the graph can be compared with it.
    """
    size = method.preprocessing.size
    own = copy.deepcopy(method).to(torch.float32).requires_grad_(requires_grad=False)
    graph = CodeGraph(own).eval()
    example = torch.zeros((2, 3, size, size), dtype=torch.uint8)
    program = torch.export.export(graph, (example,), dynamic_shapes={INPUT: {0: Dim("n", min=1)}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _write_torch(program: ExportedProgram, path: Path) -> dict[str, Any]:
    torch.export.save(program, path)
    return {"torch": torch.__version__}


def _open_torch(path: Path) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, about its own buffers
        graph = torch.export.load(path).module()

    def run(images: Images) -> Any:
        with torch.inference_mode():
            codes, relaxed = graph(torch.from_numpy(images))
        return codes.numpy(), relaxed.numpy()

    return run


def _write_onnx(program: ExportedProgram, path: Path) -> dict[str, Any]:
    # ONNX knows no memory formats: torch would spell them out as a gather for each pooling.
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.contiguous.default:
            node.kwargs = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about itself
        made = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=OUTPUTS,
            dynamic_shapes={INPUT: {0: "n"}},
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    made.save(path)
    return {"opset": _OPSET, "torch": torch.__version__}


def _open_onnx(path: Path) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(list(OUTPUTS), {INPUT: images})


FORMS: dict[str, Form] = {
    "torch": Form("model.pt2", (), _write_torch, _open_torch),
    "onnx": Form("model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
}
