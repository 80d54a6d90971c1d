"""Ray Data: images to embeddings.

The rows of a table are cut into parts. A pool of encoders, each with the model in memory, turns one part at
a time into one Parquet file, decoding beside the forward pass. A part that is already there and was made by
the same model from the same images is not made again, so a killed job goes on where it stood, and the
result does not depend on how many encoders there were or on who finished first. Only a part that lacks an
image which could not be decoded, and can be by now, is.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.data
from pydantic import Field

from ray_retrieval.cluster import fewer_or_more, hushed, reraise
from ray_retrieval.cluster.sharing import require_seen
from ray_retrieval.compute import keep_freed_memory
from ray_retrieval.config import Config, EngineName
from ray_retrieval.cores import cores
from ray_retrieval.data.source import check_images
from ray_retrieval.data.table import ImageTable
from ray_retrieval.descriptors import DescriptorKind, Form
from ray_retrieval.engines import Export, find_export
from ray_retrieval.errors import ClusterError, DataError
from ray_retrieval.lock import writing_alone
from ray_retrieval.model import Encoder
from ray_retrieval.model_folder import read_model_description
from ray_retrieval.search import embeddings
from ray_retrieval.storage import LOCK, Folder, byte_range, fingerprint, is_uri


class EncodeConfig(Config):
    """How images become descriptors."""

    workers: int | None = Field(default=None, ge=1)
    """Encoder processes; unset: one for each GPU, else as many as `threads` lets the processors hold."""
    threads: int | None = Field(default=None, ge=1)
    """Processor threads of one encoder; unset: 1 on small machines, 4 where there are 8 cores or more."""
    batch_size: int = Field(default=64, ge=1)
    """Images a forward pass."""
    rows_per_part: int | None = Field(default=None, ge=1)
    """Images a file; unset: a two-hundredth of the table, between 512 and 65,536; of sets of local features,
    which are a thousand times as large, 512."""
    engine: EngineName = "torch"
    """What computes the descriptors: the model itself, or an export of it on the processor; see `Encoder`."""
    keep_images: bool = True
    """Keep the bytes of images that came as bytes; images that are files are referred to by their paths."""


@dataclass
class EncodeJob:
    """One table to encode with one model into one folder."""

    model: Folder
    table: ImageTable
    out: Folder
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Descriptions of the finished parts, by their numbers."""
    export: Export | None = None
    """What computes the descriptors in the place of the model, once it has been found."""

    def key(self, config: EncodeConfig, model: str, first: int, rows: int) -> str:
        """What a finished part must have been made of to be kept."""
        engine = [] if self.export is None else [config.engine, self.export.checksum]
        return fingerprint([model, self.table.fingerprint, first, rows, config.keep_images, *engine])


def encode(
    jobs: list[EncodeJob],
    config: EncodeConfig,
    *,
    advance: Callable[[int, str], None] = lambda _count, _remark: None,
) -> int:
    """Encode every job's table on the connected Ray, in one pipeline.

    Args:
        jobs: what to encode; finished parts of an earlier run are kept.
        config: how.
        advance: called with the number of images done.

    Returns:
        How many images were encoded; those of parts that were there already do not count.

    Raises:
        ArtefactError: if the engine has no export of a model.
        RecipeError: if the engine's package is not installed, or a node does not see the folder that is
            written to, or the images.
        ClusterError: if encoders were lost for good, or no node has a processor.
        ConflictError: if another process writes to a job's folder.
        DataError: if no image of a table can be decoded, a column of one has a name that embeddings need, or
            a store does not answer.
    """
    with ExitStack() as alone:
        for job in jobs:
            alone.enter_context(writing_alone(job.out, "encode"))
        return encode_alone(jobs, config, advance)


def encode_alone(jobs: list[EncodeJob], config: EncodeConfig, advance: Callable[[int, str], None]) -> int:
    """As `encode`, for who holds the locks of the jobs' folders."""
    models = [read_model_description(job.model) for job in jobs]
    for job, (description, model) in zip(jobs, models, strict=True):
        embeddings.check_columns(job.table.column_names, Form.from_json(description), where=job.table.name)
        own = config.engine == "torch"
        job.export = None if own else find_export(job.model, model, config.engine)
    items: list[dict[str, Any]] = []
    for number, (job, (description, model)) in enumerate(zip(jobs, models, strict=True)):
        job.out.sweep()
        most = _rows_per_part(job.table, config, Form.from_json(description))
        for part, first in enumerate(range(0, len(job.table), most)):
            rows = min(most, len(job.table) - first)
            key = job.key(config, model, first, rows)
            finished = embeddings.finished_part(job.out, part, key)
            if finished is None or _mended(job.table, range(first, first + rows), finished["errors"]):
                items.append({"job": number, "part": part, "first": first, "rows": rows, "key": key})
            else:
                job.parts[part] = finished
                advance(rows, "")
    for result in _run(jobs, items, config) if items else []:
        entry = json.loads(result["entry"])
        jobs[result["job"]].parts[result["part"]] = entry
        advance(result["rows"], "")
    for job, (description, model) in zip(jobs, models, strict=True):
        _finish(job, description, model, config)
    return sum(item["rows"] for item in items)


def _mended(table: ImageTable, rows: range, errors: list[tuple[str, str]]) -> bool:
    """Whether one of the images of some rows that could not be decoded can be by now.

    Args:
        table: the images.
        rows: of a finished part.
        errors: id and reason of those that it lacks.
    """
    if not errors:
        return False
    lacking = {name for name, _ in errors}
    again = np.array([row for row in rows if table.ids[row] in lacking], np.int64)
    return len(check_images(table.take(again), threads=cores())) < len(again)


def _rows_per_part(table: ImageTable, config: EncodeConfig, form: Form) -> int:
    largest = 512 if form.kind is DescriptorKind.LOCAL else 65_536
    return config.rows_per_part or min(max(len(table) // 200, 512), largest)


def _run(
    jobs: list[EncodeJob], items: list[dict[str, Any]], config: EncodeConfig
) -> Iterator[dict[str, Any]]:
    """Encode the parts on a pool of actors, and give one result each as they come."""
    workers, threads, asked = _pool(config)
    workers = min(workers, len(items))
    slices = _share(jobs, items)
    # Ray Data's own error does not take along what it came from.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    work = [_Work(job.model.uri, job.out.uri, _to_see(job)) for job in jobs]
    results = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _PartEncoder,  # type: ignore[arg-type]
        fn_constructor_args=(work, slices, config, threads),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        **asked,  # type: ignore[arg-type]
    )
    try:
        with hushed():
            yield from results.iter_rows()
    except ray.exceptions.RayError as error:
        reraise(error, "encoding")


def _to_see(job: EncodeJob) -> tuple[str, ...]:
    """Local files that are there on this node: one in the folder of the job, and its first image."""
    files = [f"{job.out.path}/{LOCK}"] if job.out.is_local else []
    if len(job.table):
        image = job.table.take(np.arange(1)).table["image"][0].as_py()
        if image["bytes"] is None and image["path"] is not None and not is_uri(image["path"]):
            files.append(byte_range(image["path"])[0])
    return tuple(file for file in files if os.path.exists(file))


def _share(jobs: list[EncodeJob], items: list[dict[str, Any]]) -> dict[tuple[int, int], Any]:
    """The rows of every part in Ray's object store, so that a node fetches only what it encodes.

    Two models that encode the same table find the same copy.
    """
    shared: dict[tuple[int, int, int], Any] = {}
    slices = {}
    for item in items:
        table, first, rows = jobs[item["job"]].table, item["first"], item["rows"]
        place = (id(table), first, rows)
        if place not in shared:
            shared[place] = ray.put(table.take(np.arange(first, first + rows)))
        slices[item["job"], item["part"]] = shared[place]
    return slices


def _finish(job: EncodeJob, description: dict[str, Any], model: str, config: EncodeConfig) -> None:
    """Write what makes the job's folder a complete artefact."""
    parts = [job.parts[part] for part in sorted(job.parts)]
    if not any(part["rows"] for part in parts):
        first = parts[0]["errors"][0] if parts and parts[0]["errors"] else ("no image", "the table is empty")
        raise DataError(
            f"none of the {len(job.table)} images can be decoded (first: {first[0]}: {first[1]})",
            where=job.table.name,
        )
    embeddings.finish(
        job.out,
        model=model,
        engine=config.engine,
        export=None if job.export is None else job.export.checksum,
        form=Form.from_json(description),
        classes=job.table.classes,
        class_names=job.table.class_names,
        parts=parts,
        source=job.table.fingerprint,
    )


def _pool(config: EncodeConfig) -> tuple[int, int, dict[str, float]]:
    """Encoders, threads of each, and what each asks of Ray: never more than a node has.

    Raises:
        ClusterError: if no node has a processor.
    """
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [node for node in alive if node.get("CPU", 0) >= 1]
    if not nodes:
        raise ClusterError("no node of the cluster has a processor for an encoder", mend=fewer_or_more(0))
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if config.engine == "torch" else 0
    if gpus:
        workers = config.workers or gpus
        each = -(-workers // gpus)  # encoders that share one GPU
        processors = min(node["CPU"] / (node["GPU"] * each) for node in nodes if node.get("GPU"))
        threads = config.threads or max(1, int(processors))
        return workers, threads, {"num_gpus": 1 / each, "num_cpus": processors / 2}
    smallest = min(node["CPU"] for node in nodes)
    threads = config.threads or (4 if smallest >= 8 else 1)
    workers = config.workers or max(1, sum(int(node["CPU"]) // threads for node in nodes))
    on_one_node = -(-workers // len(nodes))
    # Together they leave one logical processor free: Ray needs it to feed the pool when a node is lost.
    asked = min(threads, smallest / on_one_node) - 1 / workers
    return workers, threads, {"num_cpus": max(0.01, asked)}


@dataclass(frozen=True)
class _Work:
    """The addresses of a job, and what a node has to see for it."""

    model: str
    out: str
    to_see: tuple[str, ...] = ()


class _PartEncoder:
    """An actor that encodes one part of a table at a time; models are loaded when first needed."""

    def __init__(
        self, work: list[_Work], slices: dict[tuple[int, int], Any], config: EncodeConfig, threads: int
    ) -> None:
        self._work, self._slices, self._config, self._threads = work, slices, config, threads
        self._seen: set[int] = set()
        self._encoders: dict[str, Encoder] = {}

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        work = self._work[item["job"]]
        if item["job"] not in self._seen:
            require_seen(work.to_see)
            self._seen.add(item["job"])
        table: ImageTable = ray.get(self._slices[item["job"], item["part"]])
        encoder = self._encoder(work.model)
        found, failures = encoder.encode_table(table)
        part = embeddings.part_table(
            table.table, found, first_row=item["first"], skip=failures, keep_images=self._config.keep_images
        )
        entry = embeddings.write_part(
            Folder(work.out),
            item["part"],
            part,
            key=item["key"],
            errors=[(table.ids[row], reason) for row, reason in sorted(failures.items())],
        )
        return {"job": item["job"], "part": item["part"], "rows": item["rows"], "entry": json.dumps(entry)}

    def _encoder(self, model: str) -> Encoder:
        if model not in self._encoders:
            for other in self._encoders.values():
                other.close()
            # One model at a time: a machine's memory holds as many encoders as it has cores.
            self._encoders = {
                model: Encoder(
                    model,
                    threads=self._threads,
                    batch_size=self._config.batch_size,
                    engine=self._config.engine,
                )
            }
            alone = {work.model for work in self._work} <= {model}
            if alone and self._encoders[model].one_size:
                keep_freed_memory()
        return self._encoders[model]
