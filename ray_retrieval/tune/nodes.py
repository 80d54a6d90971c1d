"""The nodes that trials train on."""

import time
from collections.abc import Callable

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_retrieval.errors import ClusterError
from ray_retrieval.storage import Folder
from ray_retrieval.tuning.ledger import STUDY
from ray_retrieval.tuning.plan import Resources

_LOOK_S = 5.0
"""Seconds between two looks at how large the cluster is."""


def for_work() -> dict[str, Resources]:
    """What the nodes of the connected cluster have that have processors for work, by their ids."""
    alive = (node for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["Resources"] for node in alive if node["Resources"].get("CPU")}


def alive(node: str) -> bool:
    """Whether a node is there, by its id."""
    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())  # type: ignore[no-untyped-call]


def require_shared(folder: Folder) -> None:
    """Raise ClusterError if trials on some node would not see the folder of the search."""
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in for_work() if node != here] if folder.is_local else []
    look = ray.remote(num_cpus=0, max_retries=0)(_sees)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(folder.uri)
        for node in others
    ]
    for node, seen in zip(others, asked, strict=True):
        if not _answer(seen):
            raise ClusterError(
                f"the node {node[:8]}… does not see the folder of the search",
                where=folder,
                mend="set output=… to a URI (s3://…) or to a path that all nodes share",
            )


def _sees(uri: str) -> bool:
    return Folder(uri).exists(STUDY)


def _answer(seen: "ray.ObjectRef[bool]") -> bool:
    try:
        return bool(ray.get(seen))
    except ray.exceptions.RayError:
        return True  # the node has gone meanwhile


class Lately:
    """What a function says of a cluster that grows and shrinks, asked anew every few seconds."""

    def __init__(self, ask: Callable[[], int]) -> None:
        self._ask, self._asked, self._answer = ask, float("-inf"), 0

    def __call__(self) -> int:
        now = time.monotonic()
        if now - self._asked > _LOOK_S:
            self._asked, self._answer = now, self._ask()
        return self._answer
