"""What each benchmark needs, where it comes from, what is there, and what its lists say."""

import difflib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_retrieval.config import Config
from ray_retrieval.data import datasets, location
from ray_retrieval.data.datasets import (
    AnyDataConfig,
    cars196,
    cifar10,
    coco,
    cub200,
    gldv2,
    imagenet100,
    inshop,
    landmarks,
    mirflickr,
    nuswide,
    sfm,
    sop,
    vehicleid,
    views,
    voc2012,
)
from ray_retrieval.data.datasets.disjoint import DisjointConfig
from ray_retrieval.data.datasets.lists import Listed, ListFilesConfig, ListsConfig, list_files, read_part
from ray_retrieval.data.labels import positive_pair_rate
from ray_retrieval.data.table import IntArray
from ray_retrieval.errors import DataError

_HASHNET = "github.com/thuml/HashNet, pytorch/data"
_DEEPHASH = "github.com/swuxyj/DeepHash-pytorch, data"


@dataclass(frozen=True)
class About:
    """What is known of a benchmark before any of its files is there.

    Attributes:
        name: of the benchmark, with its protocol.
        classes: number of classes; None where the images say it.
        k: cut-off of the mean average precision; None for the whole database.
        ks: cut-offs of recall that papers report; with `protocols`, of precision.
        protocols: of a benchmark with a ground truth, what its numbers are told apart by.
        counts: published numbers of images by part; None where there is none.
        images: where the images come from, and under which terms.
        lists: where the lists come from; None where none are needed.
        needs: files and folders under the root.
    """

    name: str
    classes: int | None
    k: int | None
    counts: dict[str, int | None]
    images: str
    lists: str | None = None
    needs: list[str] = field(default_factory=list)
    ks: tuple[int, ...] = ()
    protocols: tuple[str, ...] = ()


def about(config: AnyDataConfig) -> About:
    """What is known of the benchmark that a configuration describes."""
    if isinstance(config, coco.CocoConfig):
        counts = coco.COUNTS[config.protocol]
        return replace(_KNOWN["coco"], name=f"COCO 2014 ({config.protocol})", counts=counts)
    if isinstance(config, nuswide.NusWideConfig):
        source = f"{_HASHNET}/nuswide_81" if config.classes == 81 else f"{_DEEPHASH}/nuswide_21"
        title, counts = f"NUS-WIDE ({config.classes})", nuswide.COUNTS[config.classes]
        return replace(_KNOWN["nuswide"], name=title, classes=config.classes, counts=counts, lists=source)
    if isinstance(config, cifar10.Cifar10Config):
        counts = dict(cifar10.published(config))
        return replace(_KNOWN["cifar10"], name=f"CIFAR-10 ({config.protocol})", counts=counts)
    if isinstance(config, sfm.SfmConfig):
        published = sfm.COUNTS[config.variant].items()
        counts = {part: photographs for part, (photographs, _) in published}
        needs = config.needs() + ([] if config.test == "none" else landmarks.needs_of(config.test))
        return replace(_KNOWN["sfm"], name=config.variant, counts=counts, needs=needs)
    if isinstance(config, DisjointConfig):
        protocol = config.protocol
        counts = {part: sizes[0].images for part, sizes in protocol.counts.items()}
        title, needs = protocol.title, config.needs()
        return replace(_KNOWN[config.name], name=title, counts=counts, ks=protocol.ks, needs=needs)
    known = _KNOWN[config.name]
    return replace(known, needs=config.needs()) if isinstance(config, gldv2.Gldv2Config) else known


_KNOWN: dict[str, About] = {
    "digits": About("digits", 10, None, {}, "scikit-learn, installed with this package"),
    "images": About("images", None, None, {}, "your own, in folders, lists, CSV or Parquet"),
    "lists": About("lists", None, None, {}, "your own", "your own: path and labels on a line"),
    "cifar10": About(
        "CIFAR-10",
        10,
        None,
        {},
        "cs.toronto.edu/~kriz/cifar.html (download=true), or Parquet in the Hugging Face layout",
    ),
    "coco": About(
        "COCO 2014",
        80,
        5000,
        {},
        "cocodataset.org (train2014 13 GB, val2014 6 GB; photographs under Flickr's terms)",
        f"{_HASHNET}/coco; database.txt also follows from annotations/ (annotations_trainval2014)",
        ["train2014", "val2014"],
    ),
    "nuswide": About(
        "NUS-WIDE",
        81,
        5000,
        {},
        "lms.comp.nus.edu.sg (on request; copies lack some images: missing=drop leaves them out)",
    ),
    "imagenet100": About(
        "ImageNet-100",
        100,
        1000,
        imagenet100.COUNTS,
        "image-net.org, ILSVRC 2012 (account needed; for research)",
        f"{_HASHNET}/imagenet",
        ["train", "val"],
    ),
    "mirflickr": About(
        "MIRFlickr-25k",
        mirflickr.CLASSES,
        None,
        mirflickr.COUNTS,
        "press.liacs.nl/mirflickr, mirflickr25k (Creative Commons, by photograph)",
        f"{_DEEPHASH}/mirflickr; else drawn from mirflickr25k_annotations in annotations/",
        ["im1.jpg"],
    ),
    "voc2012": About(
        "PASCAL VOC 2012",
        len(voc2012.CLASS_NAMES),
        None,
        voc2012.COUNTS,
        "host.robots.ox.ac.uk/pascal/VOC/voc2012 (photographs under Flickr's terms)",
        f"{_DEEPHASH}/voc2012; else drawn from ImageSets/Main/",
        ["JPEGImages"],
    ),
    "sop": About(
        "Stanford Online Products",
        22_634,
        None,
        {},
        "cvgl.stanford.edu/projects/lifted_struct (photographs of eBay's sellers; for research)",
        "with the images: Ebay_train.txt and Ebay_test.txt, or train_list.txt and test_list.txt",
    ),
    "cub200": About(
        "CUB-200-2011",
        200,
        None,
        {},
        "vision.caltech.edu/datasets/cub_200_2011 (for non-commercial research and teaching)",
        "with the images",
    ),
    "cars196": About(
        "Cars196",
        196,
        None,
        {},
        "ai.stanford.edu/~jkrause/cars/car_dataset.html (at times out of reach; for non-commercial research)",
        "with the images: cars_annos.mat, or the development kit and cars_test_annos_withlabels.mat",
    ),
    "inshop": About(
        "In-shop Clothes",
        7_982,
        None,
        {},
        "mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html (on agreement; non-commercial)",
        "with the images",
    ),
    "vehicleid": About(
        "VehicleID",
        None,
        None,
        {},
        "pkuml.org/resources/pku-vehicleid.html (on request; for research)",
        "with the images",
    ),
    "views": About("views", None, None, {}, "your own; else those of scikit-learn and scikit-image"),
    "sfm": About(
        "retrieval-SfM",
        None,
        None,
        {},
        "cmp.felk.cvut.cz/cnnimageretrieval (retrieval-SfM-120k: download=true; photographs under Flickr's "
        "terms); GL18: kaggle.com/google/google-landmarks-dataset",
        "with the images; GL18: made by create_db_pickle.py of github.com/tonyngjichun/SOLAR",
    ),
    "gldv2": About(
        gldv2.TITLE,
        81_313,
        None,
        {},
        "github.com/cvdfoundation/google-landmark (`ray-retrieval gldv2 download`, 500 archives of 1 GB; "
        "photographs under the terms of Wikimedia Commons, by photograph), 1,580,470 of them clean",
        "made by `ray-retrieval gldv2 build` from train_clean.csv or train.csv, which are with the images",
    ),
    **{
        name: About(
            published.title,
            None,
            None,
            {"queries": published.queries, "database": published.database[0]},
            "robots.ox.ac.uk/~vgg/data, oxbuildings and parisbuildings, with faces blurred (download=true; "
            "under Flickr's terms); distractors: github.com/filipradenovic/revisitop, revisitop1m",
            "cmp.felk.cvut.cz/cnnimageretrieval, the ground truth (download=true)",
            landmarks.needs_of(name),
            landmarks.KS,
            ("easy", "medium", "hard") if published.protocol == "revisited" else ("classic",),
        )
        for name, published in landmarks.PUBLISHED.items()
    },
}


def survey(config: AnyDataConfig) -> dict[str, Any]:
    """What a benchmark needs, what is missing, and what its lists say, as plain values.

    The images need not be there; lists that are there are read whole.

    Returns:
        {"name", "classes", "k", "counts", "images", "lists", "needs", … (as `About`), "root", "files":
        [{"file", "found"}, …], "sampled": {"images": looked for, "missing": names}, "complete", "parts":
        facts of each part by `_facts`, "overlaps": [{"parts", "images"}, …]}; parts and overlaps of those
        whose list is there.

    Raises:
        DataError: if a list that is there is damaged.
    """
    known = about(config)
    root = str(getattr(config, _ROOTS.get(config.name, "root"), None) or "")
    files = [location.join(location.expand(root), name) for name in known.needs]
    listed: dict[str, Listed] = {}
    lists: dict[str, str] = {}
    if isinstance(config, ListFilesConfig):
        lists = list_files(config)
        listed = {part: read_part(file, config.root) for part, file in lists.items() if location.exists(file)}
    required = [*files, *_or_instead(config, list(lists.values()))]
    found = [{"file": file, "found": location.exists(file)} for file in required]
    if isinstance(config, cifar10.Cifar10Config):
        found = [{"file": location.expand(root), "found": cifar10.is_there(config.root)}]
    elif config.name in _ROOTS and root:
        found = [{"file": location.expand(root), "found": location.exists(location.expand(root))}]
    if isinstance(config, DisjointConfig):
        listed = _told(config)
    elif isinstance(config, sfm.SfmConfig):
        listed = sfm.listed(config) if location.exists(files[0]) else {}
    elif isinstance(config, gldv2.Gldv2Config):
        listed = gldv2.listed(config) if location.exists(files[0]) else {}
    elif isinstance(config, landmarks.LandmarksConfig):
        listed = landmarks.listed(config) if location.exists(files[0]) else {}
    elif isinstance(config, coco.CocoConfig) and {"train", "queries"} <= set(listed):
        listed = _derived(config, listed)
    elif not listed:
        listed = _annotated(config)
    sampled = _sampled(listed)
    absent = [name for name in sampled if not location.exists(location.join(location.expand(root), name))]
    return {
        **asdict(known),
        "root": root,
        "files": found,
        "sampled": {"images": len(sampled), "missing": absent},
        "complete": all(entry["found"] for entry in found) and not absent,
        "parts": {part: _facts(part_listed) for part, part_listed in listed.items()},
        "overlaps": _overlaps(listed),
    }


_ROOTS = {"images": "database", "views": "images"}
"""Of benchmarks of the user's own images, the option that says where these are."""


def _or_instead(config: AnyDataConfig, lists: list[str]) -> list[str]:
    """The list files, or those of the data set itself where they are there and stand for missing lists."""
    absent = [file for file in lists if not location.exists(file)]
    if isinstance(config, coco.CocoConfig) and absent == lists[-1:]:
        names = list(coco.ANNOTATIONS.values())
    elif isinstance(config, voc2012.Voc2012Config) and absent == lists:
        names = [f"ImageSets/Main/{name}_trainval.txt" for name in voc2012.CLASS_NAMES]
    elif isinstance(config, mirflickr.MirFlickrConfig) and absent == lists:
        names = ["annotations"]
    else:
        return lists
    instead = [location.join(location.expand(config.root), name) for name in names]
    there = all(location.exists(file) for file in instead)
    return [file for file in lists if file not in absent] + instead if there else lists


def _derived(config: coco.CocoConfig, listed: dict[str, Listed]) -> dict[str, Listed]:
    """The parts as the protocol has them, where the database is there or follows from what is there."""
    try:
        return coco.parts_of(config)
    except DataError:
        return {part: found for part, found in listed.items() if part != "database"}


def _annotated(config: AnyDataConfig) -> dict[str, Listed]:
    """All images by the data set's own annotations, where they stand for lists and are there."""
    try:
        if isinstance(config, voc2012.Voc2012Config):
            return {"all": voc2012.annotated(config.root)}
        if isinstance(config, mirflickr.MirFlickrConfig):
            return {"all": mirflickr.annotated(config.root)}
    except DataError:
        pass  # they are among the missing files
    return {}


def _told(config: DisjointConfig) -> dict[str, Listed]:
    """The parts of a class-disjoint benchmark, where all files that tell them are there."""
    return config.read().listed if all(map(location.exists, config.paths())) else {}


def _sampled(listed: dict[str, Listed]) -> list[str]:
    """The first, the middle and the last image of each list: looking for all of 100,000 takes long."""
    return sorted({found.names[row] for found in listed.values() for row in _spread(len(found.names))})


def _spread(rows: int) -> set[int]:
    return {0, rows // 2, rows - 1} if rows else set()


def _facts(listed: Listed) -> dict[str, Any]:
    """What one list says of its images and their labels."""
    labels = _labels(listed)
    none = int((~labels.any(axis=1)).sum()) if labels.ndim == 2 else 0
    rate = positive_pair_rate(labels)
    return {
        "images": len(listed.names),
        "duplicates": len(listed.names) - len(set(listed.names)),
        "classes": listed.classes or len(np.unique(labels)),
        "without_label": none,
        "labels_an_image": float(labels.sum() / max(1, len(labels))) if labels.ndim == 2 else 1.0,
        "positive_pair_rate": rate,
        "positive_weight": 1 / rate if rate else None,
    }


def _labels(listed: Listed) -> Any:
    if pa.types.is_null(listed.label.type):
        return np.zeros((len(listed.names), 1), np.bool_)
    if listed.classes is None:
        return np.asarray(pc.fill_null(listed.label, -1))
    hot = np.zeros((len(listed.names), listed.classes), np.bool_)
    lengths: IntArray = np.asarray(pc.list_value_length(listed.label))
    hot[np.repeat(np.arange(len(hot)), lengths), np.asarray(listed.label.flatten())] = True
    return hot


def _overlaps(listed: dict[str, Listed]) -> list[dict[str, Any]]:
    """Images that two parts share, for every two parts whose lists are there."""
    sets = {part: set(found.names) for part, found in listed.items()}
    pairs = [("queries", "database"), ("train", "database"), ("train", "queries")]
    return [{"parts": [a, b], "images": len(sets[a] & sets[b])} for a, b in pairs if a in sets and b in sets]


def every_config() -> list[AnyDataConfig]:
    """Every benchmark in every protocol, at its default place."""
    return [
        datasets.DigitsConfig(),
        *(cifar10.Cifar10Config(protocol=protocol) for protocol in ("I", "II", "disjoint")),
        *(coco.CocoConfig(protocol=protocol) for protocol in ("hashnet", "clean")),
        *(nuswide.NusWideConfig(classes=classes) for classes in (21, 81)),
        imagenet100.ImageNet100Config(),
        mirflickr.MirFlickrConfig(),
        voc2012.Voc2012Config(),
        sop.SopConfig(),
        cub200.Cub200Config(),
        cars196.Cars196Config(),
        inshop.InShopConfig(),
        *(vehicleid.VehicleIdConfig(size=size) for size in ("small", "medium", "large")),
        *(sfm.SfmConfig(variant=variant) for variant in ("retrieval-SfM-120k", "retrieval-SfM-30k", "gl18")),
        gldv2.Gldv2Config(),
        landmarks.Oxford5kConfig(),
        landmarks.Paris6kConfig(),
        landmarks.ROxford5kConfig(),
        landmarks.RParis6kConfig(),
        datasets.ImagesConfig(database="data/images"),
        views.ViewsConfig(),
        ListsConfig(),
    ]


VARIANTS = {
    "coco": "protocol",
    "nuswide": "classes",
    "cifar10": "protocol",
    "vehicleid": "size",
    "sfm": "variant",
}
"""The option that tells a benchmark's protocols apart: `coco-clean` is `coco` with `protocol=clean`."""


def kind_and_settings(name: str) -> tuple[type[Config], list[str]]:
    """The configuration class of a benchmark's name, and the settings that a variant in the name stands for.

    Raises:
        DataError: if there is no such benchmark.
    """
    base, dash, variant = name.partition("-")
    if base not in datasets.CONFIGS or (dash and base not in VARIANTS):
        near = difflib.get_close_matches(name, datasets.CONFIGS, n=1, cutoff=0.7)
        mend = f"did you mean '{near[0]}'?" if near else f"known are: {', '.join(datasets.CONFIGS)}"
        raise DataError(f"no benchmark is called '{name}'", where="datasets", mend=mend)
    return datasets.CONFIGS[base], [f"{VARIANTS[base]}={variant}"] if dash else []
