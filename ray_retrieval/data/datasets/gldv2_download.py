"""Google Landmarks v2 from its publisher: metadata, and archives of about 1 GB with the images to train on.

    ROOT/train.csv, train_clean.csv, train_label_to_category.csv
    ROOT/train/0/1/2/0123456789abcdef.jpg
    ROOT/tars/images_000.tar, md5.images_000.txt, images_000.unpacked

An archive whose `.unpacked` is there is done with; what a killed call left goes on where it stopped. Calls
may run side by side: each waits for what another one is at.

Reference: github.com/cvdfoundation/google-landmark.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ray_retrieval.data.download import alone, download, telling, unpack
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.storage import Folder, is_uri

ADDRESS = "https://s3.amazonaws.com/google-landmark"
TARS = 500
"""Archives of the images to train on: 4,132,914 images."""
METADATA = ("train.csv", "train_clean.csv", "train_label_to_category.csv")
_MD5 = re.compile(r"[0-9a-f]{32}\b", re.IGNORECASE)


def parse_range(text: str) -> range:
    """`7` or `0-499` as numbers of archives, both ends included.

    Raises:
        RecipeError: if it is neither, or reaches beyond the last archive.
    """
    found = re.fullmatch(r"([0-9]{1,3})(?:-([0-9]{1,3}))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
    if not first <= last < TARS:
        raise RecipeError(
            f"a range of archives is expected, got '{text}'", where="tars", mend=f"say 0-{TARS - 1}, or 7"
        )
    return range(first, last + 1)


def fetch(
    root: str | Path,
    tars: Sequence[int] = (),
    *,
    remove_tars: bool = False,
    address: str = ADDRESS,
    say: Callable[[str], None] | None = None,
) -> None:
    """Fetch the metadata and some archives, compare these with their checksums, and unpack them.

    What is there stays as it is.

    Args:
        root: the local folder that everything goes into; `~` and environment variables are expanded.
        tars: numbers of the archives.
        remove_tars: remove each archive once all of it is unpacked.
        address: where the collection is.
        say: called with a line about each file now and then.

    Raises:
        ArtefactError: if the folder's variable is not set, see `Folder`.
        RecipeError: if the folder is given by a URI.
        DataError: if a file cannot be had or has another checksum, an archive is damaged or has a member
            that would leave the folder, or there is no space.
        StoreError: if the server does not answer.
    """
    place = Folder(root).uri
    if is_uri(place):
        raise RecipeError("archives are unpacked into a local folder", where=root, mend="give a path")
    folder = Path(place)
    for name in METADATA:
        download(f"{address}/metadata/{name}", folder / name, progress=say and telling(name, say), say=say)
    for number in tars:
        _fetch_tar(folder, f"images_{number:03d}", remove_tars, address, say)


def _fetch_tar(root: Path, name: str, remove: bool, address: str, say: Callable[[str], None] | None) -> None:
    tar, unpacked = root / "tars" / f"{name}.tar", root / "tars" / f"{name}.unpacked"
    tar.parent.mkdir(parents=True, exist_ok=True)
    with alone(unpacked, say):
        if not unpacked.exists():
            md5 = _published_md5(f"{address}/md5sum/train/md5.{name}.txt", tar.with_name(f"md5.{name}.txt"))
            download(f"{address}/train/{tar.name}", tar, md5=md5, progress=say and telling(tar.name, say))
            if say is not None:
                say(f"{tar.name}: unpacking into {root / 'train'}")
            # A killed call unpacks all of it again, over what it left.
            unpack(tar, root / "train")
            unpacked.touch()
        if remove:
            tar.unlink(missing_ok=True)


def _published_md5(url: str, file: Path) -> str:
    found = _MD5.search(download(url, file).read_text(errors="replace"))
    if found is None:
        raise DataError("no MD5 sum is in it", where=file, mend="remove it to fetch it anew")
    return found[0].lower()
