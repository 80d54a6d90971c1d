"""What every node of a cluster has to see: where results go, and images that are files."""

import os
import socket
from collections.abc import Iterable

from ray_retrieval.errors import RecipeError


def require_seen(files: Iterable[str]) -> None:
    """Look in a process of some node whether it sees what the driver does.

    Args:
        files: paths of local files that are there on the driver's node.

    Raises:
        RecipeError: naming the folder of the first that is not there on this one. What a node writes for
            itself alone is lost, and images that it does not see would count as broken ones.
    """
    for file in files:
        if not os.path.exists(file):
            raise RecipeError(
                f"the node {socket.gethostname()} does not see in this folder what the driver's node does",
                where=os.path.dirname(file),
                mend="use a URI (s3://…) or a path that all nodes share",
            )
