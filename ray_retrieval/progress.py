"""How long work shows itself: a bar with rate and time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int, str], None]


class Display:
    """Where a verb tells what it does.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        # Everything goes to stderr, so that results on stdout can be piped.
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """One line."""
        self.console.print(line, markup=False)

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        """Progress of `total` units; call the yielded function with how many more are done and a remark."""
        if total == 0:
            yield lambda _count, _remark: None
        elif self.console.is_terminal and not self.console.quiet:
            with self._bar() as bar:
                task = bar.add_task(name, total=total, unit=unit, remark="", rate="")
                started, done = time.monotonic(), 0

                def advance(count: int, remark: str) -> None:
                    nonlocal done
                    done += count
                    rate = _rate(done, time.monotonic() - started)
                    bar.update(task, advance=count, remark=remark, rate=rate)

                yield advance
        else:
            yield self._lines(name, total, unit)

    def _bar(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}"),
            console=self.console,
            transient=True,
        )

    def _lines(self, name: str, total: int, unit: str) -> Advance:
        started = reported = time.monotonic()
        done = 0

        def advance(count: int, remark: str) -> None:
            nonlocal done, reported
            done += count
            now = time.monotonic()
            if now - reported < 10 and done < total:
                return
            reported = now
            left = (total - done) * (now - started) / max(done, 1)
            parts = [f"{done:,}/{total:,} {unit}", _rate(done, now - started), f"{left:.0f} s left", remark]
            self.say(f"{name}: {' · '.join(part for part in parts if part)}")

        return advance


def _rate(done: int, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    return f"{rate:,.0f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.0f} s each"


def counted(advance: Advance) -> Callable[[int], None]:
    """Shows the progress of what tells how much of it is done so far, rather than how much more."""
    before = 0

    def progress(done: int) -> None:
        nonlocal before
        advance(done - before, "")
        before = done

    return progress


@contextmanager
def rows_written(name: str, rows: int) -> Iterator[Callable[[int], None]]:
    """Show progress of what counts the rows that are done so far.

    Args:
        name: of the work.
        rows: how many there are.
    """
    with Display().task(name, rows, "rows") as advance:
        yield counted(advance)
