"""A model as one file for programs that do not have this package: ONNX, or torch.export.

The folder of an export holds `model.onnx` or `model.pt2` and `export.json`, which says what goes in and what
comes out, how an image is prepared, and how the file's answers compare with the model's.
"""

import importlib.util
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_retrieval import recipe as recipes
from ray_retrieval.data import datasets
from ray_retrieval.data.benchmark import Benchmark
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.engines import DESCRIPTION, FORMS, int8_loss, parity, quantise, read_export
from ray_retrieval.engines.graphs import Graph, LevelGraph, graph_of, trace
from ray_retrieval.errors import ArtefactError, RecipeError, RetrievalError
from ray_retrieval.model import Model, load
from ray_retrieval.model_folder import read_model_description
from ray_retrieval.storage import Folder, check_file, described, file_entry, meant_by


def export(
    model: str | Folder,
    out: str | Folder | None = None,
    *,
    form: str = "onnx",
    images: ImageTable | None = None,
    int8: bool = False,
    max_loss: float | None = None,
) -> dict[str, Any]:
    """Write a model as one file, after it has been run from that file and compared with the model.

    An earlier export in `out` stays if this one is refused, and else is replaced.

    Args:
        model: a model directory.
        out: where the export goes; unset: `default_folder`, where engines look for it.
        form: one of `FORMS`.
        images: images to compare on, as many as `parity.table_samples` takes; with `int8` those to calibrate
            on and to measure the loss on too. Unset: the training images of the recipe beside the model, and
            the loss is measured on validation queries where there are 100 or more; without `int8` synthetic
            ones where there are no such images.
        int8: of `onnx`: compute the backbone in 8 bits.
        max_loss: how much of the field's metric that may cost; unset: `quantise.MAX_LOSS`.

    Returns:
        What `export.json` says.

    Raises:
        RecipeError: if the form is unknown, has no `int8`, or its packages are not installed; if `max_loss`
            is not from 0 to 1, or cannot be measured; if there are no images for `int8`.
        ArtefactError: if `model` is no model directory or is damaged, or `out` holds anything else than an
            export, or cannot be written.
        ModelError: if the method cannot be one graph, the file's answers are not the model's, or those in 8
            bits cost more than `max_loss`.
    """
    _check_asked(form, int8=int8, max_loss=max_loss)
    chosen, source = FORMS[form], Folder(model)
    folder = default_folder(source, form, int8) if out is None else Folder(out)
    read_model_description(source)
    _refuse_foreign(folder, source)
    measured = None
    if int8:
        if images is None:
            images, measured = _recipe_images(source)
        quantise.check(images if measured is None else measured, max_loss)
    loaded = load(model)
    graph = graph_of(loaded.method)
    samples = _samples(source, images, loaded.preprocessing)
    with tempfile.TemporaryDirectory(prefix="ray_retrieval-export-") as scratch:
        path = Path(scratch) / chosen.file
        details = chosen.write(trace(loaded.method), graph, path)
        precision = loaded.description["precision"]
        compared = parity.compare(
            chosen.open(path), loaded.method, samples, precision=precision, where=chosen.file
        )
        body = _body(loaded, graph, {"name": form, **details})
        if int8:
            assert images is not None
            smaller = Path(scratch) / "int8" / chosen.file
            smaller.parent.mkdir()
            made = quantise.quantise(path, smaller, graph, images, measured=measured, max_loss=max_loss)
            about = {"precision": "int8", "int8": made.as_json(), "parity_before_int8": compared.as_json()}
            return _publish(folder, smaller, {**body, **about})
        return _publish(folder, path, {**body, "parity": compared.as_json()})


def _check_asked(form: str, *, int8: bool, max_loss: float | None) -> None:
    """Raise RecipeError for an export that cannot be had, whatever the model."""
    if form not in FORMS:
        raise RecipeError(f"unknown export format {form!r}, known are: {', '.join(FORMS)}")
    if int8 and form != "onnx":
        raise RecipeError(f"8 bits are for the format onnx, not {form}", mend="leave out `int8`")
    if max_loss is not None and not int8:
        raise RecipeError(
            "it bounds what 8 bits cost", where="`max_loss`", mend="add `int8`, or leave it out"
        )
    if max_loss is not None and not 0 <= max_loss <= 1:  # so that NaN is refused
        raise RecipeError(f"a share from 0 to 1 is expected, got {max_loss:g}", where="`max_loss`")
    chosen = FORMS[form]
    missing = [package for package in chosen.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(
            f"the export to {form} needs {', '.join(missing)}",
            mend="install the extra: pip install 'ray_retrieval[export]'",
        )


def _refuse_foreign(folder: Folder, model: Folder) -> None:
    """Raise ArtefactError for a folder that is neither empty, nor an export, nor that of the model itself."""
    if folder.exists(DESCRIPTION):
        read_export(folder)
        return
    names = set(folder.names())
    if any(meant_by(entry.base_name) == DESCRIPTION for entry in folder.entries()):
        names -= {form.file for form in FORMS.values()}  # left by an export that was killed
    if names and folder.uri != model.uri:
        listed = ", ".join([*sorted(names)[:3], *(["…"] if len(names) > 3 else [])])
        raise ArtefactError(
            f"the folder holds something that is no export of a model ({listed})",
            where=folder,
            mend="export into a folder of its own",
        )


def default_folder(model: Folder, form: str, int8: bool) -> Folder:
    """Where an export goes, in the model's folder."""
    return model / f"{form}{'-int8' if int8 else ''}"


def benchmark_of(model: Folder) -> Benchmark:
    """The images that a model was trained and validated on, by the recipe that a run leaves beside it.

    Raises:
        RecipeError: if there is no recipe beside the model, or nothing can be learned from its images.
        DataError: if the images are missing.
    """
    run = model.parent
    if not run.exists("recipe.yaml"):
        raise RecipeError(
            "no recipe beside the model says what it was trained on",
            where=run.uri_of("recipe.yaml"),
            mend="give `images`",
        )
    recipe = recipes.load(run.uri_of("recipe.yaml"))
    benchmark = datasets.load(recipe.data, seed=recipe.seed, splits=run / "split")
    if benchmark.untrainable:
        raise RecipeError(benchmark.untrainable, where=benchmark.name, mend="give `images`")
    return benchmark


def _recipe_images(model: Folder) -> tuple[ImageTable, ImageTable | None]:
    """To calibrate on, and to measure on where the validation has enough; errors as of `benchmark_of`."""
    benchmark = benchmark_of(model)
    held_out = benchmark.validation_queries
    enough = len(int8_loss.labelled_rows(held_out)) >= int8_loss.ENOUGH
    return benchmark.train, held_out if enough else None


def _samples(model: Folder, images: ImageTable | None, preprocessing: Preprocessing) -> parity.Samples:
    """What the file is compared on; their source says where they come from, and why they are synthetic."""
    if images is not None:
        return parity.table_samples(images, preprocessing)
    try:
        return parity.table_samples(benchmark_of(model).train, preprocessing)
    except RetrievalError as error:
        made = parity.synthetic_samples(preprocessing)
        return replace(made, source=f"{made.source} ({error.problem})")


def _publish(folder: Folder, path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """Put a file and its description into a folder, in the place of an earlier export, or leave it as it was.

    Both are written in full before either takes its name: where the store is full, an earlier export stays.
    """
    earlier = read_export(folder)["file"]["file"] if folder.exists(DESCRIPTION) else None
    new, free = not folder.exists(), not folder.exists(path.name)
    entry = file_entry(Folder(path.parent), path.name)
    body = {**body, "file": entry}
    folder.sweep()
    try:
        with folder.writing(DESCRIPTION) as description:
            description.write(described(kind="export", version=1, body=body))
            description.flush()
            with path.open("rb") as source, folder.writing(path.name) as target:
                shutil.copyfileobj(source, target, 1 << 24)
            check_file(folder, entry, content=True)
    except BaseException:
        if new or free:
            folder.remove("" if new else path.name)
        raise
    if earlier not in (None, path.name):
        folder.remove(earlier)
    return body


def _body(model: Model, graph: Graph, form: dict[str, Any]) -> dict[str, Any]:
    pyramid = {"pyramid": pyramid_in_words(graph)} if isinstance(graph, LevelGraph) else {}
    return {
        "model": model.fingerprint,
        "method": model.description["method"]["name"],
        **model.form.as_json(),
        "form": form,
        "precision": "float32",
        "inputs": [graph.input.as_json()],
        "outputs": [output.as_json() for output in graph.outputs],
        "preprocessing": preprocessing_in_words(model.preprocessing),
        **pyramid,
        "classes": model.description["classes"],
        "class_names": model.class_names,
    }


def preprocessing_in_words(preprocessing: Preprocessing) -> dict[str, Any]:
    """What `data.transforms.prepare` does, for somebody who has to do it again in another language."""
    side = preprocessing.resize_to or preprocessing.size
    filter_, steps = _whole(preprocessing) if preprocessing.resize == "long_side" else _square(preprocessing)
    steps = [
        "decode to upright RGB of 8 bits: apply the EXIF orientation, lay transparent pixels on white, keep "
        "the upper 8 bits of 16-bit grey, take the first picture of several, ignore colour profiles",
        f"decode a JPEG at 1/8, 1/4 or 1/2 of its size, the first of these at which both sides are at least "
        f"{side} pixels, by the scaled inverse DCT of libjpeg; decoding all of it changes pixels a little",
        *steps,
        "stop here: (value / 255 − mean) / std is inside the graph",
    ]
    return {**preprocessing.model_dump(mode="json"), "resize_to": side, "filter": filter_, "steps": steps}


def _square(preprocessing: Preprocessing) -> tuple[str, list[str]]:
    size, side = preprocessing.size, preprocessing.resize_to or preprocessing.size
    if preprocessing.resize == "squash":
        resize = f"resize to {side} × {side} pixels, whatever the proportions"
    else:
        resize = (
            f"resize the shorter side to {side} pixels and the longer one to {side} · longer / shorter, "
            "cut to a whole number"
        )
    return "bilinear", [
        f"{resize}, by a bilinear filter with antialiasing: a triangle as wide as the reduction, as Pillow's "
        "BILINEAR, first along rows and then along columns, each rounded to 8 bits; an image that has that "
        "size already stays as it is",
        f"cut out {size} × {size} pixels, from column round((width − {size}) / 2) and row "
        f"round((height − {size}) / 2) on, halves rounded to the even number",
        f"lay out as uint8 [3, {size}, {size}]: all red, then all green, then all blue",
    ]


def _whole(preprocessing: Preprocessing) -> tuple[str, list[str]]:
    size = preprocessing.size
    if preprocessing.shapes == "buckets":
        resize = (
            "resize to the nearest of the proportions 1:1, 4:5, 3:4, 2:3, 9:16, 1:2, 2:5, 1:3, 2:7, 1:4, "
            "upright or lying, by the ratio of the ratios; its own beyond 1:4. The longer side becomes "
            f"{size} pixels, or, where it is shorter than that, its own length cut to a multiple of 32 "
            "(below 32 as it is), and the other that times the proportion, rounded, halves to the even number"
        )
    else:
        resize = (
            f"where the longer side has more than {size} pixels, resize it to {size} and the other so that "
            "the proportion is nearest to the image's, of the two whole numbers next to it"
        )
    steps = [
        f"{resize}, by a Lanczos filter of three lobes as wide as the reduction, as Pillow's LANCZOS, first "
        "along rows and then along columns, each rounded to 8 bits"
    ]
    if preprocessing.shapes == "pad":
        colour = ", ".join(str(round(255 * value)) for value in preprocessing.mean)
        steps.append(
            f"lay it on a square of {size} × {size} pixels of the colour {colour}, from column "
            f"({size} − width) / 2 and row ({size} − height) / 2 on, cut to whole numbers"
        )
    steps.append("lay out as uint8 [3, height, width]: all red, then all green, then all blue")
    return "lanczos", steps


def pyramid_in_words(graph: LevelGraph) -> dict[str, Any]:
    """What `layers.pyramid` does around the graph of a method of local features, to be done again."""
    method = graph.method
    config, field = method.config.pyramid, method.field
    threshold = max(float(method.threshold), -float("inf") if config.threshold is None else config.threshold)
    steps = [
        "for each of the scales: resize the prepared image, height and width times the scale, each rounded, "
        "halves to the even number; leave out scales at which a side would have fewer than min_side pixels "
        f"(the graph takes {graph.least_side}: what the model has of smaller scales, it alone has)",
        "resize in floating point, by a bilinear filter with antialiasing as wide as the reduction; values "
        "stay between 0 and 255",
        "run the graph; cell (row i, column j) is at x = j · stride + offset, y = i · stride + offset in the "
        "resized image, and at (x + 0.5) / ratio − 0.5 in the prepared one, where ratio is the resized width "
        "divided by the prepared one for x, and likewise the heights for y; (0, 0) is the centre of a pixel",
        "leave out cells whose score is below threshold, where there is one",
        "with nms_iou, leave out, at each scale, cells whose receptive field (size pixels wide and high) "
        "overlaps that of a cell with a higher score by more than that share of what both cover",
        "of all scales together, take the max_features cells of the highest scores",
    ]
    combined = sorted(method.global_scales)
    if combined:
        steps.append(
            "the global descriptor is the mean of `vectors` at global_scales, divided by its length; where "
            "all of them are left out, that of the prepared image as it is"
        )
    return {
        **config.model_dump(mode="json"),
        "threshold": None if threshold == -float("inf") else threshold,
        "receptive_field": {"size": field.size, "stride": field.stride, "offset": field.offset},
        "global_scales": combined,
        "steps": steps,
    }
