"""A model as one file for programs that do not have this package: ONNX, or torch.export.

`export/` holds `model.onnx` or `model.pt2` and `export.json`, which says what goes in and what comes out.
"""

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ray_retrieval import parity
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import Preprocessing
from ray_retrieval.engines import FORMS, INPUT, OUTPUTS, trace
from ray_retrieval.errors import ModelError, RecipeError
from ray_retrieval.methods.hashing import HashingMethod
from ray_retrieval.model import Model, load
from ray_retrieval.storage import Folder, check_file, file_entry, read_description, write_description

DESCRIPTION = "export.json"


def export(
    model: str | Folder, out: str | Folder, *, form: str = "onnx", images: ImageTable | None = None
) -> dict[str, Any]:
    """Write a model as one file, after it has been run from that file and compared with the model.

    An earlier export in `out` stays if this one is refused, and else is replaced.

    Args:
        model: a model directory.
        out: where the export goes.
        form: one of `FORMS`.
        images: images to compare on, 64 at the most; default synthetic ones.

    Returns:
        What `export.json` says.

    Raises:
        RecipeError: if the form is unknown or its packages are not installed.
        ArtefactError: if `model` is no model directory or is damaged, or `out` cannot be written.
        ModelError: if the method makes no codes, or the file's answers are not the model's.
    """
    if form not in FORMS:
        raise RecipeError(f"unknown export format {form!r}, known are: {', '.join(FORMS)}")
    chosen, folder = FORMS[form], Folder(out)
    missing = [package for package in chosen.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise RecipeError(
            f"the export to {form} needs {', '.join(missing)}",
            mend="install the extra: pip install 'ray_retrieval[export]'",
        )
    loaded = load(model)
    method = loaded.method
    if not isinstance(method, HashingMethod):
        raise ModelError(f"a method that makes {loaded.form} cannot be exported yet", where=model)
    if images is None:
        samples = parity.synthetic_samples(loaded.preprocessing.size)
    else:
        samples = parity.table_samples(images, loaded.preprocessing)
    with tempfile.TemporaryDirectory(prefix="ray_retrieval-export-") as scratch:
        path = Path(scratch) / chosen.file
        details = chosen.write(trace(method), path)
        measured = parity.compare(
            chosen.open(path), method, samples, precision=loaded.description["precision"], where=chosen.file
        )
        body = _body(loaded, {"name": form, **details}, measured.as_json())
        return _publish(folder, path, body)


def _publish(folder: Folder, path: Path, body: dict[str, Any]) -> dict[str, Any]:
    """Put the file and then its description into the folder; what was begun is removed on an error."""
    new = not folder.exists()
    entry = file_entry(Folder(path.parent), path.name)
    body = {**body, "file": entry}
    if folder.exists(DESCRIPTION):
        earlier = read_description(folder, DESCRIPTION, kind="export", version=1)
        folder.remove(DESCRIPTION)
        folder.remove(earlier["file"]["file"])
    folder.sweep()
    try:
        with path.open("rb") as source, folder.writing(path.name) as target:
            shutil.copyfileobj(source, target, 1 << 24)
        check_file(folder, entry, content=True)
        write_description(folder, DESCRIPTION, kind="export", version=1, body=body)
    except BaseException:
        folder.remove("" if new else path.name)
        raise
    return body


def _body(model: Model, form: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    size, bits = model.preprocessing.size, model.form.size
    return {
        "model": model.fingerprint,
        "method": model.description["method"]["name"],
        "kind": model.description["kind"],
        "bits": bits,
        "form": form,
        "precision": "float32",
        "inputs": [
            {
                "name": INPUT,
                "dtype": "uint8",
                "shape": ["n", 3, size, size],
                "meaning": "prepared images, channels red, green, blue; any n from 1",
            }
        ],
        "outputs": [
            {
                "name": OUTPUTS[0],
                "dtype": "uint8",
                "shape": ["n", (bits + 7) // 8],
                "meaning": f"codes of {bits} bits; bit 0 is the highest of the first byte, the bits that "
                "fill the last byte are 0; compared by the Hamming distance",
            },
            {
                "name": OUTPUTS[1],
                "dtype": "float32",
                "shape": ["n", bits],
                "meaning": "relaxed codes; a bit is 1 where the value is at least 0",
            },
        ],
        "preprocessing": preprocessing_in_words(model.preprocessing),
        "classes": model.description["classes"],
        "class_names": model.class_names,
        "parity": measured,
    }


def preprocessing_in_words(preprocessing: Preprocessing) -> dict[str, Any]:
    """What `data.transforms.prepare` does, for somebody who has to do it again in another language."""
    size, side = preprocessing.size, preprocessing.resize_to or preprocessing.size
    if preprocessing.resize == "squash":
        resize = f"resize to {side} × {side} pixels, whatever the proportions"
    else:
        resize = (
            f"resize the shorter side to {side} pixels and the longer one to {side} · longer / shorter, "
            "cut to a whole number"
        )
    steps = [
        "decode to upright RGB of 8 bits: apply the EXIF orientation, lay transparent pixels on white, keep "
        "the upper 8 bits of 16-bit grey, take the first picture of several, ignore colour profiles",
        f"decode a JPEG at 1/8, 1/4 or 1/2 of its size, the first of these at which both sides are at least "
        f"{side} pixels, by the scaled inverse DCT of libjpeg; decoding all of it changes pixels a little",
        f"{resize}, by a bilinear filter with antialiasing: a triangle as wide as the reduction, as Pillow's "
        "BILINEAR, first along rows and then along columns, each rounded to 8 bits; an image that has that "
        "size already stays as it is",
        f"cut out {size} × {size} pixels, from column round((width − {size}) / 2) and row "
        f"round((height − {size}) / 2) on, halves rounded to the even number",
        f"lay out as uint8 [3, {size}, {size}]: all red, then all green, then all blue",
        "stop here: (value / 255 − mean) / std is inside the graph",
    ]
    return {**preprocessing.model_dump(mode="json"), "resize_to": side, "filter": "bilinear", "steps": steps}
