import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.data.splits import (
    REST,
    Split,
    SplitPlan,
    draw_groups,
    draw_one_each,
    load_or_draw,
    share_of,
)
from ray_retrieval.errors import ArtefactError, DataError
from ray_retrieval.storage import Folder


def naive(labels: np.ndarray, plan: SplitPlan) -> dict[str, list[int]]:
    """Class by class with plain Python, from the same uniform numbers."""
    uniform = np.random.Generator(np.random.Philox(plan.seed)).random(len(labels))
    roles: dict[str, list[int]] = {role: [] for role in (*plan.parts, REST)}
    for label in sorted(set(labels.tolist())):
        rows = sorted((float(uniform[row]), row) for row in range(len(labels)) if labels[row] == label)
        remaining = [row for _, row in rows]
        for role, share in plan.parts.items():
            count = share if isinstance(share, int) else max(1, int(share * len(rows) + 0.5))
            roles[role] += remaining[:count]
            remaining = remaining[count:]
        roles[REST] += remaining
    return {role: sorted(rows) for role, rows in roles.items()}


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 3]), min_size=1, max_size=60),
    st.integers(0, 3),
    st.floats(0.01, 0.4),
    st.integers(0, 2**63),
)
def test_draw_equals_the_naive_one_and_parts_the_table(
    labels: list[int], count: int, share: float, seed: int
) -> None:
    table = np.repeat(np.array(labels), 8)
    plan = SplitPlan({"queries": count, "validation": share}, seed)
    np.random.seed(0)
    roles = Split.draw(table, plan).roles
    np.random.seed(1)
    again = Split.draw(table, plan).roles
    assert {role: rows.tolist() for role, rows in roles.items()} == naive(table, plan)
    assert all(np.array_equal(roles[role], again[role]) for role in roles)
    assert sorted(np.concatenate(list(roles.values())).tolist()) == list(range(len(table)))
    assert all(rows.dtype == np.int64 for rows in roles.values())


def test_draw_is_the_same_for_ever() -> None:
    roles = Split.draw(np.arange(30) % 3, SplitPlan({"a": 2, "b": 0.2}, seed=7)).roles
    assert roles["a"].tolist() == [4, 8, 12, 13, 14, 15]
    assert roles["b"].tolist() == [1, 2, 3, 6, 17, 22]


def test_seeds_differ_and_global_state_is_left_alone() -> None:
    labels = np.zeros(100, dtype=np.int64)
    np.random.seed(3)
    state = str(np.random.get_state())
    first, second = (Split.draw(labels, SplitPlan({"a": 10}, seed)).roles["a"] for seed in (0, 1))
    assert first.tolist() != second.tolist()
    assert str(np.random.get_state()) == state


def test_adding_a_class_leaves_the_draw_of_the_rows_before() -> None:
    labels = np.arange(40) % 4
    more = np.concatenate([labels, np.full(10, 9)])
    plan = SplitPlan({"a": 3}, seed=0)
    longer = Split.draw(more, plan).roles["a"]
    assert longer[longer < 40].tolist() == Split.draw(labels, plan).roles["a"].tolist()


def test_rows_with_several_labels_are_drawn_from_all() -> None:
    labels = np.random.default_rng(0).random((50, 4)) < 0.3
    roles = Split.draw(labels, SplitPlan({"queries": 7, "validation": 0.1}, seed=0)).roles
    assert {role: len(rows) for role, rows in roles.items()} == {"queries": 7, "validation": 5, REST: 38}


def test_too_few_images_name_class_count_and_need() -> None:
    labels = np.array([0] * 9 + [1] * 3 + [2] * 2)
    plan = SplitPlan({"queries": 2, "validation_queries": 0.1}, seed=0, keep=1)
    with pytest.raises(DataError) as caught:
        Split.draw(labels, plan, class_names=["ant", "bee", "cow"], where="photos")
    assert str(caught.value).startswith(
        "photos: class 'bee' has 3 images, 4 are needed (2 queries, 1 validation queries, 1 to remain); "
        "1 other classes are short too"
    )
    with pytest.raises(DataError, match="class 1 has 3 images"):
        Split.draw(labels, plan)
    with pytest.raises(DataError, match="the table has 5 images, 6 are needed"):
        Split.draw(np.ones((5, 2), dtype=np.bool_), SplitPlan({"queries": 6}, seed=0))


def test_labels_of_any_size_are_drawn_by() -> None:
    labels, large = np.arange(30) % 3, np.array([7, 20_000_000, 4006381333931])
    plan = SplitPlan({"a": 2, "b": 0.2}, seed=7)
    expected = Split.draw(labels, plan).roles
    for role, rows in Split.draw(large[labels], plan).roles.items():
        assert rows.tolist() == expected[role].tolist()
    with pytest.raises(DataError, match="class 4006381333931 has 2 images, 3 are needed"):
        Split.draw(large[[0, 0, 0, 2, 2]], SplitPlan({"a": 3}, seed=0))


def test_a_share_of_many_classes_is_a_row_each_of_some() -> None:
    labels = np.repeat(np.arange(50), 4)
    roles = Split.draw(labels, SplitPlan({"a": 0.1, "b": 0.1, "c": 1}, seed=0, keep=1, most=8)).roles
    assert [len(roles[role]) for role in "abc"] == [8, 8, 50]
    assert len(set(labels[roles["a"]])) == len(set(labels[roles["b"]])) == 8
    assert set(labels[roles["a"]]) != set(labels[roles["b"]])
    assert sorted(np.concatenate(list(roles.values())).tolist()) == list(range(200))
    few = SplitPlan({"a": 0.5}, seed=0)
    assert np.array_equal(
        Split.draw(labels, few).roles["a"],
        Split.draw(labels, SplitPlan({"a": 0.5}, seed=0, most=50)).roles["a"],
    )
    with pytest.raises(DataError, match="4 other classes are short too"):
        Split.draw(np.repeat(np.arange(5), 2), SplitPlan({"a": 0.1}, seed=0, keep=2, most=1))


def test_empty_table_and_empty_plan() -> None:
    assert Split.draw(np.zeros(0, dtype=np.int64), SplitPlan({"a": 0.5}, seed=0)).roles["a"].tolist() == []
    assert Split.draw(np.zeros(3, dtype=np.int64), SplitPlan({}, seed=0)).roles[REST].tolist() == [0, 1, 2]


@pytest.fixture
def saved(tmp_path: Path, make_table: Any) -> tuple[Folder, Any, Split]:
    table = make_table(np.arange(12) % 3)
    split = Split(
        {"queries": np.array([4, 1]), "database": np.arange(12), "none": np.zeros(0, dtype=np.int64)},
        {"seed": 5},
    )
    folder = Folder(tmp_path / "split")
    split.save(folder, table)
    return folder, table, split


def test_saved_split_loads_as_it_was(saved: tuple[Folder, Any, Split]) -> None:
    folder, table, split = saved
    loaded = Split.load(folder, table)
    assert loaded.origin == {"seed": 5}
    assert list(loaded.roles) == list(split.roles)
    for role, rows in split.roles.items():
        assert loaded.roles[role].dtype == np.int64
        assert loaded.roles[role].tolist() == rows.tolist()


def test_equal_splits_are_equal_files(saved: tuple[Folder, Any, Split], tmp_path: Path) -> None:
    folder, table, split = saved
    other = Folder(tmp_path / "other")
    split.save(other, table)
    for name in ("split.json", "split.parquet"):
        assert folder.read_bytes(name) == other.read_bytes(name)


def test_split_of_another_table_is_refused(saved: tuple[Folder, Any, Split], make_table: Any) -> None:
    folder, table, _ = saved
    for other in (
        make_table(np.arange(12) % 2),
        make_table(np.arange(11) % 3),
        table.take(np.arange(12)[::-1]),
    ):
        with pytest.raises(DataError, match="have changed"):
            Split.load(folder, other)


def test_damaged_split_is_refused(saved: tuple[Folder, Any, Split]) -> None:
    folder, table, _ = saved
    data = bytearray(folder.read_bytes("split.parquet"))
    data[len(data) // 2] ^= 1
    folder.write_bytes("split.parquet", bytes(data))
    with pytest.raises(ArtefactError, match="damaged"):
        Split.load(folder, table)
    folder.remove("split.parquet")
    with pytest.raises(ArtefactError, match="missing"):
        Split.load(folder, table)
    folder.remove("split.json")
    with pytest.raises(ArtefactError, match="no split here"):
        Split.load(folder, table)


def test_rows_out_of_range_and_wrong_counts_are_refused(tmp_path: Path, make_table: Any) -> None:
    table, folder = make_table(np.arange(6) % 2), Folder(tmp_path)
    Split({"queries": np.array([0, 5])}).save(folder, table)
    body = folder.read_json("split.json")
    body["roles"] = {"queries": 3}
    folder.write_json("split.json", body)
    with pytest.raises(DataError, match="2 rows, 3 are recorded"):
        Split.load(folder, table)


def test_saved_split_counts_whatever_the_seed(tmp_path: Path, make_table: Any) -> None:
    table, folder = make_table(np.arange(12) % 3), Folder(tmp_path)
    drawn = []

    def draw(seed: int) -> dict[str, Any]:
        drawn.append(seed)
        return {"queries": np.array([seed])}

    first, notes = load_or_draw(folder, table, draw, seed=3, origin={"protocol": "I"})
    assert (first.roles["queries"].tolist(), notes) == ([3], [])
    again, notes = load_or_draw(folder, table, draw, seed=4, origin={"protocol": "I"})
    assert again.roles["queries"].tolist() == [3]
    assert notes == ["the split is the saved one, drawn with seed 3, not 4"]
    assert drawn == [3]
    with pytest.raises(DataError, match="protocol = I, asked is II"):
        load_or_draw(folder, table, draw, seed=3, origin={"protocol": "II"})
    assert json.loads(folder.read_bytes("split.json"))["origin"] == {"protocol": "I", "seed": 3}


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["ant", "bee", "cow", "dog", "eel"]), min_size=1, max_size=40),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 2**63),
)
def test_groups_are_drawn_whole_and_each_once(
    groups: list[str], test: int, validation: int, seed: int
) -> None:
    names = sorted(set(groups))
    counts = {"test": test, "validation": validation}
    if test + validation > len(names):
        with pytest.raises(
            DataError, match=f"{test + validation} groups are needed .* there are {len(names)}"
        ):
            draw_groups(np.array(groups), counts, seed)
        return
    roles = draw_groups(np.array(groups), counts, seed)
    uniform = np.random.Generator(np.random.Philox(seed)).random(len(names))
    ranked = [name for _, name in sorted(zip(uniform.tolist(), names, strict=True))]
    wanted = {
        "test": ranked[:test],
        "validation": ranked[test : test + validation],
        REST: ranked[test + validation :],
    }
    for role, rows in roles.items():
        assert rows.dtype == np.int64
        assert rows.tolist() == [row for row, name in enumerate(groups) if name in wanted[role]]


def test_later_roles_leave_the_groups_of_the_first_alone() -> None:
    groups = np.arange(60) % 20
    alone = draw_groups(groups, {"test": 10}, seed=3)["test"]
    assert draw_groups(groups, {"test": 10, "validation": 4}, seed=3)["test"].tolist() == alone.tolist()


def test_groups_are_the_same_for_ever() -> None:
    roles = draw_groups(np.arange(12) % 6, {"test": 2, "validation": 1}, seed=7)
    assert {role: rows.tolist() for role, rows in roles.items()} == {
        "test": [3, 4, 9, 10],
        "validation": [2, 8],
        REST: [0, 1, 5, 6, 7, 11],
    }


@given(st.lists(st.integers(0, 5), min_size=0, max_size=30), st.integers(0, 2**40), st.integers(0, 9))
def test_one_of_each_group_is_drawn(groups: list[int], seed: int, number: int) -> None:
    rows = draw_one_each(np.array(groups, dtype=np.int64), seed, number)
    assert rows.dtype == np.int64
    assert rows.tolist() == sorted(rows.tolist())
    assert sorted(groups[row] for row in rows) == sorted(set(groups))


def test_every_row_of_a_group_is_drawn_equally_often() -> None:
    groups = np.array([0, 1, 0, 1, 0, 1, 1])
    drawn = np.concatenate([draw_one_each(groups, 0, number) for number in range(3000)])
    shares = np.bincount(drawn) / 3000
    assert np.abs(shares - np.array([1 / 3, 1 / 4, 1 / 3, 1 / 4, 1 / 3, 1 / 4, 1 / 4])).max() < 0.03


def test_shares_are_rounded_with_a_least() -> None:
    assert [share_of(25, share, least=2) for share in (0, 0.01, 0.1, 0.5)] == [0, 2, 3, 13]
