"""What whoever reads the hits of a search has to know beside them: why there are none, or no match."""

from ray_retrieval.descriptors import Descriptors, Local


def notes_on(queries: Descriptors, hits: int, first_inliers: int | None, *, filtered: bool) -> list[str]:
    """In words, or nothing where the hits speak for themselves.

    Args:
        queries: what was searched for together.
        hits: how many there are.
        first_inliers: of the first of them; None where it was not verified.
        filtered: whether a filter bounded which images may be hits.
    """
    if hits:
        nothing = first_inliers == 0
        return ["no match found: no image agrees with the query on where things are"] if nothing else []
    if not isinstance(queries, Local):
        # Codes and vectors are near or far, never without hits where there are rows to search.
        return ["no image of the index passes the filter" if filtered else "no image was searched"]
    if not queries.counts.any():
        return ["the model finds no features in the image"]
    passing = " passes the filter and" if filtered else ""
    return [f"no image of the index{passing} has features like those of the image"]
