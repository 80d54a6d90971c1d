"""An index changed at random for a long time: rows added, replaced, removed, versions brought back, kills.

    python benchmarks/index_soak.py --minutes 30
    python benchmarks/index_soak.py --short         twenty seconds

After every step all rows, what is known of them, all files and their checksums, and the hits of searches with
and without filters are compared with a model in plain numpy. Indices of codes, of vectors, of vectors with an
approximate search and of local features take turns. The steps are those of `tests/search/soak_parts.py`,
which the tests run for seconds. It ends with the first difference, which Hypothesis makes as small as it can.
"""

import os
import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "search"))

from book import arguments, claim, measuring
from soak_parts import IndexSoak

_ROUND = 4  # machines between two looks at the clock
_REPORT_S = 60


def main() -> None:
    parser = arguments(__doc__, "twenty seconds")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=40, help="of one index")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    options = parser.parse_args()
    minutes = 0.3 if options.short else options.minutes
    with measuring(f"{minutes:g} minutes"):
        soak(minutes, options.steps, options.seed)


def soak(minutes: float, steps: int, first: int) -> None:
    """Change indices for so many minutes; ends with the first difference."""
    os.fsync = lambda _: None  # nothing of it has to survive a power cut
    how = settings(
        max_examples=_ROUND,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    began = reported = time.monotonic()
    rounds = 0
    while time.monotonic() - began < 60 * minutes:
        try:
            run_state_machine_as_test(seed(first + rounds)(IndexSoak), settings=how)
        except Exception:
            _claim(minutes, same=rounds, rounds=rounds + 1)
            raise
        rounds += 1
        if time.monotonic() - reported > _REPORT_S:
            reported = time.monotonic()
            print(f"{(reported - began) / 60:.0f} min: {_in_words()}", flush=True)
    taken = (time.monotonic() - began) / 60
    print(f"| {rounds * _ROUND} indices in {taken:.1f} min | no difference | {_in_words()} |")
    _claim(minutes, same=rounds, rounds=rounds)


def _claim(minutes: float, *, same: int, rounds: int) -> None:
    claim(
        f"an index changed at random for {minutes:g} minutes: share of the rounds without a difference",
        peer="a model in plain numpy",
        ratio=same / rounds,
        goal=">= 1",
        detail=f"{rounds} rounds of {_ROUND} indices, {_in_words()}",
        headline=True,
    )


def _in_words() -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in IndexSoak.counted.most_common())


if __name__ == "__main__":
    main()
