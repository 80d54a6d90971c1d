"""Of how many pieces an image file is made, told without decoding it.

Decoders walk through chunks, segments and blocks one at a time, some of them in time that grows with the
square of their number: a file of a few megabytes made of empty pieces would keep one busy for minutes.
"""

import re

MOST_PIECES = 10_000
"""Real files have some hundreds: a PNG of 50 megapixels in chunks of 64 KiB has 2,000."""
MOST_SCANS = 100
"""Each scan of a progressive JPEG is a pass over all of its pixels; encoders write about ten."""

_PNG, _JPEG, _GIF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", (b"GIF87a", b"GIF89a")
_GIF_IMAGE, _GIF_EXTENSION = 0x2C, 0x21
_SCAN, _END = 0xDA, 0xD9  # JPEG: where pixels begin, and the end
_LONG = frozenset({*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE})
"""Markers of JPEG that a length follows; to decoders the others are single, or an error."""
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""What ends the pixels of a scan, whose own bytes of 255 are followed by 0 or a restart."""


def has_too_many_pieces(data: bytes) -> bool:
    """Whether a PNG, JPEG or GIF file has more than `MOST_PIECES` pieces before, or besides, its pixels.

    Of a JPEG it is also whether it has more than `MOST_SCANS` scans.
    """
    if data.startswith(_PNG):
        return _png_chunks(data) > MOST_PIECES
    if data.startswith(_JPEG):
        return _has_too_many_segments(data)
    return data.startswith(_GIF) and _gif_blocks(data) > MOST_PIECES


def _png_chunks(data: bytes) -> int:
    place, count = len(_PNG), 0
    while place + 12 <= len(data) and count <= MOST_PIECES:
        place += 12 + int.from_bytes(data[place : place + 4], "big")
        count += 1
    return count


def _has_too_many_segments(data: bytes) -> bool:
    """Up to the end of the image; a byte that belongs to none counts as one, for decoders skip it alone."""
    place, count, scans = len(_JPEG), 0, 0
    while place + 4 <= len(data) and count <= MOST_PIECES and scans <= MOST_SCANS:
        count += 1
        marker = data[place + 1] if data[place] == 0xFF else 0x00
        if marker in (0x00, 0xFF):
            place += 1
        elif marker == _END:
            break
        elif marker not in _LONG:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == _SCAN:
            scans += 1
            found = _NEXT_MARKER.search(data, place)
            place = len(data) if found is None else found.start()
    return count > MOST_PIECES or scans > MOST_SCANS


def _gif_blocks(data: bytes) -> int:
    """Sub-blocks of the extensions before the first picture."""
    place, count = 13, 0
    if len(data) > 10 and data[10] & 0x80:
        place += 3 * (2 << (data[10] & 7))
    while place + 2 <= len(data) and data[place] != _GIF_IMAGE and count <= MOST_PIECES:
        count += 1
        if data[place] != _GIF_EXTENSION:
            place += 1
            continue
        place += 2
        while place < len(data) and data[place] and count <= MOST_PIECES:
            place += 1 + data[place]
            count += 1
        place += 1
    return count
