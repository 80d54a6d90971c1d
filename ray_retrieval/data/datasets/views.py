"""Instance retrieval from any photographs: views of each, with the exact geometry between them.

    data: {name: views, images: photos/}

Every photograph is an instance, a class of its own; labels that the photographs have do not count. A view of
it is a random homography followed by a change of brightness, contrast, saturation, gamma, sharpness and
noise, stored as JPEG (`data.rendering`). The views are drawn by the `seed` given here, and rendered once for
all runs that ask for the same; which instances are learned from, validated on and tested on is drawn by the
run's seed and saved with the run, as of other benchmarks. Of each test instance one view (or `queries`) is a
query; the others are the database, to which `distractors` can be added.

The tables have three more columns: `photograph` string, the id of the photograph · `view` int64, the view's
number · `homography` list<double>, the nine numbers of the homography from photograph to view, row by row.
So the homography between two views of a photograph is known: H₂ H₁⁻¹.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from ray_retrieval.config import Config
from ray_retrieval.cores import cores
from ray_retrieval.data import location, readers
from ray_retrieval.data.benchmark import Benchmark, from_tables, overlap
from ray_retrieval.data.columns import IMAGE_TYPE
from ray_retrieval.data.datasets.disjoint import LEAST, tables_of
from ray_retrieval.data.decode import decode
from ray_retrieval.data.rendering import Geometry, Photometry, render
from ray_retrieval.data.splits import REST, draw_groups, held_groups, load_or_draw
from ray_retrieval.data.table import ImageTable, IntArray, concatenate, open_images
from ray_retrieval.errors import DataError, StoreError
from ray_retrieval.storage import (
    Folder,
    check_file,
    file_entry,
    fingerprint,
    is_uri,
    read_description,
    write_description,
)

_KIND, _VERSION = "views", 1
_AT_ONCE = 64
"""Photographs whose views are in memory at a time while they are rendered."""
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", IMAGE_TYPE),
        ("photograph", pa.string()),
        ("view", pa.int64()),
        ("homography", pa.list_(pa.float64())),
    ]
)
_SAMPLES = {
    "sklearn.datasets.images": ["china.jpg", "flower.jpg"],
    "skimage.data": [
        *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png"),
        *("coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png"),
        *("moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png"),
    ],
}
"""Pictures that come with the packages themselves; those that these fetch on demand are left out."""


class ViewsConfig(Config):
    """Synthetic views of your own photographs: instance retrieval with exact ground truth."""

    name: Literal["views"] = "views"
    """The benchmark."""
    images: str | None = None
    """The photographs: a folder, a `.txt` list, a `.csv`, or Parquet; a path or URI. By default
    20 sample pictures of scikit-learn and scikit-image, which suffice to try things out."""
    root: str | None = None
    """Where the relative paths of a list start; by default the folder of the list."""
    distractors: str | None = None
    """Further photographs in any of these forms, of which one view each is added to the test database."""
    views: int = Field(default=8, ge=2, le=1000)
    """Views of each photograph."""
    queries: int = Field(default=1, ge=1)
    """How many views of a test or validation instance are queries; the others are the database."""
    size: int = Field(default=320, ge=16, le=4096)
    """The longer side of a view in pixels; less where the photograph is smaller."""
    geometry: Geometry = Geometry()
    """Bounds of the homographies."""
    photometry: Photometry = Photometry()
    """Bounds of the changes of colour."""
    seed: int = Field(default=0, ge=0)
    """Of the views. The split has the seed of the run."""
    test_instances: float = Field(default=0.3, gt=0, lt=1)
    """Share of the photographs to test on."""
    validation_instances: float = Field(default=0.15, ge=0, lt=1)
    """Share of the other photographs to validate on; 0 for none."""
    cache: str = "data/views"
    """Folder that keeps the rendered views; a path or URI."""

    @model_validator(mode="after")
    def _leaves_a_database(self) -> "ViewsConfig":
        if self.queries >= self.views:
            raise ValueError(f"of {self.views} views {self.queries} are queries: none is left to be searched")
        return self


def load(config: ViewsConfig, *, seed: int, splits: Folder) -> Benchmark:
    """The benchmark, by the split in `splits`; without one it is drawn by `seed` and saved there.

    Views that are not in the cache yet are rendered and kept there.

    Raises:
        RecipeError: if there is a root and nothing that has paths.
        DataError: if there are no photographs or too few, none can be decoded, a distractor is among the
            photographs, or the saved split was drawn otherwise.
        ArtefactError: if the saved split or the rendered views are damaged.
    """
    places = (place for place in (config.images, config.distractors) if place is not None)
    readers.check_root(config.root, places, where="data.root")
    photographs = (
        sample_photographs() if config.images is None else open_images(config.images, root=config.root)
    )
    base, notes = rendered(photographs, config, views=config.views)
    count = len(base)
    if config.distractors is not None:
        base, added = _with_distractors(base, photographs, config)
        notes += added
    instances, view = np.asarray(base.labels[:count]), np.asarray(base.table["view"])[:count]

    def draw(seed: int) -> dict[str, IntArray]:
        counts = held_groups(
            len(np.unique(instances)),
            config.test_instances,
            config.validation_instances,
            least=LEAST,
            kind="photographs",
            where=config.images,
            mend="add photographs, or ask for fewer by test_instances and validation_instances",
        )
        drawn = draw_groups(instances, counts, seed)
        roles = {"train": drawn[REST]}
        for part, prefix in (("test", ""), ("validation", "validation_")):
            rows = drawn.get(part, np.zeros(0, np.int64))
            roles[f"{prefix}queries"] = rows[view[rows] < config.queries]
            roles[f"{prefix}database"] = rows[view[rows] >= config.queries]
        roles["database"] = np.concatenate([roles["database"], np.arange(count, len(base))])
        return roles

    fields = {"views", "queries", "test_instances", "validation_instances"}
    origin = {"benchmark": config.name, **config.model_dump(include=fields)}
    split, said = load_or_draw(splits, base, draw, seed=seed, origin=origin)
    tables = tables_of(base, split.roles, "views")
    notes += [*said, _in_words(config, split.roles)]
    benchmark = from_tables("views", tables, notes=notes)
    benchmark.check()
    return benchmark


def rendered(photographs: ImageTable, config: ViewsConfig, *, views: int) -> tuple[ImageTable, list[str]]:
    """The views of photographs, from the cache or else rendered into it, and notes for the record.

    Args:
        photographs: their ids name the views: `ID#0`, `ID#1`, …
        config: how to render, and where the cache is.
        views: how many of each.

    Returns:
        The views with the photograph's number for a label, photograph after photograph. Those that cannot be
        decoded have none, and are noted.

    Raises:
        DataError: if no photograph can be decoded, or a store does not answer.
        ArtefactError: if the cached file is damaged.
    """
    folder = Folder(location.expand(config.cache))
    asked = config.model_dump(include={"size", "seed", "geometry", "photometry"}, mode="json")
    key = fingerprint({"version": _VERSION, "views": views, **asked, "images": _content(photographs)})
    file, description = f"views-{key}.arrow", f"views-{key}.json"
    if not folder.exists(description):
        errors = _render_all(photographs, config, views, folder, file)
        body = {"views": views, **asked, "file": file_entry(folder, file), "errors": errors}
        write_description(folder, description, kind=_KIND, version=_VERSION, body=body)
    body = read_description(folder, description, kind=_KIND, version=_VERSION)
    check_file(folder, body["file"], content=False)
    table = readers.read_arrow([folder.uri_of(file)]).table
    names = pc.unique(table["photograph"])
    table = table.set_column(
        table.column_names.index("label"), "label", pc.index_in(table["photograph"], names).cast(pa.int64())
    )
    return ImageTable(table, name="views", class_names=names.to_pylist()), _lost(body["errors"], photographs)


def sample_photographs() -> ImageTable:
    """The 20 sample pictures that ship with scikit-learn and scikit-image; ids are the names of the files.

    Raises:
        DataError: if scikit-image is not installed, or ships without one of them.
    """
    names, data = [], []
    for package, files in _SAMPLES.items():
        try:
            data += [resources.files(package).joinpath(name).read_bytes() for name in files]
        except (ImportError, OSError) as error:
            raise DataError(
                f"the sample pictures are not here: {error}",
                where="data.images=null",
                mend="pip install 'ray_retrieval[samples]', or give photographs of your own as data.images",
            ) from None
        names += files
    images = pa.StructArray.from_arrays(
        [pa.array(data, pa.large_binary()), pa.nulls(len(data), pa.string())], fields=list(IMAGE_TYPE)
    )
    return ImageTable(pa.table({"id": names, "image": images}), name="sample pictures")


def _with_distractors(
    base: ImageTable, photographs: ImageTable, config: ViewsConfig
) -> tuple[ImageTable, list[str]]:
    """The views, and behind them one view of each distractor, an instance of its own."""
    assert config.distractors is not None
    further = open_images(config.distractors, root=config.root)
    same = overlap(further, photographs)
    if len(same):
        raise DataError(
            f"{len(same)} distractors are among the photographs, the first is '{further.ids[int(same[0])]}'",
            where=further.name,
            mend="leave them out: they would count as wrong where they are right",
        )
    table, notes = rendered(_prefixed(further), config, views=1)
    names = [*(base.class_names or []), *(table.class_names or [])]
    joined = concatenate([base.with_classes(names), table.with_classes(names)], name="views")
    return joined, [*notes, f"{len(table):,} distractors are in the test database"]


def _prefixed(table: ImageTable) -> ImageTable:
    """The same images under ids that no photograph has."""
    ids = pa.array([f"distractor/{name}" for name in table.ids])
    images = table.table["image"]
    return ImageTable(pa.table({"id": ids, "image": images}), name=table.name)


def _in_words(config: ViewsConfig, roles: dict[str, IntArray]) -> str:
    counts = [
        len(roles["train"]) // config.views,
        len(roles["validation_queries"]) // config.queries,
        len(roles["queries"]) // config.queries,
    ]
    train, validation, test = (f"{count:,}" for count in counts)
    return (
        f"{config.views} synthetic views of each photograph: {train} photographs to learn from, {validation} "
        f"to validate on, {test} to test on"
    )


def _lost(errors: list[dict[str, str]], photographs: ImageTable) -> list[str]:
    if not errors:
        return []
    return [
        f"{len(errors)} of {len(photographs)} photographs cannot be decoded and have no views, the first is "
        f"'{errors[0]['id']}': {errors[0]['reason']}"
    ]


def _content(photographs: ImageTable) -> list[Any]:
    """What stands for the photographs in the name of the cached file: another one is rendered anew."""
    paths = [path for path in photographs.paths if path is not None and not is_uri(path)]
    found = [os.stat(path) for path in paths if os.path.exists(path)]
    return [photographs.fingerprint, [[stat.st_size, stat.st_mtime_ns] for stat in found]]


def _render_all(
    photographs: ImageTable, config: ViewsConfig, views: int, folder: Folder, file: str
) -> list[dict[str, str]]:
    """Write the views of all photographs; {"id", "reason"} of those that cannot be decoded."""
    errors: list[dict[str, str]] = []
    with folder.writing(file) as stream, pa.ipc.new_file(stream, _SCHEMA) as writer:
        for rows in _rendering(photographs, config, views):
            errors += [row for row in rows if "reason" in row]
            batch = [row for row in rows if "reason" not in row]
            if batch:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=_SCHEMA))
        if len(errors) == len(photographs):
            first = errors[0]
            raise DataError(
                f"no photograph can be decoded, the first is '{first['id']}': {first['reason']}",
                where=photographs.name,
            )
    return errors


def _rendering(photographs: ImageTable, config: ViewsConfig, views: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of some photographs after another: of each its views, or why there are none."""

    def work(row: int) -> list[dict[str, Any]]:
        name = photographs.ids[row]
        try:
            picture = decode(photographs.image_bytes(row))
        except StoreError:
            raise
        except DataError as error:
            return [{"id": name, "reason": error.problem}]
        found = render(
            picture,
            name,
            views=views,
            size=config.size,
            seed=config.seed,
            geometry=config.geometry,
            photometry=config.photometry,
        )
        return [
            {
                "id": f"{name}#{number}",
                "image": {"bytes": view.data, "path": None},
                "photograph": name,
                "view": number,
                "homography": view.homography.ravel().tolist(),
            }
            for number, view in enumerate(found)
        ]

    with ThreadPoolExecutor(cores(), thread_name_prefix="render") as pool:
        for start in range(0, len(photographs), _AT_ONCE):
            rows = range(start, min(start + _AT_ONCE, len(photographs)))
            yield [row for found in pool.map(work, rows) for row in found]
