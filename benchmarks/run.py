"""Run the benchmarks one after another, and write what they claim into one table.

    python benchmarks/run.py                          short forms: 12 to 20 minutes on 2 cores
    python benchmarks/run.py --full                   long forms: one and a half to three hours
    python benchmarks/run.py --only mining xbm_step   these alone; other results are kept
    python benchmarks/run.py --resume                 those that are not done at this commit
    python benchmarks/run.py --list                   what there is, and how long it takes
    python benchmarks/run.py --readme                 nothing is run; README and RESULTS.md are written anew

Each script is a process of its own. One that cannot measure here, for want of a GPU or of a finished run, is
skipped, and says so. One that fails does not stop the others; its last lines are shown, and
the table says that it failed. After each, `results.json` and `RESULTS.md` are written whole; `--readme` puts
the headlines of the former into the README. It exits with 1 if a script failed, not if a goal is missed: the
table says which are reached. On a busy machine it runs all the same, and the table says that it was.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import book
import results
from results import Form, Results, Run

HERE = Path(__file__).parent
_LAST_LINES = 8
_SETTLING = 6  # times half a second, in which what a script has left behind may end
_ENDING_S = 10  # for a script that is told to end
_PATIENCE, _LEAST_PATIENCE_S = 10, 600  # times the minutes that are expected, and no fewer seconds


@dataclass(frozen=True)
class Script:
    """A benchmark.

    Attributes:
        name: of the file, without `.py`, and of its part where its parts are run one by one.
        short: minutes that the short form takes on two cores that nothing else uses.
        full: likewise of the full form.
        options: of the full form; the short one has `--short`.
    """

    name: str
    short: float
    full: float
    options: tuple[str, ...] = ()

    def minutes(self, form: Form) -> float:
        return self.short if form == "short" else self.full

    @property
    def file(self) -> str:
        """Its name alone, without `.py`."""
        return self.name.split()[0]

    def command(self, form: Form, folder: Path) -> list[str]:
        options = ("--short",) if form == "short" else self.options
        return [sys.executable, str(folder / f"{self.file}.py"), *self.name.split()[1:], *options]


SCRIPTS = (
    Script("hamming_map", 0.5, 1),
    Script("search codes", 0.7, 4),
    Script("search billion-codes", 0, 5),
    Script("search approximate-codes", 0.5, 6),
    Script("search vectors", 0.5, 6),
    Script("search approximate-vectors", 0.5, 17, ("--dimensions", "128")),
    Script("build", 1.1, 4),
    Script("local_search", 0.7, 5),
    Script("geometric_verification", 0.3, 1),
    Script("train_step", 0.8, 20),
    Script("train_overhead", 1, 6),
    Script("xbm_step", 0.5, 5.5),
    Script("encode_throughput", 1, 3),
    Script("memory", 1.5, 9),
    Script("retrieval_metrics", 1, 4),
    Script("revisited_eval", 0.5, 2),
    Script("mining", 0.1, 1.5),
    Script("pyramid", 0.4, 14, ("--rounds", "1")),
    Script("export_engines", 1, 9),
    Script("serving", 2.2, 11),
    Script("serving_faults", 2, 12),
    Script("scaling", 1.6, 10),
    Script("index_soak", 0.4, 10, ("--minutes", "10")),
    Script("delf_selection", 0.2, 6),
    Script("gpu", 0.1, 8),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the long forms")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="of scripts, without .py, or of a part: 'search codes'"
    )
    parser.add_argument("--resume", action="store_true", help="leave out those that are done at this commit")
    parser.add_argument("--list", action="store_true", help="run nothing, show what there is")
    parser.add_argument("--readme", action="store_true", help="run nothing, write the tables anew")
    options = parser.parse_args()
    if options.readme:
        write_tables(HERE.parent / "README.md", HERE)
        return 0
    form: Form = "full" if options.full else "short"
    unknown = set(options.only or []) - {name for script in SCRIPTS for name in (script.name, script.file)}
    if unknown:
        known = ", ".join(script.name for script in SCRIPTS)
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {known}")
    chosen = [
        script for script in SCRIPTS if not options.only or {script.name, script.file} & set(options.only)
    ]
    if options.resume:
        known_results = results.read(HERE / "results.json")
        chosen = [script for script in chosen if not is_done(known_results, script, form, commit())]
    total = sum(script.minutes(form) for script in chosen)
    if options.list:
        for script in chosen:
            print(f"{script.name:28}{script.minutes(form):6.1f} min")
    print(f"scripts: {len(chosen)}, {form} form, about {total:.1f} min on two cores", flush=True)
    end_with_the_script()
    return 0 if options.list else run_all(chosen, form, HERE)


def end_with_the_script() -> None:
    """Let SIGTERM end the script that runs too, as Ctrl+C does."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def write_tables(readme: Path, folder: Path) -> None:
    """Write the README's table, and `RESULTS.md` of a folder, from its results."""
    known, names = results.read(folder / "results.json"), [script.name for script in SCRIPTS]
    results.write_text(readme, results.with_table(readme.read_text(), results.readme_table(known, names)))
    results.write_text(folder / "RESULTS.md", results.book(known, names))


def is_done(known: Results, script: Script, form: Form, now: str) -> bool:
    """Whether a script ran to its end at a commit; with changes beside it, nobody knows."""
    last = known.last(script.name, form)
    return last is not None and last.outcome == "done" and last.commit == now and not now.endswith("+")


def run_all(scripts: Sequence[Script], form: Form, folder: Path) -> int:
    """Run scripts of a folder, and write `results.json` and `RESULTS.md` there after each.

    Returns:
        0, or 1 if one failed.
    """
    failed = []
    for number, script in enumerate(scripts, 1):
        left = sum(one.minutes(form) for one in scripts[number - 1 :])
        print(f"\n=== {number} of {len(scripts)}: {script.name}; {left:.0f} min left or so", flush=True)
        run, records = run_one(script, form, folder)
        # Read again each time: another process may have run other scripts meanwhile.
        known = results.read(folder / "results.json")
        known.add(run, records)
        results.write(folder / "results.json", known)
        names = [one.name for one in SCRIPTS]
        results.write_text(folder / "RESULTS.md", results.book(known, names))
        missed = [record for record in records if record["reached"] is False]
        print(
            f"--- {script.name}: {run.outcome} after {run.seconds:.0f} s, {len(records)} claims", flush=True
        )
        if run.outcome != "done":
            print(run.why, flush=True)
        for record in missed:
            print(f"goal not reached: {record['claim']}: {record['ratio']:.3g}, {record['goal']}", flush=True)
        failed += [script.name] if run.outcome == "failed" else []
    print(f"\nwritten: {folder / 'results.json'}, {folder / 'RESULTS.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def run_one(script: Script, form: Form, folder: Path) -> tuple[Run, list[dict[str, Any]]]:
    """Run a script, showing what it prints; returns how it went and its claims."""
    before, date = book.others(_SETTLING), datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
    if book.is_busy(before):
        print(f"others use {before:.1f} processors of this machine", flush=True)
    patience = max(_LEAST_PATIENCE_S, _PATIENCE * 60 * script.minutes(form))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "claims.jsonl"
        code, last, late = _in_its_own_process(script.command(form, folder), file, patience)
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    taken = time.monotonic() - started
    claims = [record for record in records if "claim" in record]
    reasons = [record["skipped"] for record in records if "skipped" in record]
    outcome, why = "done", ""
    if late:
        outcome, why = "failed", f"no end after {patience / 60:.0f} minutes"
    elif code:
        outcome, why = "failed", "\n".join([f"exit code {code}", *last])
    elif reasons and not claims:
        outcome, why = "skipped", "; ".join(reasons)
    others = (round(before, 2), round(book.others(_SETTLING), 2))
    busy, machine = any(map(book.is_busy, others)), book.machine()
    run = Run(script.name, form, outcome, why, round(taken, 1), machine, date, commit(), others, busy)
    return run, claims


def _in_its_own_process(command: list[str], file: Path, patience: float) -> tuple[int, list[str], bool]:
    """The exit code, the last lines, and whether it was ended for taking too long."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, book.CLAIMS: str(file)},
        start_new_session=True,
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    watch = threading.Timer(patience, end)
    watch.start()
    last: deque[str] = deque(maxlen=_LAST_LINES)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(f"    {line}", end="", flush=True)
            last.append(line.rstrip())
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        watch.cancel()
    return code, list(last), late.is_set()


def commit() -> str:
    """Of the tree that the benchmarks are in, with a + where files other than results were changed."""
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", *_RESULTS)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")


_RESULTS = tuple(
    f":(exclude){file}" for file in ("benchmarks/results.json", "benchmarks/RESULTS.md", "README.md")
)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(HERE.parent), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
