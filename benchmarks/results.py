"""The results of all benchmarks: runs of scripts and the claims they made, kept in JSON, shown as tables.

`results.json` holds

    runs     of each script and form (short, full) the last run: how it ended (done, failed, skipped) and why
    claims   the ratios, each with the machine, the date and the commit of the run that measured it

A run takes the place of the last one of that script and form, and its claims that of theirs. Where a run
failed, claims that it did not come to are kept as they were, with their own date and commit. One that was
skipped, such as for want of a GPU, takes the place of nothing that was measured.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

VERSION = 1
BEGIN = "<!-- benchmarks: written by `python benchmarks/run.py --readme` from benchmarks/results.json -->"
END = "<!-- benchmarks: end -->"

Form = Literal["short", "full"]


@dataclass(frozen=True)
class Run:
    """One run of a script.

    Attributes:
        script: its name, without `.py`, and its part where parts are run one by one.
        form: of the run.
        outcome: `skipped` where the script said that it cannot measure here, `failed` where it ended with an
            error or took far too long.
        why: it was skipped, or the last lines of one that failed.
        seconds: that it took.
        machine: in a line.
        date: when it began, UTC.
        commit: of the tree, with a + where files were changed.
        others: how many processors others used just before it began and just after its end.
        busy: whether that was more than a measurement bears; see `book.is_busy`.
    """

    script: str
    form: Form
    outcome: Literal["done", "failed", "skipped"]
    why: str
    seconds: float
    machine: str
    date: str
    commit: str
    others: tuple[float, float]
    busy: bool


@dataclass(frozen=True)
class Claim:
    """A ratio that a run measured; see `book.claim`."""

    script: str
    form: Form
    claim: str
    peer: str
    ratio: float
    goal: str | None
    reached: bool | None
    detail: str
    headline: bool
    machine: str
    date: str
    commit: str
    others: tuple[float, float]
    busy: bool


@dataclass
class Results:
    """What is known."""

    runs: list[Run] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def last(self, script: str, form: Form) -> Run | None:
        """The last run of a script in a form."""
        return next((run for run in self.runs if (run.script, run.form) == (script, form)), None)

    def of(self, script: str, form: Form) -> list[Claim]:
        """The claims of a script in a form."""
        return [claim for claim in self.claims if (claim.script, claim.form) == (script, form)]

    def add(self, run: Run, records: list[dict[str, Any]]) -> None:
        """Put a run and its claims in the place of the last ones.

        Args:
            run: that ended.
            records: of `book.claim`, in order; of a claim that comes twice with the same peer the later one
                counts.
        """
        if run.outcome == "skipped" and self.of(run.script, run.form):
            return
        shared = {
            name: getattr(run, name)
            for name in ("script", "form", "machine", "date", "commit", "others", "busy")
        }
        made = {(record["claim"], record["peer"]): Claim(**shared, **record) for record in records}
        kept = self.of(run.script, run.form) if run.outcome == "failed" else []
        new = [*made.values(), *(claim for claim in kept if (claim.claim, claim.peer) not in made)]
        same = (run.script, run.form)
        self.runs = [one for one in self.runs if (one.script, one.form) != same] + [run]
        self.claims = [one for one in self.claims if (one.script, one.form) != same] + new


def read(path: Path) -> Results:
    """The results of a file; none where there is no file.

    Raises:
        SystemExit: if the file is of another version.
    """
    if not path.exists():
        return Results()
    found = json.loads(path.read_text())
    if found.get("version") != VERSION:
        raise SystemExit(f"{path} has version {found.get('version')}, expected {VERSION}: move it away")
    runs = [Run(**{**run, "others": tuple(run["others"])}) for run in found["runs"]]
    claims = [Claim(**{**claim, "others": tuple(claim["others"])}) for claim in found["claims"]]
    return Results(runs, claims)


def write(path: Path, results: Results) -> None:
    """Write the file whole or not at all, in the order of scripts, forms and claims."""
    runs = sorted(results.runs, key=lambda run: (run.script, run.form))
    claims = sorted(results.claims, key=lambda claim: (claim.script, claim.form))
    said = {"version": VERSION, "runs": [*map(asdict, runs)], "claims": [*map(asdict, claims)]}
    write_text(path, json.dumps(said, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def book(results: Results, scripts: list[str]) -> str:
    """All runs and claims as Markdown; scripts that never ran say so."""
    lines = [
        "# Results of the benchmarks",
        "",
        "Written by `python benchmarks/run.py`; what a ratio is of, its claim says. `others` are the "
        "processors that others used, just before and just after; * where that is more than a "
        "tenth of them. A + at a commit: with changes that were not committed.",
        "",
        "## Runs",
        "",
        "| script | form | outcome | minutes | date | commit | others |",
        "|---|---|---|---|---|---|---|",
    ]
    for script in _all(results, scripts):
        runs = [run for form in ("short", "full") if (run := results.last(script, form))]
        lines += [_run_row(run) for run in runs] or [f"| {_command(script)} | | never run | | | | |"]
    lines += ["", "## Claims", "", *_heads("script", "form"), "|" + "---|" * 11]
    for script in _all(results, scripts):
        lines += [_claim_row(claim) for form in ("short", "full") for claim in results.of(script, form)]
    return "\n".join(lines) + "\n"


def readme_table(results: Results, scripts: list[str]) -> str:
    """The headlines as Markdown, a table for each machine.

    Of each script they are those of the full form, or else of the short one.
    """
    chosen: dict[str, list[Claim]] = {}
    for script in _all(results, scripts):
        forms = (results.of(script, "full"), results.of(script, "short"))
        found = next((some for claims in forms if (some := [one for one in claims if one.headline])), [])
        for claim in found:
            chosen.setdefault(claim.machine, []).append(claim)
    if not chosen:
        return "Nothing has been measured with `make bench` or `make bench-full` so far."
    return "\n\n".join(_machine_table(machine, claims) for machine, claims in chosen.items())


def _machine_table(machine: str, claims: list[Claim]) -> str:
    dates = sorted({claim.date[:10] for claim in claims})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    busy = "; *: others used it too" if any(claim.busy for claim in claims) else ""
    rows = [
        f"| {claim.claim} | {claim.peer} | {_number(claim.ratio)} | {_goal(claim)} | "
        f"{_command(claim.script, claim.form)} | {claim.commit}{'*' if claim.busy else ''} |"
        for claim in claims
    ]
    heads = ["| claim | peer or limit | ratio | goal | script | commit |", "|---|---|---|---|---|---|"]
    return "\n".join([f"On {machine}, {when}{busy}:", "", *heads, *rows])


def with_table(readme: str, table: str) -> str:
    """A README with another table between its marks.

    Raises:
        ValueError: if it has no marks, or not in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README needs a line '{BEGIN}' and a later one '{END}'")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def _all(results: Results, scripts: list[str]) -> list[str]:
    """The scripts in their order, and those that are there no longer."""
    return [*scripts, *sorted({run.script for run in results.runs} - set(scripts))]


def _heads(*first: str) -> list[str]:
    heads = ["claim", "peer or limit", "ratio", "goal", "detail", "machine", "date", "commit", "others"]
    return [f"| {' | '.join([*first, *heads])} |"]


def _run_row(run: Run) -> str:
    said = {
        "done": "done",
        "skipped": f"not measured: {run.why}",
        "failed": f"**failed**: {_cell(run.why)}",
    }[run.outcome]
    return (
        f"| {_command(run.script)} | {run.form} | {said} | {run.seconds / 60:.1f} | {run.date} | "
        f"{run.commit} | {_others(run)} |"
    )


def _claim_row(claim: Claim) -> str:
    cells = [_command(claim.script), claim.form, claim.claim, claim.peer, _number(claim.ratio), _goal(claim)]
    cells += [claim.detail, claim.machine, claim.date, claim.commit, _others(claim)]
    return f"| {' | '.join(cells)} |"


def _command(script: str, form: Form = "full") -> str:
    """A script with its part, as it is called."""
    file, *part = script.split()
    return f"`{' '.join([f'{file}.py', *part, *(['--short'] if form == 'short' else [])])}`"


def _goal(claim: Claim) -> str:
    if claim.goal is None:
        return "–"
    return f"{claim.goal}: {'reached' if claim.reached else '**not reached**'}"


def _others(of: Run | Claim) -> str:
    return f"{of.others[0]:.1f}, {of.others[1]:.1f}{'*' if of.busy else ''}"


def _number(ratio: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{ratio:,.0f}" if abs(ratio) >= 100 else f"{ratio:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "¦").replace("\n", "<br>")
