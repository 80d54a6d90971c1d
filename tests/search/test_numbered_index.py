"""Rows without ids are known by numbers that count up, which are not stored and stay what they are."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from bare_parts import MODEL, Bare, build_bare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from search_parts import draw_codes, draw_images, draw_vectors, write

from ray_retrieval.errors import ArtefactError, DataError, QueryError, RecipeError
from ray_retrieval.search import Index, add, build, compact, remove, rollback

BITS = 24


def added(index, source, **options):
    return add(index, source, **options)


@pytest.fixture
def index(tmp_path):
    build_bare(Bare(draw_codes(50, BITS)), tmp_path / "index", shards=3)
    return tmp_path / "index"


def test_nothing_is_stored_but_the_codes(index):
    names = {path.name for path in index.rglob("*") if path.is_file()}
    assert {name for name in names if not name.endswith(".json")} == {"codes.bin", "CURRENT"}
    opened = Index.open(index)
    assert opened.verify()
    assert opened.info()["columns"] == ["row", "id", "label", "path"]
    assert opened.manifest.next_id == 50
    found = opened.records([49, 0, 20]).to_pylist()
    assert found == [{"row": row, "id": str(row), "label": None, "path": None} for row in (49, 0, 20)]
    np.testing.assert_array_equal(opened.descriptors().data, draw_codes(50, BITS).data)


def test_ids_are_looked_up_as_text(index):
    opened = Index.open(index)
    assert [opened.row_of(name) for name in ("0", "17", "49")] == [0, 17, 49]
    assert [opened.row_of(name) for name in ("50", "-1", "007", "1.0", "x", "", "9" * 30)] == [None] * 7
    with pytest.raises(QueryError, match="'50'"):
        remove(index, ["3", "50"])
    with pytest.raises(QueryError, match="removed"):
        remove(index, ["3"]), Index.open(index).records([3])
    assert Index.open(index).row_of("3") is None
    with pytest.raises(QueryError, match="no row of 1 of the ids: '3'"):
        remove(index, ["3"])


def test_an_id_alone_is_that_id_and_not_its_digits(index):
    assert remove(index, "35").removed == 1
    opened = Index.open(index)
    assert [opened.row_of(name) for name in ("3", "5", "35")] == [3, 5, None]
    assert remove(index, np.array([3, 5])).removed == 2
    assert Index.open(index).row_of("3") is None
    assert remove(index, 36).removed == remove(index, np.int64(37)).removed == 1
    assert Index.open(index).row_of(36) is Index.open(index).row_of(37) is None


def test_numbers_go_on_and_are_never_given_twice(index):
    added(index, Bare(draw_codes(5, BITS, seed=1)))
    remove(index, ["54", "7"])
    compact(index)
    assert Index.open(index).row_of("53") == 52
    added(index, Bare(draw_codes(2, BITS, seed=2)))
    opened = Index.open(index)
    assert opened.records([52, 53, 54])["id"].to_pylist() == ["53", "55", "56"]
    assert (opened.row_of("54"), opened.row_of("56")) == (None, 54)
    assert opened.verify()


def test_ids_are_stored_only_of_shards_with_gaps(index):
    remove(index, ["20"])
    compact(index, shards=4)
    stored = [shard.entry.first_id for shard in Index.open(index).shards.values()]
    assert stored == [0, None, 25, 37]
    rollback(index)
    assert Index.open(index).row_of("21") == 21


def test_a_number_is_not_given_twice_after_a_rollback(index):
    added(index, Bare(draw_codes(5, BITS, seed=1)))
    rollback(index, 1)
    added(index, Bare(draw_codes(2, BITS, seed=2)))
    opened = Index.open(index)
    assert opened.records([50, 51])["id"].to_pylist() == ["55", "56"]
    assert opened.row_of("50") is None
    compact(index)
    assert opened.verify()
    assert Index.open(index).manifest.next_id == 57


def test_rows_without_ids_replace_none_and_codes_tell_no_duplicates(index):
    with pytest.raises(RecipeError, match=r"`replace`: rows without ids are like no row"):
        added(index, Bare(draw_codes(5, BITS)), replace=True)
    with pytest.raises(
        RecipeError, match=r"`skip_duplicates`: equal codes need not be those of equal images"
    ):
        added(index, Bare(draw_codes(5, BITS)), skip_duplicates=True)
    assert Index.open(index).rows == 50


def test_another_form_is_said_before_another_model(index):
    with pytest.raises(ArtefactError, match="it is an index of 24-bit codes, the rows are vectors of 8 dim"):
        added(index, Bare(draw_vectors(5, 8), model="another"))
    with pytest.raises(ArtefactError, match="made by model made-elsewhere, the rows by model another"):
        added(index, Bare(draw_codes(5, BITS), model="another"))


def test_compaction_stores_nothing_that_is_not_known(index):
    for removed in (["49"], ["3"]):
        remove(index, removed)
        compact(index, shards=2)
        opened = Index.open(index)
        for shard in opened.shards.values():
            stored = [name for name in shard.rows.schema.names if name != "row"]
            assert stored == ["id"]
            has_file = any(file.file == "rows.arrow" for file in shard.entry.files)
            assert has_file == (shard.entry.first_id is None)
        assert opened.info()["columns"] == ["row", "id", "label", "path"]
        assert opened.verify()


def test_filters_see_the_numbers(index):
    remove(index, ["3", "4"])
    for change in (lambda: None, lambda: compact(index)):
        change()
        opened = Index.open(index)
        query = draw_codes(50, BITS).take(np.array([9]))
        for where, expected in (
            ("id = 9", {"9"}),
            ("id in (1, 3, 5, 99)", {"1", "5"}),
            ("id < 6 and not id = 0", {"1", "2", "5"}),
            ("id = '9'", {"9"}),
            ("id in ('5', \"x\", '09', name, '', '-1', '99')", {"5"}),
            ("id < '2'", {"0", "1"}),
            ("id = '09' or id = nine", set()),
            ("id is null or label is not null", set()),
        ):
            rows = opened.search(query, 10, where=where).rows[0]
            found = opened.records(rows[rows >= 0])["id"].to_pylist()
            assert set(found) == expected
    assert opened.search(query, 5, where="row < 4").rows[0].tolist()[4:] == [-1]


def test_ids_and_numbers_do_not_mix(index, tmp_path):
    with pytest.raises(DataError, match="numbers its rows, and the rows to add have ids"):
        add(index, write(tmp_path / "e", draw_codes(4, BITS), draw_images(4), model=MODEL))
    build(tmp_path / "e", tmp_path / "named")
    with pytest.raises(DataError, match="knows its rows by ids"):
        added(tmp_path / "named", Bare(draw_codes(4, BITS)))


def test_labels_and_columns_without_ids(tmp_path):
    columns = pa.table({"label": pa.array([0, 1, 1]), "price": pa.array([1.5, None, 3.0])})
    build_bare(Bare(draw_vectors(3, 8), columns, class_names=["cat", "dog"]), tmp_path / "index")
    opened = Index.open(tmp_path / "index")
    assert opened.records([2]).to_pylist() == [{"row": 2, "id": "2", "label": 1, "path": None, "price": 3.0}]
    assert opened.living("label = dog and price > 1").tolist() == [2]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "remove", "compact"]), st.integers(0, 2**32 - 1)), max_size=6
    ),
    shards=st.integers(1, 3),
)
def test_as_a_dictionary_of_numbers(tmp_path_factory, steps, shards):
    index = Path(tmp_path_factory.mktemp("numbered")) / "index"
    codes = draw_codes(9, BITS, seed=5)
    build_bare(Bare(codes), index, shards=shards)
    known, following = dict(enumerate(codes.data.tolist())), 9
    for name, seed in steps:
        generator = np.random.default_rng(seed)
        if name == "add":
            coming = draw_codes(int(generator.integers(1, 9)), BITS, seed=seed)
            added(index, Bare(coming), shards=shards)
            known |= {following + place: code for place, code in enumerate(coming.data.tolist())}
            following += len(coming)
        elif name == "remove":
            gone = generator.choice(sorted(known), min(len(known) - 1, 3), replace=False)
            if len(gone):
                remove(index, [str(number) for number in gone])
            known = {number: code for number, code in known.items() if number not in gone}
        else:
            compact(index, shards=int(generator.integers(1, 4)), keep=1)
        opened = Index.open(index)
        rows = opened.living()
        assert opened.records(rows)["id"].to_pylist() == [str(number) for number in sorted(known)]
        assert opened.descriptors(rows).data.tolist() == [known[number] for number in sorted(known)]
        assert [opened.row_of(str(number)) for number in sorted(known)] == rows.tolist()
        opened.verify()
