"""The book of benchmarks: what scripts claim, how they are run, and how results become tables."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
COMMON = """
import sys
sys.path.insert(0, {folder!r})
from book import arguments, claim, measuring, skipped
options = arguments("", "less").parse_args()
"""


@pytest.fixture
def modules(monkeypatch):
    """`book`, `results` and `run`, as scripts import them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import book
    import results
    import run

    return book, results, run


@pytest.fixture
def book(modules):
    return modules[0]


@pytest.fixture
def results(modules):
    return modules[1]


@pytest.fixture
def run(modules, monkeypatch):
    """On a machine that others leave alone."""
    monkeypatch.setattr(modules[0], "others", lambda _tries=1: 0.0)
    return modules[2]


@pytest.fixture
def claims(tmp_path, monkeypatch, book):
    """Reads what has been claimed."""
    file = tmp_path / "claims.jsonl"
    monkeypatch.setenv(book.CLAIMS, str(file))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def script(folder: Path, name: str, body: str) -> None:
    (folder / f"{name}.py").write_text(COMMON.format(folder=str(FOLDER)) + body)


def until(holds, seconds: float = 60.0) -> bool:
    """Whether something held before so many seconds had passed."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def record(claim: str, ratio: float = 2.0, **more):
    plain = {"peer": "p", "ratio": ratio, "goal": None, "reached": None, "detail": "", "headline": True}
    return {"claim": claim, **plain, **more}


def a_run(results, script: str, **more):
    plain = {
        "form": "short",
        "outcome": "done",
        "why": "",
        "seconds": 60.0,
        "machine": "2 cores",
        "date": "2026-01-01 10:00",
        "commit": "abc",
        "others": (0.1, 1.0),
        "busy": False,
    }
    return results.Run(script=script, **{**plain, **more})


# What scripts claim


def test_a_claim_is_a_line_of_json(book, claims):
    book.claim("a", peer="b", ratio=3.0, goal=">= 2", detail="c", headline=True)
    book.claim("d", peer="e", ratio=3.0, goal="<= 2.5")
    first, second = claims()
    assert first == record("a", 3.0, peer="b", goal=">= 2", reached=True, detail="c")
    assert (second["reached"], second["headline"]) == (False, False)


def test_without_a_file_a_claim_goes_nowhere_but_is_checked(book, monkeypatch):
    monkeypatch.delenv(book.CLAIMS, raising=False)
    book.claim("a", peer="b", ratio=1.0)
    for wrong in ({"ratio": float("nan")}, {"goal": "> 2"}, {"goal": "about 3"}, {"detail": "a | b"}):
        with pytest.raises(ValueError, match=r"ratio|goal|cell"):
            book.claim("a", **{"peer": "b", "ratio": 1.0, **wrong})


@pytest.mark.parametrize(
    ("ratio", "goal", "reached"),
    [(3, ">= 3", True), (2.99, ">= 3", False), (1.1, "<= 1.10", True), (1.2, "<= 1.10", False)],
)
def test_goals_are_bounds_that_belong_to_what_is_reached(book, ratio, goal, reached):
    assert book.is_reached(ratio, goal) is reached


# The scripts that there are


def _parts():
    """What `search.py` can be told to measure alone."""
    tree = ast.parse((FOLDER / "search.py").read_text())
    named = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PARTS"
    ]
    return ast.literal_eval(named[0].value)


def test_every_script_is_known_to_the_runner_and_can_be_short(run):
    with_main = {
        path.stem: path.read_text()
        for path in FOLDER.glob("*.py")
        if '__name__ == "__main__"' in path.read_text() and path.stem != "run"
    }
    assert {one.file for one in run.SCRIPTS} == set(with_main)
    assert {tuple(one.name.split()[1:]) for one in run.SCRIPTS} <= {(), *((part,) for part in _parts())}
    for name, text in with_main.items():
        assert "arguments(__doc__" in text, f"{name} has no --short of book.arguments"


def test_every_script_claims_something(run):
    def of(name: str, seen: set[str]) -> bool:
        path = FOLDER / f"{name}.py"
        if name in seen or not path.exists():
            return False
        seen.add(name)
        tree = ast.parse(path.read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        if any(isinstance(call, ast.Name) and call.id == "claim" for call in calls):
            return True
        imports = [
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        ]
        return any(of(other, seen) for other in imports)

    for one in run.SCRIPTS:
        assert of(one.file, set()), f"{one.name} claims nothing"


def test_short_forms_take_some_twenty_minutes(run, results, book):
    watching = 2 * book.SAMPLE_S * len(run.SCRIPTS) / 60
    assert sum(one.short for one in run.SCRIPTS) + watching < 20
    ran = [one for one in results.read(FOLDER / "results.json").runs if one.form == "short"]
    assert sum(one.seconds for one in ran if not one.busy) < 25 * 60


def test_an_index_that_differs_is_claimed_and_ends_the_soak(modules, claims, monkeypatch):
    import index_soak

    left = [None, None, AssertionError("a row is missing")]

    def round_of(_machine, settings):
        if (error := left.pop(0)) is not None:
            raise error

    monkeypatch.setattr(index_soak, "run_state_machine_as_test", round_of)
    monkeypatch.setattr(index_soak.os, "fsync", None)
    with pytest.raises(AssertionError, match="a row is missing"):
        index_soak.soak(1, steps=1, first=0)
    [made] = claims()
    assert made["ratio"] == pytest.approx(2 / 3)
    assert made["reached"] is False


def test_a_goal_of_memory_is_claimed_only_where_holding_everything_would_miss_it(
    modules, claims, monkeypatch
):
    import memory

    used = {250_000: 0.7, 1_000_000: 0.8, 2_500: 0.7, 10_000: 0.7}
    monkeypatch.setattr(memory, "measured", lambda stage, sizes, parent: used[sizes["rows"]])
    case = memory.Case("search", ("rows",), True)
    memory.compare(case, memory.SIZES, None, {})
    memory.compare(case, {**memory.SIZES, "rows": 2_500}, None, {})
    copies = {250_000: 0.7 + 1.9, 1_000_000: 0.8 + 7.6}
    used.update(copies)
    memory.compare(case, memory.SIZES, None, {})
    flat, tiny, copied = claims()
    assert (flat["goal"], flat["reached"], flat["headline"]) == ("<= 1.25", True, True)
    assert (tiny["goal"], tiny["headline"]) == (None, False)
    assert (copied["goal"], copied["reached"]) == ("<= 1.25", False)


# Running them


def test_a_script_that_fails_does_not_stop_the_others(run, results, tmp_path, capsys):
    script(
        tmp_path,
        "fails",
        'claim("before", peer="p", ratio=1.5)\nprint("look here")\nraise OSError("no room")',
    )
    script(tmp_path, "works", 'claim("c", peer="p", ratio=1.0 + options.short, goal=">= 3")')
    script(tmp_path, "cannot", 'skipped("no GPU")')
    scripts = [run.Script(name, 0.1, 1) for name in ("fails", "works", "cannot")]
    assert run.run_all(scripts, "short", tmp_path) == 1
    known = results.read(tmp_path / "results.json")
    assert [(one.script, one.outcome) for one in known.runs] == [
        ("cannot", "skipped"),
        ("fails", "failed"),
        ("works", "done"),
    ]
    assert [(one.claim, one.ratio, one.reached) for one in known.claims] == [
        ("before", 1.5, None),
        ("c", 2.0, False),
    ]
    assert "no room" in known.last("fails", "short").why
    book = (tmp_path / "RESULTS.md").read_text()
    assert "**failed**: exit code 1" in book
    assert "not measured: no GPU" in book
    assert "| `mining.py` | | never run |" in book
    assert ">= 3: **not reached**" in book
    told = capsys.readouterr().out
    assert "goal not reached: c: 2, >= 3" in told
    assert "failed: fails" in told


@pytest.mark.parametrize(("others", "busy"), [((0.0, 0.0), False), ((1.5, 0.0), True), ((0.0, 1.5), True)])
def test_a_run_is_marked_where_others_used_the_machine(
    run, book, tmp_path, monkeypatch, capsys, others, busy
):
    left = list(others)
    monkeypatch.setattr(book, "others", lambda _tries: left.pop(0))
    monkeypatch.setattr("ray_retrieval.cores.cores", lambda: 2)
    script(tmp_path, "one", 'claim("c", peer="p", ratio=1.0)')
    found, _ = run.run_one(run.Script("one", 0.1, 1), "short", tmp_path)
    assert (found.outcome, found.others, found.busy) == ("done", others, busy)
    assert ("others use 1.5 processors" in capsys.readouterr().out) is (others[0] > 0)


def test_what_others_use_is_measured_while_this_process_waits(book, monkeypatch):
    import psutil

    shares = [[100.0, 60.0, 100.0], [10.0, 4.0, 100.0], [0.0, 0.0, 0.0]]
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: shares.pop(0))
    monkeypatch.setattr(book.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr("ray_retrieval.cores.cores", lambda: 2)
    assert book.others(3) == pytest.approx(0.14)  # the first second in which it is quiet
    assert len(shares) == 1
    assert not book.is_busy(0.2)
    assert book.is_busy(0.21)


def test_the_full_form_takes_its_own_options(run, results, tmp_path):
    script(tmp_path, "one", 'claim("c", peer="p", ratio=1.0 + options.short)')
    one = run.Script("one", 0.1, 1)
    assert run.run_all([one], "short", tmp_path) == 0
    assert run.run_all([one], "full", tmp_path) == 0
    known = results.read(tmp_path / "results.json")
    assert [(claim.form, claim.ratio) for claim in known.claims] == [("full", 1.0), ("short", 2.0)]


def test_a_script_that_never_ends_is_ended(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_LEAST_PATIENCE_S", 1.0)
    monkeypatch.setattr(run, "_PATIENCE", 0)
    script(tmp_path, "waits", "import time\ntime.sleep(60)")
    found, _ = run.run_one(run.Script("waits", 0.1, 1), "short", tmp_path)
    assert found.outcome == "failed"
    assert "no end after" in found.why


def test_a_run_that_is_ended_ends_its_script(tmp_path):
    noted = tmp_path / "pid"
    body = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "new")!r}).write_text(str(os.getpid()))
os.rename({str(tmp_path / "new")!r}, {str(noted)!r})
time.sleep(120)
"""
    script(tmp_path, "waits", body)
    runner = f"""
import pathlib, sys
sys.path.insert(0, {str(FOLDER)!r})
import book, run
book.others = lambda _tries=1: 0.0
run.end_with_the_script()
run.run_one(run.Script("waits", 0.1, 1), "short", pathlib.Path({str(tmp_path)!r}))
"""
    running = subprocess.Popen([sys.executable, "-c", runner])
    try:
        assert until(noted.exists)
        running.terminate()
        assert running.wait(60) == 128 + signal.SIGTERM
        assert until(lambda: not psutil.pid_exists(int(noted.read_text())))
    finally:
        running.kill()


def test_resuming_leaves_out_what_is_done_at_this_commit(run, results):
    known = results.Results()
    known.add(a_run(results, "a"), [])
    known.add(a_run(results, "b", outcome="failed"), [])
    scripts = {name: run.Script(name, 1, 1) for name in "abc"}
    assert [run.is_done(known, one, "short", "abc") for one in scripts.values()] == [True, False, False]
    assert not run.is_done(known, scripts["a"], "full", "abc")
    assert not run.is_done(known, scripts["a"], "short", "abd")
    known.add(a_run(results, "a", commit="abc+"), [])
    assert not run.is_done(known, scripts["a"], "short", "abc+")


# Results


def test_a_run_replaces_the_last_one_of_its_script_and_form_alone(results):
    known = results.Results()
    known.add(a_run(results, "a"), [record("one"), record("gone")])
    known.add(a_run(results, "b"), [record("other")])
    known.add(a_run(results, "a", form="full"), [record("one", 4.0)])
    known.add(a_run(results, "a", commit="new"), [record("one", 1.0), record("one", 3.0)])
    known.add(a_run(results, "c"), [record("one", peer="p"), record("one", peer="q")])
    found = [(one.script, one.form, one.claim, one.ratio, one.commit) for one in known.claims]
    assert sorted(found) == [
        ("a", "full", "one", 4.0, "abc"),
        ("a", "short", "one", 3.0, "new"),
        ("b", "short", "other", 2.0, "abc"),
        ("c", "short", "one", 2.0, "abc"),
        ("c", "short", "one", 2.0, "abc"),
    ]
    assert len(known.runs) == 4


def test_claims_that_a_failed_run_did_not_come_to_keep_their_date(results):
    known = results.Results()
    known.add(a_run(results, "a"), [record("one"), record("two")])
    known.add(a_run(results, "a", outcome="failed", commit="new"), [record("one", 5.0)])
    assert {one.claim: (one.ratio, one.commit) for one in known.claims} == {
        "one": (5.0, "new"),
        "two": (2.0, "abc"),
    }


def test_a_skipped_run_erases_nothing_that_was_measured(results):
    known = results.Results()
    known.add(a_run(results, "gpu", outcome="skipped", why="no GPU"), [])
    assert known.last("gpu", "short").outcome == "skipped"
    known.add(a_run(results, "gpu", machine="one GPU"), [record("one")])
    known.add(a_run(results, "gpu", outcome="skipped", why="no GPU", commit="new"), [])
    assert (known.last("gpu", "short").outcome, known.last("gpu", "short").commit) == ("done", "abc")
    assert [(one.claim, one.machine) for one in known.claims] == [("one", "one GPU")]


def test_results_survive_being_written(results, tmp_path):
    known = results.Results()
    known.add(a_run(results, "a", busy=True), [record("one", 1.25, goal=">= 1", reached=True)])
    results.write(tmp_path / "results.json", known)
    assert results.read(tmp_path / "results.json") == known
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert results.read(tmp_path / "none.json") == results.Results()


def test_results_of_another_version_are_refused(results, tmp_path):
    (tmp_path / "results.json").write_text('{"version": 0}')
    with pytest.raises(SystemExit, match="version 0, expected 1"):
        results.read(tmp_path / "results.json")


def test_rows_of_a_table_have_as_many_cells_as_its_head(results):
    known = results.Results()
    known.add(a_run(results, "a", busy=True), [record("one", 1234.5, goal=">= 1", reached=True)])
    known.add(a_run(results, "b", outcome="failed", why="a | b\nc"), [])
    tables = [part for part in results.book(known, ["a", "b", "c"]).split("\n\n") if part.startswith("|")]
    tables.append(results.readme_table(known, ["a"]).split("\n\n")[1])
    for table in tables:
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    assert "| 1,234 |" in tables[1]
    assert "0.1, 1.0*" in tables[1]
    assert "abc*" in tables[-1]


def test_the_readme_has_headlines_of_the_full_form_or_else_of_the_short_one(results):
    known = results.Results()
    known.add(a_run(results, "a"), [record("short one")])
    known.add(a_run(results, "b"), [record("short two"), record("detail", headline=False)])
    known.add(a_run(results, "a", form="full"), [record("long one")])
    table = results.readme_table(known, ["b", "a"])
    assert table.index("short two") < table.index("long one")
    assert "`b.py --short`" in table
    assert "short one" not in table
    assert "detail" not in table
    assert "Nothing has been measured" in results.readme_table(results.Results(), ["a"])


def test_the_readme_has_a_table_of_each_machine_with_commits(results):
    known = results.Results()
    known.add(a_run(results, "a", date="2026-01-02 10:00"), [record("one")])
    known.add(a_run(results, "gpu", machine="a GPU", commit="def"), [record("two")])
    known.add(a_run(results, "b"), [record("three")])
    cores, gpu = results.readme_table(known, ["a", "gpu", "b"]).split("\n\nOn a GPU, ")
    assert cores.startswith("On 2 cores, 2026-01-01 to 2026-01-02:\n\n| claim |")
    assert ("one" in cores, "two" in cores, "three" in cores) == (True, False, True)
    assert gpu.startswith("2026-01-01:\n\n")
    assert gpu.endswith("| two | p | 2 | – | `a.py --short` | def |".replace("`a", "`gpu"))


def test_only_what_is_between_the_marks_is_written_anew(results):
    readme = f"before\n{results.BEGIN}\n\nold\n\n{results.END}\nafter\n"
    assert results.with_table(readme, "new") == readme.replace("old", "new")
    with pytest.raises(ValueError, match="needs a line"):
        results.with_table("before", "new")


def test_the_readme_is_up_to_date_with_the_results(run, results):
    table = results.readme_table(results.read(FOLDER / "results.json"), [one.name for one in run.SCRIPTS])
    readme = (ROOT / "README.md").read_text()
    assert results.with_table(readme, table) == readme, "run: python benchmarks/run.py --readme"


def test_the_book_is_up_to_date_with_the_results(run, results):
    said = results.book(results.read(FOLDER / "results.json"), [one.name for one in run.SCRIPTS])
    assert said == (FOLDER / "RESULTS.md").read_text(), "run: python benchmarks/run.py --readme"


# What scripts have in common


def test_works_take_turns_and_the_first_round_does_not_count(modules):
    import timing

    done = []
    taken = timing.in_turns({name: lambda name=name: done.append(name) for name in "ab"}, 3)
    assert "".join(done) == "abbaabba"
    assert list(taken) == ["a", "b"]
    assert all(one.wall >= 0 for one in taken.values())


def test_a_measurement_in_its_own_process_gives_what_it_prints_last(modules, tmp_path):
    import apart

    file = tmp_path / "one.py"
    file.write_text("import os, sys\nprint('said')\nprint('{\"threads\": ' + os.environ[sys.argv[1]] + '}')")
    assert apart.in_its_own_process(str(file), ["OMP_NUM_THREADS"], 3) == {"threads": 3}
    with pytest.raises(apart.ProcessError, match="KeyError"):
        apart.in_its_own_process(str(file), ["NO_SUCH_VARIABLE"], 1)


def test_processes_work_at_once_and_are_counted_together(modules, tmp_path, monkeypatch):
    import apart

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "slow_work.py").write_text(
        "import os, time\n"
        "def start(folder, parts):\n"
        "    open(os.path.join(folder, str(os.getpid())), 'w').close()\n"
        "    return lambda: time.sleep(0.05) or parts\n"
    )
    import slow_work

    made = tmp_path / "made"
    made.mkdir()
    with apart.at_once(slow_work.start, (str(made), 5), 2) as rate:
        assert 0 < rate(0.5) <= 200  # two that do 100 each at most; on a busy machine less
        assert rate(0.1) > 0
    assert len(list(made.iterdir())) == 2
    without_a_folder = apart.at_once(slow_work.start, (str(tmp_path / "none"), 5), 2)
    with without_a_folder as rate, pytest.raises(FileNotFoundError):
        rate(0.1)


def test_plain_training_steps_have_the_loss_of_the_methods(tmp_path, book):
    """The script fails where a loss written from the paper differs from ours."""
    sizes = "--backbone small --batch 8 --size 32 --rounds 1 --memory 64 --threads 1 --precision float32"
    file = tmp_path / "claims.jsonl"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "train_step.py"), *sizes.split()],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, book.CLAIMS: str(file)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = [json.loads(line)["claim"].split(",")[0] for line in file.read_text().splitlines()]
    methods = ["greedyhash", "hashnet", "xbm", "xbm", "gem", "delf"]
    assert made == [f"a training step of {name}" for name in methods]
