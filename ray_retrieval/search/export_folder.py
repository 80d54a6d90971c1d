"""The folder of an export: what may be replaced there, and what must not be touched."""

from ray_retrieval.errors import ArtefactError
from ray_retrieval.search.export_files import EXPORT, KIND, VERSION, files_named, read_export
from ray_retrieval.search.export_tables import LANCE
from ray_retrieval.search.manifest import CURRENT
from ray_retrieval.storage import Folder, meant_by, write_description

UNFINISHED = "export.unfinished.json"
"""Lists the files of an export that is being written; it is deleted at the end."""


def make_room(folder: Folder, names: list[str]) -> None:
    """Delete the files of another export, and write down those that will come.

    Args:
        folder: of the export.
        names: of the files that will be written there.

    Raises:
        ArtefactError: if the folder holds an index, or files of these names that no export wrote, or what
            another export says of itself is damaged.
    """
    if folder.exists(CURRENT):
        raise ArtefactError("an index lies here", where=folder, mend="export into a folder of its own")
    own = {name for about in (EXPORT, UNFINISHED) for name in _listed(folder, about)}
    foreign = sorted(name for name in set(names) - own if folder.exists(name))
    if foreign:
        raise ArtefactError(
            "the file is there already, and no export has written it",
            where=folder.uri_of(foreign[0]),
            mend="export into a folder of its own",
        )
    _sweep(folder, {*own, EXPORT, UNFINISHED})
    entries = [{"file": name} for name in sorted({*own, *names})]
    write_description(folder, UNFINISHED, kind=KIND, version=VERSION, body={"files": entries})
    for name in (EXPORT, *sorted(own)):
        folder.remove(name)


def _listed(folder: Folder, about: str) -> list[str]:
    """Names of what the file that describes an export lists."""
    if not folder.exists(about):
        return []
    said = read_export(folder, about)
    return [*files_named(said), *([LANCE] if said.get("content") == "lance" else [])]


def _sweep(folder: Folder, own: set[str]) -> None:
    """Delete what a killed export left behind of its files; other temporary ones are somebody else's."""
    for name in (entry.base_name for entry in folder.entries()):
        if meant_by(name) in own:
            folder.remove(name)
