"""What is exported of a method: a graph from images to what descriptors are made of, one kind for each kind.

A graph takes images and does the rest itself: normalisation, the network, signs and packing of codes, or
pooling, several sizes, whitening and unit length of vectors. Of local features it does what a network does at
one scale; which scales there are and which features are taken is a few lines for whoever runs it.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.descriptors import Codes, DescriptorKind, Descriptors, Vectors
from ray_retrieval.errors import ModelError
from ray_retrieval.layers.regions import RegionalPooling
from ray_retrieval.methods.base import Method
from ray_retrieval.methods.delf import Delf, Level
from ray_retrieval.methods.hashing import HashingMethod

INPUT = "images"
Array = npt.NDArray[Any]
Engine = Callable[[Array], Sequence[Array]]
"""From images, as a graph's `input` says, to the arrays that its `outputs` name, in their order."""
_REASON = 300
"""Characters of what torch says of a method that it cannot trace."""


@dataclass(frozen=True)
class Port:
    """What goes into a graph, or comes out.

    Attributes:
        name: in the file.
        dtype: `uint8` or `float32`.
        shape: sizes of the axes, or their names where they are free.
        meaning: in words.
        least_side: pixels that free heights and widths have at least.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str
    least_side: int | None = None

    def as_json(self) -> dict[str, Any]:
        said = {**asdict(self), "shape": list(self.shape)}
        return {key: value for key, value in said.items() if value is not None}


class Graph(nn.Module, ABC):
    """What is exported of a method.

    Args:
        method: in evaluation mode.

    Raises:
        ModelError: if the method cannot be one graph.
    """

    checked: ClassVar[tuple[str, ...]]
    """Outputs of which every value is compared with the model's, up to rounding."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.least_side: int = method.least_side if self.any_size else self.preprocessing.size
        """Pixels that height and width have at least."""

    @property
    def preprocessing(self) -> Preprocessing:
        return self.method.preprocessing

    @property
    def any_size(self) -> bool:
        """Whether height and width are free: where the model's images have several sizes."""
        return not self.preprocessing.square

    @property
    def input(self) -> Port:
        """Prepared images."""
        size = self.preprocessing.size
        sides: tuple[int | str, int | str] = ("height", "width") if self.any_size else (size, size)
        free = f", height and width from {self.least_side} pixels" if self.any_size else ""
        meaning = f"prepared images, channels red, green, blue; any n from 1{free}"
        return Port(INPUT, "uint8", ("n", 3, *sides), meaning, self.least_side if self.any_size else None)

    @property
    @abstractmethod
    def outputs(self) -> tuple[Port, ...]:
        """What `forward` returns."""

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The tensors that `outputs` names, in that order.

        Args:
            images: of the shape and type that `input` says.
        """

    @abstractmethod
    def descriptors(self, run: Engine, images: Tensor) -> Descriptors:
        """What `Method.describe` gives, by a file that was made of this graph.

        Args:
            run: runs the file.
            images: prepared, uint8 [n, 3, h, w], each side at least `least_side` but for local features.
        """

    @property
    def dynamic(self) -> dict[int, Any]:
        """The free axes of the input, by their numbers."""
        axes: dict[int, Any] = {0: Dim("n", min=1)}
        if self.any_size:
            axes |= {2: Dim("height", min=self.least_side), 3: Dim("width", min=self.least_side)}
        return axes

    def example(self) -> Tensor:
        """Two images to trace the graph with, [2, 3, h, w] of `input`'s type; free sides differ."""
        shape = (2, 3, self.preprocessing.size, self.preprocessing.size)
        if self.any_size:
            height = max(64, 2 * self.least_side)
            shape = (2, 3, height, height + 32)
        return torch.zeros(shape, dtype=getattr(torch, self.input.dtype))


class CodeGraph(Graph):
    """Of a method that makes codes."""

    checked: ClassVar[tuple[str, ...]] = ("relaxed",)
    method: HashingMethod

    def __init__(self, method: Method) -> None:
        if not isinstance(method, HashingMethod):
            raise ModelError(
                f"{type(method).__name__} is no HashingMethod: codes of others cannot be exported"
            )
        super().__init__(method)

    @property
    def outputs(self) -> tuple[Port, ...]:
        bits = self.method.config.bits
        return (
            Port(
                "codes",
                "uint8",
                ("n", (bits + 7) // 8),
                f"codes of {bits} bits; bit 0 is the highest of the first byte, the bits that fill the last "
                "byte are 0; compared by the Hamming distance",
            ),
            Port(
                "relaxed", "float32", ("n", bits), "relaxed codes; a bit is 1 where the value is at least 0"
            ),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        relaxed = self.method.relaxed(images)
        return packed(relaxed), relaxed

    def descriptors(self, run: Engine, images: Tensor) -> Codes:
        return Codes(run(images.numpy())[0], self.method.config.bits)


class VectorGraph(Graph):
    """Of a method that makes vectors and has `vectors`: from prepared images to unit vectors, as tensors."""

    checked: ClassVar[tuple[str, ...]] = ("vectors",)
    method: Any

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        if not hasattr(method, "vectors"):
            raise ModelError(
                f"{type(method).__name__} has no `vectors(images)` that gives tensors, and cannot be exported"
            )
        if self.any_size and any(isinstance(layer, RegionalPooling) for layer in method.modules()):
            raise ModelError(
                "pooling by regions has other regions for images of other proportions, and is no one graph",
                where="method.pooling",
                mend="train with method.image.shapes=pad, which makes all images squares",
            )

    @property
    def outputs(self) -> tuple[Port, ...]:
        size = self.method.config.form.size
        return (Port("vectors", "float32", ("n", size), "of length 1; compared by their inner product"),)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.method.vectors(images),)

    def descriptors(self, run: Engine, images: Tensor) -> Vectors:
        return Vectors(run(images.numpy())[0])


class LevelGraph(Graph):
    """Of DELF: what its network makes of images at one scale of the pyramid."""

    checked: ClassVar[tuple[str, ...]] = ("descriptors", "scores", "vectors")
    method: Delf

    def __init__(self, method: Method) -> None:
        if not isinstance(method, Delf):
            raise ModelError(
                f"{type(method).__name__} is no Delf: of local features, only the network and the pyramid of "
                "that class are exported"
            )
        method.check_described()
        super().__init__(method)

    @property
    def any_size(self) -> bool:
        return True

    @property
    def input(self) -> Port:
        shape = ("n", 3, "height", "width")
        meaning = (
            "prepared images at one scale of the pyramid, channels red, green, blue, values from 0 to 255; "
            f"any n from 1, height and width from {self.least_side} pixels"
        )
        return Port(INPUT, "float32", shape, meaning, self.least_side)

    @property
    def outputs(self) -> tuple[Port, ...]:
        form = self.method.config.form
        cells = ("n", "rows", "columns")
        found = (
            Port("descriptors", "float32", (*cells, form.size), "of length 1, one for each cell"),
            Port("scores", "float32", cells, "how much the network attends to each cell"),
        )
        if not form.vectors:
            return found
        meaning = "global descriptors of length 1 at this scale"
        return (*found, Port("vectors", "float32", ("n", form.vectors), meaning))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        # A copy: normalising works in place, and the input is the caller's.
        level = self.method.level(self.method.normalised(images.clone()))
        made = (level.descriptors.movedim(1, -1), level.scores)
        return made if level.vectors is None else (*made, level.vectors)

    def descriptors(self, run: Engine, images: Tensor) -> Descriptors:
        def level(resized: Tensor) -> Level:
            if min(resized.shape[2:]) < self.least_side:
                return self.method.level(self.method.normalised(resized.clone()))
            cells, scores, *vectors = map(torch.from_numpy, run(resized.numpy()))
            return Level(cells.movedim(-1, 1), scores, vectors[0] if vectors else None)

        return self.method.describe_by(images.float(), level)


_GRAPHS: dict[DescriptorKind, type[Graph]] = {
    DescriptorKind.CODES: CodeGraph,
    DescriptorKind.VECTORS: VectorGraph,
    DescriptorKind.LOCAL: LevelGraph,
}


def graph_of(method: Method) -> Graph:
    """The graph of a method, in evaluation mode; the method is a part of it.

    Raises:
        ModelError: if the method cannot be one graph.
    """
    return _GRAPHS[method.config.form.kind](method).eval()


def trace(method: Method) -> ExportedProgram:
    """The graph of a method in evaluation mode, in float32, for all sizes that it takes.

    Its weights are copies: the method stays as it is, and what is done to the graph can be compared with it.

    Raises:
        ModelError: if the method cannot be one graph.
    """
    own = copy.deepcopy(method).to(torch.float32).requires_grad_(requires_grad=False)
    own.fix_for_export()
    graph = graph_of(own)
    try:
        program = torch.export.export(
            graph,
            (graph.example(),),
            dynamic_shapes={INPUT: graph.dynamic},
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    except Exception as error:  # torch has a dozen kinds, most of them its own
        reason = " ".join(str(error).split())
        raise ModelError(
            f"torch cannot make one graph of {type(method).__name__} for all sizes: {reason[:_REASON]}"
        ) from error
    for node in reversed(program.graph.nodes):
        node.meta.pop("stack_trace", None)  # paths of this machine
        # What torch took for granted of the example's sides, to choose among ways that give the same: how
        # poolings round, say, or how memory is laid out. That it is the same is seen when sides of all kinds
        # are compared.
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def packed(relaxed: Tensor) -> Tensor:
    """`layers.sign.pack_signs` in operations that every engine has, for any number of images.

    Args:
        relaxed: float [n, bits].

    Returns:
        uint8 [n, ceil(bits / 8)], bit 0 the highest of the first byte, 1 where the value is at least 0.

    Sums of bytes are missing from ONNX, and a length taken by `len` would be built into the graph.
    """
    bits = relaxed.shape[1]
    ones = functional.pad((relaxed >= 0).to(torch.int32), (0, -bits % 8))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.int32, device=relaxed.device)
    total = (ones.reshape(-1, (bits + 7) // 8, 8) * weights).sum(dim=2, dtype=torch.int32)
    return total.to(torch.uint8)


def answers(graph: Graph, images: Array) -> list[Array]:
    """What the model itself gives for each output, codes by the way that descriptors are made.

    Args:
        graph: of the model, in evaluation mode, on the processor.
        images: of the shape and type that `graph.input` says.

    Returns:
        An array for each of `graph.outputs`, of its shape and type.
    """
    with torch.inference_mode():
        given = torch.from_numpy(images)
        found = [output.numpy() for output in graph(given)]
        if isinstance(graph, CodeGraph):
            found[0] = np.asarray(graph.method.describe(given).data)
    return found
