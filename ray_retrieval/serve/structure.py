"""Of how many pieces an image file is made, told without decoding it.

Decoders walk through chunks, segments and blocks one at a time, some of them in time that grows with the
square of their number: a file of a few megabytes made of empty pieces would keep one busy for minutes.
"""

MOST_PIECES = 10_000
"""Real files have some hundreds: a PNG of 50 megapixels in chunks of 64 KiB has 2,000."""

_PNG, _JPEG, _GIF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", (b"GIF87a", b"GIF89a")
_GIF_IMAGE, _GIF_EXTENSION = 0x2C, 0x21
_SCAN, _END = 0xDA, 0xD9  # JPEG: where the pixels begin, and the end


def has_too_many_pieces(data: bytes) -> bool:
    """Whether a PNG, JPEG or GIF file has more than `MOST_PIECES` pieces before, or besides, its pixels."""
    if data.startswith(_PNG):
        return _png_chunks(data) > MOST_PIECES
    if data.startswith(_JPEG):
        return _jpeg_segments(data) > MOST_PIECES
    return data.startswith(_GIF) and _gif_blocks(data) > MOST_PIECES


def _png_chunks(data: bytes) -> int:
    place, count = len(_PNG), 0
    while place + 12 <= len(data) and count <= MOST_PIECES:
        place += 12 + int.from_bytes(data[place : place + 4], "big")
        count += 1
    return count


def _jpeg_segments(data: bytes) -> int:
    """Those before the first scan; a byte that belongs to none counts as one, for decoders skip it alone."""
    place, count = len(_JPEG), 0
    while place + 4 <= len(data) and count <= MOST_PIECES:
        count += 1
        if data[place] != 0xFF or data[place + 1] in (0x00, 0xFF):
            place += 1
        elif data[place + 1] in (_SCAN, _END):
            break
        elif 0xD0 <= data[place + 1] <= 0xD8 or data[place + 1] == 0x01:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return count


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
