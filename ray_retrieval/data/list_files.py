"""Lists of images in text files: `path`, `path class` or `path 0 1 0 … 1`, an image a line."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_retrieval.data import location
from ray_retrieval.data.columns import lists_of_classes
from ray_retrieval.errors import DataError

_DIGITS = 18  # of a label: as many as every int64 holds


@dataclass(frozen=True)
class ListFile:
    """The lines of a list.

    Attributes:
        names: the paths as they stand there.
        label: int64, list<int64> or null, one a line.
        classes: the width of multi-hot labels; None for others.
    """

    names: list[str]
    label: pa.Array
    classes: int | None = None


def parse_list(file: str) -> ListFile:
    """A list's paths and labels, whether its images are there or not.

    A path may hold spaces as long as its last word is no number. Blank lines are skipped.

    Raises:
        DataError: if there is none; or naming the line, if it has more or fewer labels than the first one, or
            others than 0 and 1, or one of more than 18 digits.
    """
    numbered = [
        (number, line.strip())
        for number, line in enumerate(_text(file).splitlines(), 1)
        if line and not line.isspace()
    ]
    if not numbered:
        raise DataError("the list is empty", where=file)
    lines = [line for _, line in numbered]
    first = lines[0].split()
    count = 0
    while count < len(first) - 1 and _is_number(first[-1 - count]):
        count += 1
    names, values = _digits(lines, count) or _words(numbered, count, file)
    if count == 0:
        return ListFile(names, pa.nulls(len(names)))
    if count == 1:
        return ListFile(names, pa.array(values[:, 0]))
    wrong = np.flatnonzero((values > 1).any(axis=1))
    if len(wrong):
        raise DataError(
            f"line {numbered[wrong[0]][0]} has a label other than 0 and 1",
            where=file,
            mend="multi-hot labels are 0 or 1; a single class index stands alone behind the path",
        )
    return ListFile(names, lists_of_classes(values.astype(bool)), count)


def _digits(lines: list[str], count: int) -> tuple[list[str], npt.NDArray[np.int64]] | None:
    """Names and multi-hot labels of lines that end in ` 0 1 … 0`, at once; None if one does not."""
    width = 2 * count
    if count < 2 or min(map(len, lines)) <= width:
        return None
    tails = "".join([line[-width:] for line in lines])
    if not tails.isascii():
        return None
    tail = np.frombuffer(tails.encode(), np.uint8).reshape(-1, width)
    values = tail[:, 1::2].astype(np.int64) - ord("0")
    if (tail[:, ::2] != ord(" ")).any() or (values < 0).any() or (values > 1).any():
        return None
    names = [line[:-width] for line in lines]
    # A number before the labels is a label too many, or the end of a name: the slow way tells.
    return None if any(name[-1].isspace() or name[-1].isdigit() for name in names) else (names, values)


def _words(numbered: list[tuple[int, str]], count: int, file: str) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Names and labels word by word, int64 [n, count]."""
    names, tails = [], []
    for number, line in numbered:
        head, *tail = line.rsplit(None, count) if count else [line]
        complete = len(tail) == count and (count == 0 or _is_number("".join(tail)))
        words = head.split()
        if not complete or (len(words) > 1 and _is_number(words[-1])):
            raise DataError(
                f"line {number} has not the {count} labels that line {numbered[0][0]} has",
                where=file,
                mend="give every line a path, or a path and as many whole numbers from 0 as the others",
            )
        long = [word for word in tail if len(word) > _DIGITS]
        if long:
            raise DataError(
                f"line {number} has the label {long[0]}, of more than {_DIGITS} digits",
                where=file,
                mend="number the classes from 0",
            )
        names.append(head)
        tails.append(tail)
    return names, np.array(tails, dtype=np.int64).reshape(len(names), count)


def _text(file: str) -> str:
    with location.open_file(file) as source:
        data = bytes(source.read())
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not a text file in UTF-8: {error}", where=file, mend="save it in UTF-8") from None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
