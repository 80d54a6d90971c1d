"""Files that other programs run, and the ones that stand in for a model here: how each is written and run."""

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ray_retrieval.commands import command
from ray_retrieval.descriptors import Descriptors
from ray_retrieval.engines.graphs import INPUT, Array, Engine, Graph, LevelGraph, graph_of
from ray_retrieval.errors import ArtefactError, RecipeError
from ray_retrieval.methods.base import Method
from ray_retrieval.storage import Folder, check_file, read_description

DESCRIPTION = "export.json"
ENGINES: dict[str, str | None] = {"torch": None, "onnx": "float32", "onnx-int8": "int8"}
"""What computes descriptors, each of `config.EngineName`, and the precision of the export that it needs."""
_OPSET = 18  # the oldest that torch writes without converting; what reads ONNX reads it


@dataclass(frozen=True)
class Form:
    """A file format.

    Attributes:
        file: name of the file in an export.
        packages: what has to be installed beside torch to write it.
        write: writes a traced graph (which it may change) to a path, and says what it wrote.
        open: an engine that runs such a file on the processor.
    """

    file: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Graph, Path], dict[str, Any]]
    open: Callable[[Path], Engine]


def _write_torch(program: ExportedProgram, _graph: Graph, path: Path) -> dict[str, Any]:
    torch.export.save(program, path)
    return {"torch": torch.__version__}


def _open_torch(path: Path) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, about its own buffers
        graph = torch.export.load(path).module()

    def run(images: Array) -> list[Array]:
        with torch.inference_mode():
            return [output.numpy() for output in graph(torch.from_numpy(images))]

    return run


def _write_onnx(program: ExportedProgram, graph: Graph, path: Path) -> dict[str, Any]:
    # ONNX knows no memory formats: torch would spell them out as a gather for each pooling.
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.contiguous.default:
            node.kwargs = {}
    free = {axis: name for axis, name in enumerate(graph.input.shape) if isinstance(name, str)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about itself
        made = torch.onnx.export(
            program,
            input_names=[INPUT],
            output_names=[output.name for output in graph.outputs],
            dynamic_shapes={INPUT: free},
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    made.save(path)
    return {"opset": _OPSET, "torch": torch.__version__}


def open_onnx(path: Path) -> Engine:
    """An engine that runs a file of ONNX on the processor, on as many threads as torch has."""
    onnxruntime = onnx_runtime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})


def onnx_runtime() -> Any:
    """The package onnxruntime, told before it starts that it reports to nobody: else its releases do."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


FORMS: dict[str, Form] = {
    "torch": Form("model.pt2", (), _write_torch, _open_torch),
    "onnx": Form("model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, open_onnx),
}


class Exported:
    """An export that stands in for a model where descriptors are made.

    Args:
        method: the model's, in evaluation mode, on the processor.
        run: runs the file.
    """

    def __init__(self, method: Method, run: Engine) -> None:
        self._graph, self._run = graph_of(method), run

    def describe(self, images: Tensor) -> Descriptors:
        """As `Method.describe`, of uint8 [n, 3, h, w] on the processor.

        Images that are smaller than the file takes go through the model itself.
        """
        with torch.inference_mode():
            if not isinstance(self._graph, LevelGraph) and min(images.shape[2:]) < self._graph.least_side:
                return self._graph.method.describe(images)
            return self._graph.descriptors(self._run, images)


@dataclass(frozen=True)
class Export:
    """A file that stands in for a model.

    Attributes:
        folder: where it lies.
        description: what its `export.json` says.
    """

    folder: Folder
    description: dict[str, Any]

    @property
    def checksum(self) -> str:
        """sha256 of the file, in hexadecimal: what tells this export from another one of the same model."""
        return self.description["file"]["sha256"]  # type: ignore[no-any-return]

    def open(self, method: Method) -> Exported:
        """The engine that runs it.

        Args:
            method: the model, in evaluation mode, on the processor.

        Raises:
            ArtefactError: if the file is missing or damaged.
        """
        entry = self.description["file"]
        check_file(self.folder, entry, content=True)
        return Exported(method, open_onnx(self.folder.local_path(entry["file"])))


def find_export(model: Folder, fingerprint: str, engine: str) -> Export:
    """The export of a model that an engine runs: in the model's folder, in one inside it, or beside it.

    Its file is not read yet.

    Args:
        model: the model's folder.
        fingerprint: of the model.
        engine: one of `ENGINES`, other than `torch`.

    Raises:
        RecipeError: if the engine is unknown, or its package is not installed here.
        ArtefactError: if there is no such export of this very model; what else was found is named.
    """
    check_engine(engine)
    if importlib.util.find_spec("onnxruntime") is None:
        raise RecipeError(
            f"the engine {engine} needs onnxruntime",
            mend="install the extra: pip install 'ray_retrieval[export]', or use the engine torch",
        )
    others = []
    for folder in _nearby(model):
        try:
            if not folder.exists(DESCRIPTION):  # as of most folders there
                continue
            said = read_export(folder)
        except ArtefactError as error:
            others.append(f"{folder} cannot be used, {error.problem}")
            continue
        if said["form"]["name"] != "onnx" or said["precision"] != ENGINES[engine]:
            continue
        if said["model"] == fingerprint:
            return Export(folder, said)
        others.append(f"{folder} is of model {said['model']}")
    found = f": {'; '.join(others)}" if others else ""
    options = ["--int8", "--images", "IMAGES"] if engine == "onnx-int8" else []
    raise ArtefactError(
        f"no export of model {fingerprint} for the engine {engine} in the model's folder or beside it{found}",
        where=model,
        mend=f"make it: {command('export', str(model), *options)}",
    )


def read_export(folder: Folder) -> dict[str, Any]:
    """What the `export.json` of a folder says.

    Raises:
        ArtefactError: if the folder is no export or one of a later version, or the description names another
            file than an export of its form has: a name could lead out of the folder.
    """
    said = read_description(folder, DESCRIPTION, kind="export", version=1)
    try:
        form, named = said["form"]["name"], said["file"]["file"]
        said["precision"], said["model"], said["file"]["sha256"], said["file"]["bytes"]
    except (KeyError, TypeError):
        form = named = None
    if form not in FORMS or named != FORMS[form].file:
        raise ArtefactError(
            f"{DESCRIPTION} names the file {named!r} of the form {form!r}, which no export is made of",
            where=folder,
            mend="make it anew in another folder",
        )
    return said


def check_engine(engine: str) -> None:
    """Raise RecipeError for an engine that is none."""
    if engine not in ENGINES:
        raise RecipeError(f"unknown engine {engine!r}, known are: {', '.join(ENGINES)}", where="engine")


def _nearby(model: Folder) -> list[Folder]:
    """The model's folder, those in it, and those beside it."""
    beside = model.parent
    inside = [model / name for name in model.names()]
    return [model, *inside, *(beside / name for name in beside.names() if (beside / name).uri != model.uri)]
