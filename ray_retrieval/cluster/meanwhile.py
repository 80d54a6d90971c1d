"""What is otherwise while a block runs, and then as it was: loggers' levels and environment variables."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def quiet(*names: str, below: int) -> Iterator[None]:
    """Have loggers leave out what is below a level, and what they leave out already.

    Args:
        names: of the loggers.
        below: a level of `logging`; what is of this level is still said.
    """
    former = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in former:
        logger.setLevel(max(logger.getEffectiveLevel(), below))
    try:
        yield
    finally:
        for logger, level in former.items():
            logger.setLevel(level)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process."""
    former = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
