import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.data.table import ImageTable, concatenate, open_images
from ray_retrieval.errors import DataError


def inline(ids: Any, data: Any, **columns: Any) -> pa.Table:
    images = pa.array(
        [{"bytes": item, "path": None} for item in data],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    return pa.table({"id": ids, "image": images, **columns})


def test_columns_are_made_canonical_and_others_kept() -> None:
    table = ImageTable(
        inline(["a", "b"], [b"x", b"yy"], label=pa.array([1, 0], pa.int32()), size=[3, 4]), name="t"
    )
    schema = table.table.schema
    assert schema.names == ["id", "image", "label", "size"]
    assert schema.field("image").type == pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    assert schema.field("label").type == pa.int64()
    assert len(table) == 2
    assert table.ids == ["a", "b"]
    assert table.labels.tolist() == [1, 0]
    assert table.classes == 2
    assert table.image_bytes(1) == b"yy"


def test_list_labels_become_multi_hot() -> None:
    table = ImageTable(
        inline(["a", "b", "c"], [b"x"] * 3, label=pa.array([[2, 0], [], [1]])), name="t", classes=4
    )
    assert table.is_multilabel
    assert table.labels.dtype == np.bool_
    assert table.labels.tolist() == [[True, False, True, False], [False] * 4, [False, True, False, False]]
    assert table.unlabelled.tolist() == [1]
    assert table.take(np.array([2])).labels.tolist() == [[False, True, False, False]]


def test_first_row_without_label_is_named() -> None:
    table = ImageTable(inline(["a", "b", "c"], [b"x"] * 3, label=pa.array([0, None, None])), name="t")
    assert table.has_labels
    assert table.unlabelled.tolist() == [1, 2]
    with pytest.raises(DataError, match=r"row 1 has no label.*'b'"):
        _ = table.labels


@pytest.mark.parametrize("columns", [{}, {"label": pa.nulls(1)}, {"label": pa.array([-1])}])
def test_absent_null_and_negative_labels_are_no_labels(columns: dict[str, Any]) -> None:
    table = ImageTable(inline(["a"], [b"x"], **columns), name="t")
    assert not table.has_labels
    assert table.classes == 0
    with pytest.raises(DataError, match=r"no image has a label.*\(give class folders"):
        _ = table.labels


def test_empty_table_has_empty_labels_and_a_fingerprint() -> None:
    whole = ImageTable(inline(["a", "b"], [b"x", b"y"], label=[0, 1]), name="t")
    empty = whole.take(np.zeros(0, dtype=np.int64))
    assert len(empty) == 0
    assert empty.labels.shape == (0,)
    assert empty.classes == 2
    assert empty.ids == empty.paths == []
    assert len(empty.table) == 0
    assert empty.fingerprint != whole.fingerprint
    assert len(empty.take(np.zeros(0, dtype=np.int64))) == 0


def test_take_keeps_order_classes_and_images_also_twice() -> None:
    data = [bytes([65 + row]) * (row + 1) for row in range(9)]
    whole = ImageTable(inline([str(row) for row in range(9)], data, label=list(range(9))), name="t")
    part = whole.take(np.array([8, 2, 5])).take(np.array([2, 0]))
    assert part.ids == ["5", "8"]
    assert [part.image_bytes(row) for row in range(2)] == [data[5], data[8]]
    assert part.classes == 9
    assert part.table["image"].to_pylist() == [
        {"bytes": data[5], "path": None},
        {"bytes": data[8], "path": None},
    ]
    assert part.inline_lengths().tolist() == [6, 9]
    assert part.inline_bytes(np.array([1])).to_pylist() == [data[8]]


def test_ids_that_stand_twice_are_named() -> None:
    with pytest.raises(DataError, match="1 ids stand more than once, the first is 'b'"):
        ImageTable(inline(["a", "b", "b"], [b"x"] * 3), name="t")
    with pytest.raises(DataError, match="row 1 has no id"):
        ImageTable(inline(pa.array(["a", None]), [b"x"] * 2), name="t")


def test_columns_of_the_same_name_are_named() -> None:
    table = inline(["a"], [b"x"], size=[1])
    with pytest.raises(DataError, match="columns stand more than once: 'size'"):
        ImageTable(table.append_column("size", table["size"]), name="t")


@pytest.mark.parametrize("name", ["Label", "class", "category"])
def test_a_column_that_may_be_meant_for_labels_is_named(name: str) -> None:
    images = pa.array([{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}])
    table = ImageTable(pa.table({"id": ["a", "b"], "image": images, name: ["x", "y"]}), name="t")
    assert not table.has_labels
    with pytest.raises(DataError, match=f"no image has a label.*call the column '{name}' label"):
        _ = table.labels


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (pa.array([b"a", b"caf\xe9"], pa.binary()), r"the first that is not UTF-8 is b'caf\\xe9'"),
        (pa.array([["a"], ["b"]]), "it is of type list"),
    ],
)
def test_ids_that_are_no_text_are_shown(ids: pa.Array, said: str) -> None:
    with pytest.raises(DataError, match=f"t: the column 'id' is no text: {said}"):
        ImageTable(inline(ids, [b"x"] * 2), name="t")


def test_ids_may_be_numbers_or_text_in_bytes() -> None:
    assert ImageTable(inline([7, 8], [b"x"] * 2), name="t").ids == ["7", "8"]
    assert ImageTable(inline([b"a", "é".encode()], [b"x"] * 2), name="t").ids == ["a", "é"]


def test_labels_that_no_int64_holds_are_names() -> None:
    table = ImageTable(inline(["a", "b"], [b"x"] * 2, label=pa.array([2**64 - 1, 1], pa.uint64())), name="t")
    assert (table.class_names, table.labels.tolist()) == (["1", "18446744073709551615"], [1, 0])


@pytest.mark.parametrize("box", [["a", "b"], [3, 4], [["0", "0", "8", "8"]] * 2, [{"x": 1.5}, None]])
def test_a_column_box_of_something_else_needs_another_name(box: list[Any]) -> None:
    with pytest.raises(DataError, match=r"'box' holds lists of left, top.*another name"):
        ImageTable(inline(["a", "b"], [b"x"] * 2, box=box), name="t")


@pytest.mark.parametrize(
    "box", [[0, 0, float("inf"), 8], [0, float("nan"), 8, 8], [0, 0, None, 8], [0, 0, 8], [8, 0, 8, 8]]
)
def test_a_box_that_is_none_names_the_image(box: list[float | None]) -> None:
    table = ImageTable(inline(["a", "b"], [b"x"] * 2, box=[[0, 0, 8, 8.5], box]), name="t")
    with pytest.raises(DataError, match="t, image 'b': a box is left, top, right, bottom, four finite"):
        table.box(0)


@pytest.mark.parametrize("box", [[None, None], [[0, 0, 2**60, 8], None]])
def test_boxes_may_be_missing_and_whole_numbers(box: list[Any]) -> None:
    table = ImageTable(inline(["a", "b"], [b"x"] * 2, box=box), name="t")
    assert [table.box(row) for row in range(2)] == box


def test_missing_column_is_named() -> None:
    with pytest.raises(DataError, match="column 'image'"):
        ImageTable(pa.table({"id": ["a"]}), name="t")


def test_images_whose_bytes_are_none_are_refused() -> None:
    images = pa.array([{"bytes": [137, 80]}], pa.struct([("bytes", pa.list_(pa.uint8()))]))
    with pytest.raises(DataError, match=r"photos: the bytes of the images are of type list<.*binary"):
        ImageTable(pa.table({"id": ["a"], "image": images}), name="photos")


def test_label_beyond_the_class_names_is_refused() -> None:
    with pytest.raises(DataError, match="label 2 has no name"):
        ImageTable(inline(["a"], [b"x"], label=[2]), name="t", class_names=["p", "q"])


def test_image_without_bytes_and_path_and_missing_file_name_the_id(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    images = pa.array([None, {"bytes": None, "path": str(tmp_path / "gone.png")}], kind)
    table = ImageTable(pa.table({"id": ["a", "b"], "image": images}), name="t")
    with pytest.raises(DataError, match="image 'a': there are neither bytes nor a path"):
        table.image_bytes(0)
    with pytest.raises(DataError, match=r"image 'b' at .*gone.png: the file is missing"):
        table.image_bytes(1)
    with pytest.raises(IndexError):
        table.image_bytes(2)


@settings(deadline=None)
@given(st.data())
def test_fingerprint_depends_on_rows_and_not_on_chunks(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    ids = [f"id{row}" for row in range(count)]
    table = inline(
        ids, [b"x" * (row % 3) for row in range(count)], label=pa.array([row % 4 for row in range(count)])
    )
    whole = ImageTable(table, name="t")
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    edges = [0, *cuts, count]
    pieces = [table.slice(start, stop - start) for start, stop in itertools.pairwise(edges)]
    chunked = ImageTable(pa.concat_tables(pieces), name="other")
    order = np.array(data.draw(st.permutations(range(count))))
    taken = whole.take(order)
    assert chunked.fingerprint == whole.fingerprint
    assert chunked.row_fingerprint == whole.row_fingerprint
    assert taken.take(np.argsort(order)).fingerprint == whole.fingerprint
    assert (taken.fingerprint == whole.fingerprint) == (order.tolist() == list(range(count)))
    assert [chunked.image_bytes(row) for row in range(count)] == [
        whole.image_bytes(row) for row in range(count)
    ]


def test_fingerprint_sees_ids_labels_paths_and_lengths() -> None:
    def made(
        ids: Any = ("a", "b"), label: Any = (0, 1), data: Any = (b"x", b"y"), path: Any = None
    ) -> ImageTable:
        kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
        images = pa.array([{"bytes": item, "path": path} for item in data], kind)
        return ImageTable(pa.table({"id": list(ids), "image": images, "label": pa.array(label)}), name="t")

    variants = [
        made(),
        made(ids=("ab", "")),
        made(label=(1, 0)),
        made(label=(0, None)),
        made(label=([0], [1])),
        made(label=([0, 1], [])),
        made(data=(b"x", b"yy")),
        made(path="p"),
    ]
    assert len({table.fingerprint for table in variants}) == len(variants)
    assert made(data=(b"x", b"yy"), path="p").row_fingerprint == made().row_fingerprint
    assert len(made().fingerprint) == 16


def test_pickle_carries_the_rows_of_the_table_alone() -> None:
    whole = ImageTable(inline([str(r) for r in range(50)], [b"z" * 10_000] * 50, label=[0, 1] * 25), name="t")
    part = whole.take(np.array([3, 4]))
    sent = pickle.dumps(part)
    assert len(sent) < 100_000
    again = pickle.loads(sent)
    assert again.fingerprint == part.fingerprint
    assert again.classes == part.classes
    assert again.image_bytes(1) == part.image_bytes(1)


def test_with_classes_renumbers_by_name() -> None:
    table = ImageTable(inline(["a", "b"], [b"x", b"y"], label=[0, 1]), name="t", class_names=["dog", "owl"])
    assert table.with_classes(["cat", "dog", "owl"]).labels.tolist() == [1, 2]
    several = ImageTable(
        inline(["a", "b", "c"], [b"x"] * 3, label=pa.array([[0, 1], [], [1]])),
        name="t",
        class_names=["dog", "owl"],
    ).with_classes(["owl", "cat", "dog"])
    assert several.labels.tolist() == [[True, False, True], [False] * 3, [True, False, False]]
    with pytest.raises(DataError, match="'owl' is not among"):
        table.with_classes(["dog"])


def test_concatenate_appends_rows_and_refuses_equal_ids() -> None:
    first = ImageTable(inline(["a"], [b"x"], label=[0]), name="one")
    second = ImageTable(inline(["b"], [b"y"], label=[3]), name="two")
    both = concatenate([first, second], name="both")
    assert both.ids == ["a", "b"]
    assert both.labels.tolist() == [0, 3]
    assert both.image_bytes(1) == b"y"
    with pytest.raises(DataError, match="more than once"):
        concatenate([first, first], name="both")


def test_one_image_alone_is_a_table(tmp_path: Path, make_image: Any) -> None:
    (tmp_path / "x.jpg").write_bytes(make_image(kind="JPEG"))
    table = open_images(str(tmp_path / "x.jpg"), name="query")
    assert (table.name, table.ids, table.has_labels) == ("query", ["x.jpg"], False)


def test_renumbered_counts_the_classes_that_are_there(make_table: Any) -> None:
    table = make_table([4, 9, 4, 2], name="numbers")
    found = table.renumbered()
    assert found.labels.tolist() == [1, 2, 1, 0]
    assert found.class_names == ["2", "4", "9"]
    assert found.classes == 3
    assert found.ids == table.ids
    assert table.labels.tolist() == [4, 9, 4, 2]
    part = make_table([0, 2, 1, 2], class_names=["ant", "bee", "cow"]).take(np.array([3, 0])).renumbered()
    assert part.labels.tolist() == [1, 0]
    assert part.class_names == ["ant", "cow"]
    assert part.image_bytes(0) == make_table([0, 2, 1, 2]).image_bytes(3)


def test_classes_are_named_by_their_numbers(make_table: Any) -> None:
    table = make_table(pa.array([300, None, 20, 300]))
    found = table.named_by_number()
    assert found.table["label"].to_pylist() == [1, None, 0, 1]
    assert found.class_names == ["20", "300"]
    several = make_table(pa.array([[300, 9], [], None, [9]])).named_by_number()
    assert several.table["label"].to_pylist() == [[1, 0], [], None, [0]]
    assert several.classes == 2
    assert not make_table(pa.nulls(2)).named_by_number().has_labels
    with pytest.raises(DataError, match="have names"):
        found.named_by_number()


def test_renumbered_needs_one_class_an_image(make_table: Any) -> None:
    with pytest.raises(DataError, match="several labels each"):
        make_table(pa.array([[0], [0, 1]])).renumbered()
    with pytest.raises(DataError, match="row 1 has no label"):
        make_table(pa.array([0, None])).renumbered()


def test_one_label_is_a_list_of_one_among_more_classes(make_table: Any) -> None:
    table = make_table(pa.array([2, None, 0])).take(np.array([2, 1, 0]))
    lists = table.with_lists().among(5)
    assert lists.table["label"].to_pylist() == [[0], None, [2]]
    assert (lists.ids, lists.classes) == (table.ids, 5)
    assert lists.take(np.array([0, 2])).labels.tolist() == [
        [True, *[False] * 4],
        [False, False, True, False, False],
    ]
    assert pickle.loads(pickle.dumps(lists)).classes == 5
    assert lists.with_lists() is lists
