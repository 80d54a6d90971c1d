"""Headers that keep a browser from taking an answer for something else, and from keeping it."""

from starlette.datastructures import MutableHeaders

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
}


def guard(headers: MutableHeaders, *, keep: str, shared: bool = False) -> None:
    """Add them to an answer's own.

    Args:
        headers: of the answer.
        keep: its Cache-Control, unless it has one.
        shared: whether pages of elsewhere may show it.
    """
    headers.update(_HEADERS)
    headers["Cross-Origin-Resource-Policy"] = "cross-origin" if shared else "same-origin"
    headers.setdefault("Content-Security-Policy", _PAGE_POLICY)
    headers.setdefault("Cache-Control", keep)
