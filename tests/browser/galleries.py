"""A backend of the HTTP layer that searches small galleries in this process: no model, no Ray, exact."""

import asyncio
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from gallery import Gallery, cut, opened

from ray_retrieval.errors import QueryError
from ray_retrieval.serve import answers
from ray_retrieval.serve.addresses import original_address, thumbnail_address
from ray_retrieval.serve.backend import (
    AnyExample,
    DescriptorExample,
    IdExample,
    ImageExample,
    NewImage,
    Original,
    SearchRequest,
)
from ray_retrieval.serve.thumbnails import Thumbnail, shrink


class Galleries:
    """Implements `Backend`. Tests set what goes wrong.

    Attributes:
        failure: raised by every search while it is set.
        lost: ids whose picture is gone.
        partial: what answers say they lack.
        gate: searches wait for it.
        searches: the requests that came.
    """

    def __init__(self, *galleries: Gallery) -> None:
        self.galleries = {gallery.name: gallery for gallery in galleries}
        self.failure: QueryError | None = None
        self.lost: set[str] = set()
        self.partial: answers.Partial | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.searches: list[SearchRequest] = []

    def _of(self, index: str | None) -> Gallery:
        if index is None:
            return next(iter(self.galleries.values()))
        if index not in self.galleries:
            raise QueryError(f"there is no index {index}", where="index", mend="see /v1/indexes", status=404)
        return self.galleries[index]

    def _row(self, gallery: Gallery, identifier: str) -> int:
        if identifier not in gallery.rows:
            raise QueryError(
                "no image of the index has that id", where=identifier, mend="choose another", status=404
            )
        return gallery.rows[identifier]

    def _descriptor(self, gallery: Gallery, example: AnyExample) -> npt.NDArray[np.float32]:
        if isinstance(example, DescriptorExample):
            return np.asarray(example.data, np.float32)
        if isinstance(example, IdExample):
            row = self._row(gallery, example.id)
            if example.box is None:
                return gallery.described[row]
            return gallery.encode(cut(opened(gallery.files[row]), example.box))
        return gallery.encode(cut(opened(example.data), example.box))

    def _seen(self, gallery: Gallery, example: AnyExample) -> npt.NDArray[np.float64]:
        row = (
            self._row(gallery, example.id)
            if isinstance(example, IdExample)
            else gallery.files.index(example.data)
            if isinstance(example, ImageExample) and example.data in gallery.files
            else None
        )
        if row is None:
            return np.full_like(gallery.points[0], np.nan)
        points = gallery.points[row].copy()
        if not isinstance(example, DescriptorExample) and example.box is not None:
            left, top, right, bottom = example.box
            x, y = points.T
            points[~((x >= left) & (x < right) & (y >= top) & (y < bottom))] = np.nan
        return points

    async def search(self, request: SearchRequest, *, deadline: float) -> answers.SearchAnswer:
        self.searches.append(request)
        started = time.perf_counter()
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        if self.failure is not None:
            raise self.failure
        gallery = self._of(request.index)
        query = np.mean([self._descriptor(gallery, example) for example in request.examples], axis=0)
        rerank = request.rerank or ("expansion" if gallery.kind == "vectors" else "none")
        if rerank == "expansion":
            first = np.argsort(-gallery.described @ query, kind="stable")[:5]
            query = query + gallery.described[first].mean(0)
            query = query / np.linalg.norm(query)
        distances: npt.NDArray[Any]
        if gallery.kind == "codes":
            distances = ((gallery.described > 0) != (query > 0)).sum(1)
        else:
            distances = np.round(2 - 2 * gallery.described @ query, 6)
        inliers = None
        if gallery.kind == "local":
            seen = self._seen(gallery, request.examples[0])
            inliers = np.array([self._shared(seen, points).sum() for points in gallery.points])
            distances = -np.clip(1 - distances / 4, 0, 0.999)
            if rerank == "verification":
                inliers[inliers < 5] = 0
            else:
                inliers = None
        passing = gallery.mask(request.where)
        order = np.argsort(distances if inliers is None else distances - inliers, kind="stable")
        order = order[passing[order]][: request.k]
        hits = [
            self._hit(gallery, request, rank, int(row), distances[row], query, inliers, rerank)
            for rank, row in enumerate(order, 1)
        ]
        notes = []
        if not passing.any():
            notes.append("no row of the index passes the filter")
        if inliers is not None and hits and not hits[0].inliers:
            notes.append("no image shows the same scene: the order is that of the shortlist")
        total = 1000 * (time.perf_counter() - started)
        return answers.SearchAnswer(
            query=answers.Query(
                examples=[self._example(gallery, example) for example in request.examples],
                combine=request.combine,
                k=request.k,
                where=request.where,
                rerank=rerank,
            ),
            hits=hits,
            index=answers.Served(name=gallery.name, version=gallery.version, model=gallery.model),
            partial=self.partial,
            notes=notes,
            timings_ms={
                "decode": 0.4, "encode": 6.1, "search": 0.7, "merge": 0.1, "rerank": 0.2, "records": 0.3,
                "total": max(total, 7.8),
            },
        )  # fmt: skip

    @staticmethod
    def _shared(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        if first.shape != second.shape:
            return np.zeros(len(first), bool)
        # Points of different scenes have nothing to do with one another: their numbers do not meet.
        return ~np.isnan(first[:, 0]) & ~np.isnan(second[:, 0])

    @staticmethod
    def _example(gallery: Gallery, example: AnyExample) -> answers.Example:
        if isinstance(example, IdExample):
            return answers.Example(kind="id", id=example.id, box=example.box)
        if isinstance(example, ImageExample):
            return answers.Example(
                kind="image",
                format=example.format,
                width=example.width,
                height=example.height,
                bytes=len(example.data),
                box=example.box,
            )
        return answers.Example(kind="descriptor")

    def _hit(
        self,
        gallery: Gallery,
        request: SearchRequest,
        rank: int,
        row: int,
        distance: Any,
        query: npt.NDArray[np.float32],
        inliers: npt.NDArray[Any] | None,
        rerank: str,
    ) -> answers.Hit:
        bits = gallery.size
        if gallery.kind == "codes":
            similarity = 1 - int(distance) / bits
            words = f"{distance} of {bits} bits differ" if distance else "the same code"
        elif gallery.kind == "vectors":
            similarity = 1 - float(distance) / 2
            words = f"cosine {similarity:.3f}"
        else:
            similarity = -float(distance)
            words = f"score {similarity:.2f}"
        if inliers is not None:
            words = f"{inliers[row]} inliers" if inliers[row] else "no match"
        return answers.Hit(
            rank=rank,
            distance=int(distance) if gallery.kind == "codes" else float(distance),
            similarity=similarity,
            in_words=words,
            score=None if rerank == "none" else float(distance),
            inliers=None if inliers is None else int(inliers[row]),
            why=self._why(gallery, request.examples[0], row, query, inliers) if request.why else None,
            **self._record(gallery, row).model_dump(),
        )

    def _why(
        self,
        gallery: Gallery,
        example: AnyExample,
        row: int,
        query: npt.NDArray[np.float32],
        inliers: npt.NDArray[Any] | None,
    ) -> answers.Why | None:
        if gallery.kind == "codes":
            ours, theirs = query > 0, gallery.described[row] > 0
            return answers.Why(
                bits=gallery.size,
                differing=[int(bit) for bit in np.flatnonzero(ours != theirs)],
                query_code=np.packbits(ours).tobytes().hex(),
                code=np.packbits(theirs).tobytes().hex(),
            )
        if inliers is None:
            return None
        seen, points = self._seen(gallery, example), gallery.points[row]
        shared = self._shared(seen, points)
        picture = opened(gallery.files[row])
        size = picture.size
        if isinstance(example, ImageExample):
            query_size = (example.width, example.height)
        else:
            assert isinstance(example, IdExample)
            query_size = opened(gallery.files[gallery.rows[example.id]]).size
        return answers.Why(
            query_points=[(float(x), float(y)) for x, y in seen[shared]],
            points=[(float(x), float(y)) for x, y in points[shared]],
            query_size=query_size,
            size=size,
        )

    def _record(self, gallery: Gallery, row: int) -> answers.Record:
        identifier = gallery.ids[row]
        label = gallery.labels[row]
        return answers.Record(
            id=identifier,
            row=row,
            label=label,
            class_name=gallery.class_names[label],
            columns={name: values[row] for name, values in gallery.columns.items()},
            path=identifier.rsplit("/", 1)[-1],
            image=thumbnail_address(gallery.name, identifier),
            original=original_address(gallery.name, identifier),
        )

    async def embed(self, images: list[ImageExample], index: str | None, *, deadline: float) -> Any:
        raise NotImplementedError

    async def match(
        self,
        first: ImageExample | IdExample,
        second: ImageExample | IdExample,
        index: str | None,
        *,
        deadline: float,
    ) -> answers.MatchAnswer:
        gallery = self._of(index)
        if gallery.kind != "local":
            raise QueryError("the index holds no local features", where="index", mend="name another index")
        ours, theirs = self._seen(gallery, first), self._seen(gallery, second)
        shared = self._shared(ours, theirs)
        pictures = [
            opened(one.data if isinstance(one, ImageExample) else gallery.files[gallery.rows[one.id]])
            for one in (first, second)
        ]
        return answers.MatchAnswer(
            verdict="the same scene" if shared.sum() >= 5 else "no match found",
            same_scene=bool(shared.sum() >= 5),
            inliers=int(shared.sum()),
            putatives=int(shared.sum()) + 9,
            significance=3.2 * float(shared.sum()),
            sizes=(pictures[0].size, pictures[1].size),
            features=(44, 44),
            points=(
                [(float(x), float(y)) for x, y in ours[shared]],
                [(float(x), float(y)) for x, y in theirs[shared]],
            ),
            matrix=None,
            model=gallery.model,
        )

    async def match_picture(self, *_: Any, **__: Any) -> bytes:
        raise NotImplementedError

    async def add(
        self, images: list[NewImage], index: str | None, *, replace: bool, deadline: float
    ) -> answers.ChangeAnswer:
        raise QueryError("nothing may be added here", status=403)

    async def remove(
        self, ids: list[str] | None, where: str | None, index: str | None, *, deadline: float
    ) -> answers.ChangeAnswer:
        raise QueryError("nothing may be removed here", status=403)

    def describe(self) -> answers.IndexesAnswer:
        return answers.IndexesAnswer(
            indexes=[self._described(gallery) for gallery in self.galleries.values()],
            max_k=60,
            max_upload_bytes=60_000,
            max_pixels=10**7,
            max_examples=8,
            max_batch=16,
            formats=["JPEG", "PNG"],
            urls_from=[],
            needs_key=False,
        )

    @staticmethod
    def _described(gallery: Gallery) -> answers.IndexAnswer:
        rows, half = len(gallery.ids), len(gallery.ids) // 2
        rerankings = {
            "codes": [("none", "the order of the search", True)],
            "vectors": [
                ("none", "the order of the search", False),
                ("expansion", "query expansion: searched again by the mean of the five nearest", True),
            ],
            "local": [
                ("none", "the order of the shortlist", True),
                ("verification", "geometric verification of the first 100", False),
            ],
        }[gallery.kind]
        width = gallery.size if gallery.kind != "codes" else gallery.size // 8
        return answers.IndexAnswer(
            name=gallery.name,
            rows=rows,
            deleted=2,
            kind=gallery.kind,
            bits=gallery.size if gallery.kind == "codes" else None,
            dimension=None if gallery.kind == "codes" else gallery.size,
            metric={"codes": "hamming", "vectors": "squared euclidean", "local": "votes"}[gallery.kind],
            search="exact",
            version=gallery.version,
            versions=[
                answers.Version(number=3, operation="remove 2 rows", rows=rows),
                answers.Version(number=2, operation=f"add {half} rows", rows=rows + 2),
                answers.Version(number=1, operation="build", rows=rows - half + 2),
            ],
            model=gallery.model,
            shards=[
                {"rows": rows - half, "bytes": (rows - half) * width, "group": 0},
                {"rows": half, "bytes": half * width, "group": 1},
            ],
            shard_groups=2,
            memory={"mapped": float(rows * width), "private": 3.1e6, "per_row": float(width)},
            class_names=gallery.class_names,
            columns={"id": "string", "label": "int64"}
            | {
                name: "string" if isinstance(values[0], str) else "double"
                for name, values in gallery.columns.items()
            },
            rerankings=[
                answers.OfferedReranking(name=name, description=words, is_default=default)
                for name, words, default in rerankings
            ],
            writable=False,
            card=gallery.card,
        )

    async def record(self, identifier: str, index: str | None) -> answers.Record:
        gallery = self._of(index)
        return self._record(gallery, self._row(gallery, identifier))

    async def sample(
        self, count: int, seed: int | None, where: str | None, index: str | None
    ) -> answers.SampleAnswer:
        gallery = self._of(index)
        passing = np.flatnonzero(gallery.mask(where))
        seed = int(np.random.default_rng(seed).integers(2**31)) if seed is None else seed
        rows = np.random.default_rng(seed).permutation(passing)[:count]
        return answers.SampleAnswer(
            images=[self._record(gallery, int(row)) for row in rows],
            seed=seed,
            index=answers.Served(name=gallery.name, version=gallery.version, model=gallery.model),
        )

    async def map(self, index: str | None) -> answers.MapAnswer:
        gallery = self._of(index)
        centred = gallery.described - gallery.described.mean(0)
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        flat = centred @ axes[:2].T
        flat = (flat - flat.min(0)) / np.ptp(flat, axis=0)
        spots = []
        for row, (x, y) in enumerate(flat):
            record = self._record(gallery, row)
            spots.append(
                answers.Spot(
                    id=record.id, x=float(x), y=float(y), class_name=record.class_name, image=record.image
                )
            )
        return answers.MapAnswer(
            spots=spots,
            method="the first two principal components",
            index=answers.Served(name=gallery.name, version=gallery.version, model=gallery.model),
        )

    async def picture_tag(self, identifier: str, size: int | None, index: str | None) -> str:
        row = self._row(self._of(index), identifier)
        return f'"{identifier}"' if size is None else f'"{row}-{size}"'

    async def thumbnail(self, identifier: str, size: int, index: str | None) -> Thumbnail:
        gallery = self._of(index)
        row = self._row(gallery, identifier)
        if identifier in self.lost:
            raise QueryError("the image of that id cannot be read", status=404)
        return shrink(gallery.files[row], size, etag=f'"{row}-{size}"')

    async def original(self, identifier: str, index: str | None) -> Original:
        gallery = self._of(index)
        file = gallery.files[self._row(gallery, identifier)]
        if identifier in self.lost:
            raise QueryError("the image of that id cannot be read", status=404)
        media = "image/png" if file[:4] == b"\x89PNG" else "image/jpeg"
        return Original(file, media, f'"{identifier}"')

    async def check(self) -> answers.Health:
        return answers.Health(
            status="ok", versions={name: gallery.version for name, gallery in self.galleries.items()}
        )

    def metrics(self) -> bytes:
        return b""
