"""Addresses of an index's images on the server.

The id stands in the query string: in a path, browsers would fold the `..` of an id that looks like one.
"""

from urllib.parse import quote


def index_address(index: str) -> str:
    """Of what is known of an index, and the beginning of all that follows."""
    return f"/v1/indexes/{quote(index, safe='')}"


def record_address(index: str, identifier: str) -> str:
    """Of what an index knows of one image."""
    return f"{index_address(index)}/image?id={quote(identifier, safe='')}"


def thumbnail_address(index: str, identifier: str) -> str:
    """Of a small copy of an image; `&size=` may follow."""
    return f"{index_address(index)}/thumbnail?id={quote(identifier, safe='')}"


def original_address(index: str, identifier: str) -> str:
    """Of an image as it was indexed."""
    return f"{index_address(index)}/original?id={quote(identifier, safe='')}"
