"""The index artefact: descriptors of a database in shards, and what is known of each row.

    CURRENT · manifest-000001.json      see `manifest.py`
    shards/<fingerprint>/…              see `shard.py`
    approximate/<fingerprint>/…         see `approximate.py`; missing where the search is exact
    local/<fingerprint>/…               see `shortlist.py`, of local features

A row is a number from 0, in the order of the embeddings. Hits are sorted by (distance, row), so an index
of codes or vectors that is searched exactly gives the same hits, bit for bit, however many shards and threads
it has; hits of groups of its shards, merged, are again the same. `building.build` makes one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs

from ray_retrieval.descriptors import Descriptors, Form, Local, Vectors, assembled, concatenate
from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.search.approximate import ApproximateSegment, Effort, search_approximate
from ray_retrieval.search.hits import NO_ROW, Hits
from ray_retrieval.search.manifest import CURRENT, Manifest, SelfTest, read_current
from ray_retrieval.search.segments import search_segments
from ray_retrieval.search.shard import Shard
from ray_retrieval.search.shortlist import ShortlistSearch
from ray_retrieval.search.vectors import VectorSegment
from ray_retrieval.storage import Folder, byte_range, check_file, store_at

_LOCAL = fs.LocalFileSystem()
_SAME_SCORE = 1e-4


class Index:
    """One version of an index, opened for searching. Make one with `Index.open`.

    Attributes:
        folder: the index's folder.
        manifest: of the version.
        rows: number of rows that a search can find: those of the opened shards.
        shortlist: the search of local features; None of other kinds.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        shards: list[Shard],
        threads: int,
        approximate: list[ApproximateSegment],
        shortlist: ShortlistSearch | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shortlist, self._approximate = shortlist, approximate
        self.rows = sum(shard.entry.rows for shard in shards)
        self._shards = shards
        self._threads = threads
        self._first_rows = np.array([shard.entry.first_row for shard in shards], np.int64)
        self._sizes = np.array([shard.entry.rows for shard in shards], np.int64)

    @classmethod
    def open(
        cls,
        uri: "str | Path | Folder",
        *,
        shards: Sequence[int] | None = None,
        threads: int = 1,
        check: Literal["size", "content"] = "size",
        model: str | None = None,
    ) -> "Index":
        """The current version of an index; its files are mapped into memory, not read.

        Args:
            uri: the index directory.
            shards: numbers of the shards to open; all unless given.
            threads: processor threads that a search may use.
            check: compare the files' sizes with the manifest, or their checksums as well, which reads all.
            model: fingerprint of the model that queries are encoded with.

        Raises:
            ArtefactError: if there is no index, a file is missing or damaged, a shard does not exist, or the
                index was made by another model.
        """
        folder = Folder(uri)
        manifest = read_current(folder)
        if model is not None and model != manifest.model:
            raise ArtefactError(
                f"the index was made by model {manifest.model}, the queries are of model {model}",
                where=folder,
                mend="use the model that made the index, or build an index with this one",
            )
        available = range(len(manifest.shards))
        chosen = available if shards is None else sorted(set(shards))
        unknown = [number for number in chosen if number not in available]
        if unknown or not chosen:
            asked = ", ".join(str(number) for number in unknown) or "none"
            raise ArtefactError(
                f"the index has shards 0 to {len(available) - 1}, asked for: {asked}", where=folder
            )
        opened = [
            Shard(folder, manifest.shards[number], manifest.form, content=check == "content")
            for number in chosen
        ]
        for number in chosen if manifest.files else ():
            check_file(folder, manifest.files[number].model_dump(), content=check == "content")
        approximate, shortlist = [], None
        if manifest.approximate is not None:
            for number, shard in zip(chosen, opened, strict=True):
                path = folder.local_path(manifest.approximate.files[number].file)
                assert isinstance(shard.segment, VectorSegment)
                approximate.append(ApproximateSegment(path, shard.segment))
        if manifest.local is not None:
            by_number = dict(zip(chosen, opened, strict=True))
            shortlist = ShortlistSearch.open(folder, manifest.local, by_number, manifest.shards)
        return cls(folder, manifest, opened, threads, approximate, shortlist)

    def __len__(self) -> int:
        return self.rows

    @property
    def version(self) -> int:
        """Number of the opened version; it grows with every change of the index."""
        return self.manifest.number

    @property
    def form(self) -> Form:
        """What it holds of an image."""
        return self.manifest.form

    @property
    def model(self) -> str:
        """Fingerprint of the model that made the index."""
        return self.manifest.model

    @property
    def class_names(self) -> list[str] | None:
        return None if self.manifest.class_names is None else list(self.manifest.class_names)

    def search(
        self, queries: Descriptors, k: int, *, exact: bool = False, effort: Effort | None = None
    ) -> Hits:
        """The `k` nearest rows of the opened shards for each query, sorted by (distance, row).

        Distances of codes and vectors are exact in any case. An index that was built for an approximate
        search may miss a near row; how often is in `info`. Of local features the hits are the shortlist that
        the index was built for, see `shortlist.ShortlistSearch.search`: images that have nothing in common
        with a query are no hits.

        Args:
            queries: descriptors of the index's form.
            k: hits per query; where there are fewer, `NO_ROW` fills the places after the last.
            exact: look at every row, or feature, of an index that was built for an approximate search.
            effort: how hard an approximate search looks; default what the index was built with.

        Raises:
            ArtefactError: if the queries are of another form than the index.
            QueryError: if `k` < 1.
        """
        if Form.of(queries) != self.form:
            raise ArtefactError(
                f"the index holds {self.form}, the queries are {Form.of(queries)}",
                where=self.folder,
                mend="encode the queries with the model that made the index",
            )
        if self.shortlist is not None:
            assert isinstance(queries, Local)
            return self.shortlist.search(queries, k, exact=exact, effort=effort, threads=self._threads)
        built = self.manifest.approximate
        if built is None or exact:
            segments = [shard.segment for shard in self._shards]
            return search_segments(segments, queries, k, threads=self._threads)
        effort = effort or built.effort
        assert isinstance(queries, Vectors)
        return search_approximate(self._approximate, queries.data, k, effort, threads=self._threads)

    def descriptors(self, rows: "npt.NDArray[np.int64] | Sequence[int] | None" = None) -> Descriptors:
        """The descriptors of some rows of the opened shards, in the order asked; all of them by default.

        Raises:
            QueryError: if a row is not in the opened shards.
        """
        if rows is None:
            return concatenate([shard.descriptors(np.arange(shard.entry.rows)) for shard in self._shards])
        wanted = np.asarray(rows, np.int64).reshape(-1)
        numbers, places = self._locate(wanted)
        here = ((number, np.flatnonzero(numbers == number)) for number in np.unique(numbers))
        parts = ((some, self._shards[number].descriptors(places[some])) for number, some in here)
        return assembled(self.form, len(wanted), parts)

    def vectors(self, rows: "npt.NDArray[np.int64] | None" = None) -> npt.NDArray[np.float32]:
        """As `descriptors`, of an index of vectors: float32 [n, dimension].

        Raises:
            ArtefactError: if it holds codes or local features.
        """
        found = self.descriptors(rows)
        if not isinstance(found, Vectors):
            raise ArtefactError(f"it holds {self.form}, vectors are asked for", where=self.folder)
        return found.data

    def records(self, rows: "npt.NDArray[np.int64] | Sequence[int]") -> pa.Table:
        """What is known of some rows: row, id, label, path and the images' further columns.

        Args:
            rows: numbers of rows of the opened shards, in any order; repeats are allowed.

        Returns:
            One row each, in the order asked.

        Raises:
            QueryError: if a row is not in the opened shards.
        """
        wanted = np.asarray(rows, np.int64).reshape(-1)
        numbers, places = self._locate(wanted)
        used = np.unique(numbers)
        batches = [self._shards[number].records.take(pa.array(places[numbers == number])) for number in used]
        found = pa.Table.from_batches(batches, schema=self._shards[0].records.schema)
        if len(used) < 2:
            return found
        # The rows now stand shard by shard; the inverse of that reordering brings them back.
        return found.take(pa.array(np.argsort(np.argsort(numbers, kind="stable"))))

    def row_of(self, identifier: str) -> int | None:
        """Number of the row with that id, or None; the first call sorts the ids."""
        for shard in self._shards:
            place = shard.place_of(identifier)
            if place is not None:
                return shard.entry.first_row + place
        return None

    def image_bytes(self, row: int) -> bytes:
        """The image file of a row, from the index or from where its path points.

        Raises:
            QueryError: if the row is not in the opened shards.
            ArtefactError: if the image is not in the index and its file cannot be read.
        """
        numbers, places = self._locate(np.array([row], np.int64))
        shard, place = self._shards[int(numbers[0])], int(places[0])
        held = shard.image(place)
        if held is not None:
            return held
        identifier, path = (shard.records[name][place].as_py() for name in ("id", "path"))
        if path is None:
            raise ArtefactError(
                f"it does not hold image '{identifier}'", where=self.folder, mend="build it with its images"
            )
        try:
            file, first, length = byte_range(path)
            filesystem, inner = store_at(file) if "://" in file else (_LOCAL, file)
            with filesystem.open_input_file(inner) as source:
                return bytes(source.read() if length is None else source.read_at(length, first))
        except (pa.ArrowException, OSError):
            raise ArtefactError(
                f"the file of image '{identifier}' cannot be read",
                where=path,
                mend="put it back where it was when the images were encoded",
            ) from None

    def verify(self) -> list[str]:
        """Read everything again and compare it with what was recorded.

        Returns:
            What was checked, one line each.

        Raises:
            ArtefactError: naming the first file that is missing, damaged or inconsistent.
        """
        current = read_current(self.folder)
        checks = [f"{CURRENT} names {current.name}, and its checksum agrees"]
        self._check_ranges()
        checks.append(
            f"{len(self.manifest.shards)} shards hold rows 0 to {self.manifest.rows - 1} without gaps"
        )
        for shard in self._shards:
            shard.check_files(content=True)
            shard.check_rows()
            files, size = len(shard.entry.files), shard.entry.bytes
            checks.append(f"{shard.entry.folder}: {files} files, {size:,} bytes, checksums agree")
        for entry in self.manifest.files:
            check_file(self.folder, entry.model_dump(), content=True)
            checks.append(f"{entry.file}: {entry.bytes:,} bytes, checksum agrees")
        if self.shortlist is not None and self.rows < self.manifest.rows:
            checks.append("test queries are left out: what is nearest is known only with all shards open")
            return checks
        for number, test in enumerate(self.manifest.self_test):
            agrees = self._finds_again if self.shortlist is None else self._makes_again
            if not agrees(test):
                raise ArtefactError(
                    f"test query {number} does not find what it found when the index was built",
                    where=f"{self.folder}/{self.manifest.name}",
                    mend="build the index anew",
                )
        checks.append(f"{len(self.manifest.self_test)} test queries find what they found when it was built")
        return checks

    def info(self) -> dict[str, Any]:
        """What the index is, as plain values."""
        manifest = self.manifest
        return {
            "folder": str(self.folder),
            "version": manifest.number,
            "parent": manifest.parent,
            **manifest.form.as_json(),
            "search": manifest.search,
            **({} if manifest.approximate is None else manifest.approximate.info()),
            **({} if manifest.local is None else manifest.local.info()),
            "rows": manifest.rows,
            **({} if manifest.local is None else self._features_in_all()),
            "shards": len(manifest.shards),
            "bytes": manifest.bytes,
            "columns": self._shards[0].records.schema.names,
            "classes": None if manifest.class_names is None else len(manifest.class_names),
            "model": manifest.model,
            "embeddings": manifest.embeddings,
        }

    def _locate(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        """The opened shard of each row, and the place in it."""
        numbers = np.searchsorted(self._first_rows, rows, side="right") - 1
        places = rows - self._first_rows[numbers]
        outside = (numbers < 0) | (places >= self._sizes[numbers])
        if outside.any():
            raise QueryError(f"no row {rows[outside][0]} in the opened shards", where=self.folder, status=404)
        return numbers, places

    def _check_ranges(self) -> None:
        expected = 0
        for entry in self.manifest.shards:
            if entry.first_row != expected:
                break
            expected += entry.rows
        if not expected == self.manifest.rows == self.manifest.next_row:
            raise ArtefactError(
                "damaged: its shards do not cover its rows", where=f"{self.folder}/{self.manifest.name}"
            )

    def _features_in_all(self) -> dict[str, Any]:
        features, rows = sum(shard.features for shard in self.manifest.shards), max(1, self.manifest.rows)
        return {
            "features": features,
            "features_per_image": features / rows,
            "bytes_per_image": self.manifest.bytes / rows,
        }

    def _finds_again(self, test: SelfTest) -> bool:
        """Whether the opened shards find the recorded hits that lie in them."""
        like = self.form.zeros(0).data
        query = np.frombuffer(bytes.fromhex(test.query), like.dtype).reshape(1, -1)
        found = self.search(self.form.with_rows(query), len(test.rows), exact=True)
        hits = [hit for hit in zip(found.distances[0], found.rows[0], strict=True) if hit[1] != NO_ROW]
        opened = [
            range(shard.entry.first_row, shard.entry.first_row + shard.entry.rows) for shard in self._shards
        ]
        recorded = list(zip(test.distances, test.rows, strict=True))
        expected = [hit for hit in recorded if any(hit[1] in rows for rows in opened)]
        # Some shards alone find more than their part of the hits; those come after the recorded ones.
        return hits[: len(expected)] == expected and not any(
            hit < recorded[-1] for hit in hits[len(expected) :]
        )

    def _makes_again(self, test: SelfTest) -> bool:
        """Whether a row's shortlist is the recorded one.

        Its scores come of matrix products, whose last digits differ between machines: so may the order of
        images with the same score.
        """
        found = self.search(self.descriptors([int(test.query)]), max(1, len(test.rows)))
        real = found.rows[0] != NO_ROW
        now = dict(zip(found.rows[0, real].tolist(), found.distances[0, real].tolist(), strict=True))
        then = dict(zip(test.rows, test.distances, strict=True))
        last = max(then.values(), default=0.0)  # Images that score as the last one may change places with it.
        return all(
            abs(then.get(row, last) - now.get(row, last)) <= _SAME_SCORE for row in now.keys() | then.keys()
        )
