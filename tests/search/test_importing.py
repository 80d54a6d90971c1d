"""Descriptors that were made elsewhere: whatever file they come in, the rows are what went in."""

import json
import pickle

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from bare_parts import Bare, build_bare
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from search_parts import draw_codes, draw_images, draw_vectors, write

from ray_retrieval.descriptors import Codes, Vectors, concatenate
from ray_retrieval.errors import ArtefactError, DataError, QueryError, RecipeError
from ray_retrieval.search import Index, add, build, export, imported, vector_files
from ray_retrieval.search.columns import with_metadata
from ray_retrieval.search.importing import elsewhere, made_elsewhere, queries_in

ROWS, DIMENSION, BITS = 60, 6, 20
VECTORS, CODES = draw_vectors(ROWS, DIMENSION).data, draw_codes(ROWS, BITS).data
IDS = [f"own-{row}" for row in range(ROWS)]
PRICES = [row / 4 for row in range(ROWS)]


def table_of(data, kind):
    """Rows as a table: descriptors of an Arrow type, and two more columns."""
    column = pa.array(
        [
            row.tobytes()
            if pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
            or pa.types.is_fixed_size_binary(kind)
            else row.tolist()
            for row in data
        ],
        kind,
    )
    return pa.table({"key": IDS, "embedding": column, "price": PRICES})


def write_table(path, table, group=17):
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=group)
    else:
        pyarrow.feather.write_feather(table, path, chunksize=group, compression="lz4")
    return path


def in_faiss(path, data, kind):
    """Rows as a file of FAISS, and the ids that it gives them."""
    given_ids = np.arange(ROWS)[::-1] * 7 + 3
    binary = data.dtype == np.uint8
    width = data.shape[1] * (8 if binary else 1)
    if kind == "flat":
        index, ids = (faiss.IndexBinaryFlat if binary else faiss.IndexFlatL2)(width), None
    elif kind == "idmap":
        flat = (faiss.IndexBinaryFlat if binary else faiss.IndexFlatIP)(width)
        index, ids = (faiss.IndexBinaryIDMap if binary else faiss.IndexIDMap2)(flat), given_ids
    else:
        index = (
            faiss.index_binary_factory(width, "BIVF4") if binary else faiss.index_factory(width, "IVF4,Flat")
        )
        index.train(data)
        ids = None if kind == "cells" else given_ids
    if ids is None:
        index.add(data)
    else:
        index.add_with_ids(data, ids)
    (faiss.write_index_binary if binary else faiss.write_index)(index, str(path))
    return path, ids


def all_of(rows, start=0, stop=None):
    tables, descriptors = zip(*rows.tables(start, len(rows) if stop is None else stop), strict=True)
    return pa.concat_tables(tables), concatenate(descriptors).data


def files(folder):
    """The same vectors in files of all kinds, with the settings that they need."""
    np.save(folder / "plain.npy", VECTORS)
    np.save(folder / "columns.npy", np.asfortranarray(VECTORS))
    np.save(folder / "double.npy", VECTORS.astype(np.float64))
    (folder / "CAPITALS.NPY").write_bytes((folder / "plain.npy").read_bytes())
    np.savez(folder / "plain.npz", features=VECTORS, ids=np.array(IDS))
    np.savez_compressed(folder / "packed.npz", features=VECTORS, other=np.zeros((2, 2, 2)))
    kinds = {
        "fixed.parquet": pa.list_(pa.float32(), DIMENSION),
        "lists.parquet": pa.list_(pa.float64()),
        "large.feather": pa.large_list(pa.float32()),
        "fixed.arrow": pa.list_(pa.float32(), DIMENSION),
    }
    for name, kind in kinds.items():
        write_table(folder / name, table_of(VECTORS, kind))
    in_faiss(folder / "flat.faiss", VECTORS, "flat")
    in_faiss(folder / "cells.index", VECTORS, "cells")
    graph = faiss.IndexHNSWFlat(DIMENSION, 8)
    graph.add(VECTORS)
    faiss.write_index(graph, str(folder / "graph.faiss"))
    refined = faiss.index_factory(DIMENSION, "SQ8,RFlat")
    refined.train(VECTORS)
    refined.add(VECTORS)
    faiss.write_index(refined, str(folder / "refined.faiss"))
    return sorted(path for path in folder.iterdir())


def test_every_kind_of_file_gives_the_rows_that_went_in(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_files, "BLOCK_ROWS", 7)
    for path in files(tmp_path):
        rows = pickle.loads(pickle.dumps(imported(path)))
        assert len(rows) == ROWS, path.name
        _, found = all_of(rows)
        np.testing.assert_array_equal(found, VECTORS, err_msg=path.name)
        _, some = all_of(rows, 13, 41)
        np.testing.assert_array_equal(some, VECTORS[13:41], err_msg=path.name)


@pytest.mark.parametrize("kind", [pa.binary(3), pa.binary(), pa.large_binary(), pa.list_(pa.uint8(), 3)])
def test_codes_in_columns(tmp_path, kind):
    path = write_table(tmp_path / "codes.parquet", table_of(CODES, kind))
    rows = imported(path, column="embedding", bits=BITS, ids="key")
    table, found = all_of(rows)
    np.testing.assert_array_equal(found, CODES)
    assert table["id"].to_pylist() == IDS
    assert table["price"].to_pylist() == PRICES


@pytest.mark.parametrize("data", [VECTORS, CODES], ids=["vectors", "codes"])
@pytest.mark.parametrize("kind", ["flat", "idmap", "cells", "cells with ids"])
def test_files_of_faiss(tmp_path, data, kind):
    path, ids = in_faiss(tmp_path / "made.faiss", data, kind)
    rows = imported(path, **({"bits": BITS} if data is CODES else {}))
    order = np.argsort(ids) if kind == "cells with ids" else np.arange(ROWS)
    np.testing.assert_array_equal(all_of(rows)[1], data[order])
    expected = None if ids is None else [str(number) for number in ids[order]]
    assert (None if rows.ids() is None else rows.ids().to_pylist()) == expected


@pytest.mark.parametrize("factory", ["IVF4,PQ2x4fs", "PCA4,IVF4,PQ2x4fs", "IVF4,RQ2x4fs_32_Nrq2x4"])
def test_cells_of_4_bit_codes_come_back_as_they_are_decoded(tmp_path, factory):
    """FAISS itself, which does not read what decodes them, would end the process."""
    vectors = np.random.default_rng(0).standard_normal((100, 8), np.float32)
    index = faiss.index_factory(8, factory)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "cells.faiss"))
    faiss.extract_index_ivf(index).set_direct_map_type(faiss.DirectMap.Array)
    decoded = index.reconstruct_n(0, 100)
    decoded /= np.linalg.norm(decoded, axis=1, keepdims=True)
    found = all_of(imported(tmp_path / "cells.faiss", normalise=True))[1]
    np.testing.assert_allclose(found, decoded, rtol=1e-5, atol=1e-6)


def test_cells_that_hold_equal_rows_once_are_refused(tmp_path):
    index = faiss.index_factory(DIMENSION, "IVF4,FlatDedup")
    index.train(VECTORS)
    index.add(np.concatenate([VECTORS, VECTORS[:7]]))
    faiss.write_index(index, str(tmp_path / "cells.faiss"))
    held = len(np.unique(VECTORS, axis=0))
    with pytest.raises(DataError, match=f"cells.faiss: its cells hold {held} of its {ROWS + 7} rows"):
        imported(tmp_path / "cells.faiss")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_of_any_files_is_that_of_the_array(tmp_path, monkeypatch, data):
    """Of several files of several kinds, read in blocks of any size, some rows or all."""
    monkeypatch.setattr(vector_files, "BLOCK_ROWS", data.draw(st.integers(1, 30)))
    cuts = sorted(data.draw(st.lists(st.integers(1, ROWS - 1), max_size=3, unique=True)))
    paths = []
    for number, (first, last) in enumerate(zip([0, *cuts], [*cuts, ROWS], strict=True)):
        some = table_of(VECTORS, pa.list_(pa.float32(), DIMENSION)).slice(first, last - first)
        suffix = data.draw(st.sampled_from([".parquet", ".feather"]))
        paths.append(write_table(tmp_path / f"{number}{suffix}", some, data.draw(st.integers(1, 30))))
    rows = imported(paths, ids="key", labels=[row % 3 for row in range(ROWS)])
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, ROWS - 1), min_size=1))), np.int64)
    if data.draw(st.booleans()):
        rows = rows.some(kept, np.array([5, 6, 7]))
    else:
        kept, rows = np.arange(ROWS), rows.some(None, np.array([5, 6, 7]))
    start = data.draw(st.integers(0, len(kept) - 1))
    stop = data.draw(st.integers(start + 1, len(kept)))
    table, found = all_of(rows, start, stop)
    np.testing.assert_array_equal(found, VECTORS[kept[start:stop]])
    assert table.schema.equals(rows.schema)
    assert table.to_pydict() == {
        "id": [IDS[row] for row in kept[start:stop]],
        "label": [row % 3 + 5 for row in kept[start:stop]],
        "price": [PRICES[row] for row in kept[start:stop]],
    }
    assert rows.ids().to_pylist() == [IDS[row] for row in kept]


def test_an_index_of_files_is_that_of_embeddings(tmp_path):
    """The same hits, ids and labels as an index of embeddings of the same rows, as it grows too."""
    images = draw_images(ROWS)
    names, ids = list("abcdefg"), images["id"].to_pylist()
    write(tmp_path / "embeddings", Vectors(VECTORS), images, class_names=names)
    build(tmp_path / "embeddings", tmp_path / "first", shards=2)
    labels = [names[row % 7] for row in range(ROWS)]
    half = ROWS // 2
    build(imported(VECTORS[:half], ids=ids[:half], labels=labels[:half]), tmp_path / "second", shards=3)
    add(tmp_path / "second", imported(VECTORS[half:], ids=ids[half:], labels=labels[half:]), shards=2)
    first, second = Index.open(tmp_path / "first"), Index.open(tmp_path / "second")
    assert made_elsewhere(second.model)
    assert second.verify()
    assert second.class_names == names
    queries = draw_vectors(9, DIMENSION, seed=3)
    for where in (None, "label in (b, d)"):
        found, expected = second.search(queries, 8, where=where), first.search(queries, 8, where=where)
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.distances, expected.distances)
    whole = np.arange(ROWS)
    assert second.records(whole).select(["id", "label"]) == first.records(whole).select(["id", "label"])
    same = add(
        tmp_path / "second", imported(VECTORS[:5], ids=[f"x{n}" for n in range(5)]), skip_duplicates=True
    )
    assert (same.added, same.skipped) == (0, 5)
    with pytest.raises(DataError, match="2 of the ids are in the index already: 'image-0000', 'image-0001'"):
        add(tmp_path / "second", imported(VECTORS[:2], ids=ids[:2]))


def test_vectors_are_of_length_1_or_made_so(tmp_path):
    long = VECTORS * np.linspace(0.5, 3, ROWS, dtype=np.float32)[:, None]
    with pytest.raises(
        DataError, match=r"the array: the vector in row 0 is of length 0.5, not 1 .*`normalise`"
    ):
        build(imported(long), tmp_path / "index")
    np.testing.assert_allclose(all_of(imported(long, normalise=True))[1], VECTORS, atol=1e-6)
    half = VECTORS.astype(np.float16)
    np.testing.assert_array_equal(all_of(imported(half))[1], half.astype(np.float32))
    for wrong, message in ((0, "row 7 is of length 0"), (np.nan, "row 7 holds what is no finite number")):
        long[7] = wrong
        with pytest.raises(DataError, match=message):
            all_of(imported(long, normalise=True))


def test_rows_without_ids_have_no_column_of_them(tmp_path):
    rows = imported(CODES, bits=BITS)
    assert rows.schema.names == []
    assert rows.ids() is None
    build(rows, tmp_path / "index", shards=3)
    index = Index.open(tmp_path / "index")
    assert index.verify()
    np.testing.assert_array_equal(index.descriptors().data, CODES)
    assert index.search(index.descriptors([41]), 1).distances[0, 0] == 0
    assert index.records([41])["id"].to_pylist() == ["41"]
    add(tmp_path / "index", imported(CODES[:5], bits=BITS))
    assert Index.open(tmp_path / "index").row_of("64") == 64
    with pytest.raises(DataError, match="numbers its rows, and the rows to add have ids"):
        add(tmp_path / "index", imported(CODES, bits=BITS, ids=IDS))


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (["dog", "cat", None], [1, 0, None], ["cat", "dog"]),
        ([4, None, 0], [4, None, 0], None),
        ([["dog", "cat"], [], None], [[1, 0], [], None], ["cat", "dog"]),
        ([[3, 1], [2], []], [[3, 1], [2], []], None),
        (pa.array(["dog", None, "dog"]).dictionary_encode(), [0, None, 0], ["dog"]),
        ([None, None, None], [None, None, None], None),
    ],
)
def test_labels_are_names_or_numbers_one_or_several(tmp_path, labels, expected, names):
    rows = imported(VECTORS[:3], labels=labels)
    assert all_of(rows)[0]["label"].to_pylist() == expected
    assert rows.class_names == names
    table = pa.table({"vector": pa.array(VECTORS[:3].tolist()), "kind": labels})
    pq.write_table(table, tmp_path / "made.parquet")
    rows = imported(tmp_path / "made.parquet", labels="kind")
    assert all_of(rows)[0]["label"].to_pylist() == expected
    assert (rows.class_names, rows.schema.names) == (names, ["label"])


def test_ids_and_labels_in_files_beside(tmp_path):
    (tmp_path / "ids.txt").write_text("".join(f"{name}\n" for name in IDS), encoding="utf-8")
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    np.save(tmp_path / "ids.npy", np.array(IDS))
    (tmp_path / "ids.bom").write_bytes("".join(f"{name}\r\n" for name in IDS).encode("utf-8-sig"))
    (tmp_path / "ids.NPY").write_bytes((tmp_path / "ids.npy").read_bytes())
    for suffix in ("txt", "json", "npy", "NPY", "bom"):
        assert imported(VECTORS, ids=str(tmp_path / f"ids.{suffix}")).ids().to_pylist() == IDS
    (tmp_path / "labels.txt").write_text("3\n" * ROWS)
    rows = imported(VECTORS, labels=str(tmp_path / "labels.txt"))
    assert (rows.class_names, set(all_of(rows)[0]["label"].to_pylist())) == (None, {3})
    (tmp_path / "labels.txt").write_text("3\n\n" * (ROWS // 2))
    rows = imported(VECTORS, labels=str(tmp_path / "labels.txt"))
    assert (rows.class_names, all_of(rows)[0]["label"].to_pylist()) == (None, [3, None] * (ROWS // 2))


def test_what_made_them_is_known_by_a_name(tmp_path):
    build(imported(VECTORS, ids=IDS, model_name="clip"), tmp_path / "index")
    model = Index.open(tmp_path / "index").model
    assert model.startswith("elsewhere:clip:")
    assert model == elsewhere("clip", imported(VECTORS).form)
    with pytest.raises(
        ArtefactError, match=r"made by something else \('clip'\), the rows by something else .*`model_name`"
    ):
        add(tmp_path / "index", imported(VECTORS, ids=[f"b{row}" for row in range(ROWS)]))
    with pytest.raises(RecipeError, match="one line of up to 80 letters"):
        imported(VECTORS, model_name="two\nlines")
    write(tmp_path / "embeddings", Vectors(VECTORS), draw_images(ROWS))
    table = pa.table({"id": IDS, "vector": pa.array(VECTORS.tolist())})
    table = table.cast(with_metadata(table.schema, "model-a"))
    pq.write_table(table, tmp_path / "ours.parquet")
    build(tmp_path / "embeddings", tmp_path / "ours")
    assert add(tmp_path / "ours", imported(tmp_path / "ours.parquet")).added == ROWS


def test_queries_fit_the_index(tmp_path):
    form = imported(CODES, bits=BITS).form
    np.save(tmp_path / "queries.npy", CODES[:4])
    ids, queries = queries_in(tmp_path / "queries.npy", form)
    assert (ids, queries.bits) == (["0", "1", "2", "3"], BITS)
    with pytest.raises(QueryError, match="the index holds 20-bit codes, the file vectors of 6 dimensions"):
        queries_in(VECTORS, form)


def test_queries_are_of_the_model_of_the_index(tmp_path):
    """As far as the file says what made them, or the user."""
    build(imported(VECTORS, model_name="clip"), tmp_path / "index")
    build(imported(VECTORS, model_name="other"), tmp_path / "other")
    index = Index.open(tmp_path / "index")
    for name in ("index", "other"):
        export(tmp_path / name, tmp_path / f"export-{name}", "parquet")
    for file, told in (
        (VECTORS, {}),
        (VECTORS, {"model_name": "clip"}),
        (tmp_path / "export-index", {}),
        (tmp_path / "export-index" / "rows.parquet", {}),
    ):
        assert len(queries_in(file, index.form, index.model, **told)[1]) == ROWS
    for file, told in (
        (VECTORS, {"model_name": "other"}),
        (tmp_path / "export-other", {}),
        (tmp_path / "export-other" / "rows.parquet", {}),
    ):
        with pytest.raises(QueryError, match=r"made by something else \('clip'\), the queries .*\('other'\)"):
            queries_in(file, index.form, index.model, **told)
    with pytest.raises(QueryError, match="the index holds 20-bit codes, the file 24-bit codes"):
        queries_in(CODES & 0xF0, imported(CODES, bits=BITS).form, bits=24)


def test_metadata_of_others_is_not_taken_for_ours(tmp_path):
    table = pa.table({"vector": VECTORS[:3].tolist(), "label": [0, 1, 2]})
    theirs = {"model": "clip", "class_names": "cat,dog"}
    pq.write_table(table.replace_schema_metadata(theirs), tmp_path / "theirs.parquet")
    rows = imported(tmp_path / "theirs.parquet")
    assert made_elsewhere(rows.model)
    assert rows.class_names is None
    for wrong in ("cat,dog", '{"0": "cat"}', "[1, 2]"):
        ours = table.replace_schema_metadata({"ray_retrieval.class_names": wrong})
        pq.write_table(ours, tmp_path / "ours.parquet")
        with pytest.raises(DataError, match=r"ours.parquet: the metadata .* a JSON list of text"):
            imported(tmp_path / "ours.parquet")


def test_files_of_which_one_says_less(tmp_path):
    """A label that a file lacks is unknown; an id is missed."""
    for name, columns in (("a", ["id", "label"]), ("b", ["id"]), ("c", [])):
        known = {"id": [f"{name}{row}" for row in range(3)], "label": ["cat", "dog", "cat"]}
        table = pa.table({"vector": VECTORS[:3].tolist(), **{key: known[key] for key in columns}})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    build(imported([tmp_path / "a.parquet", tmp_path / "b.parquet"]), tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert index.records(np.arange(6))["label"].to_pylist() == [0, 1, 0, None, None, None]
    with pytest.raises(DataError, match=r"c.parquet: there is no column 'id' of ids"):
        imported([tmp_path / "a.parquet", tmp_path / "c.parquet"])
    np.save(tmp_path / "d.npy", VECTORS)
    with pytest.raises(DataError, match=r"d.npy: there is no column 'id' of ids"):
        imported([tmp_path / "a.parquet", tmp_path / "d.npy"])


def test_a_mapped_array_is_pickled_as_what_it_shows(tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    for given_rows in (mapped, mapped[7:20]):
        rows = pickle.loads(pickle.dumps(imported(given_rows)))
        np.testing.assert_array_equal(all_of(rows)[1], given_rows)


def test_another_process_stands_in_another_folder(tmp_path, monkeypatch):
    paths = files(tmp_path)
    build(imported(VECTORS), tmp_path / "index")
    export(tmp_path / "index", tmp_path / "export", "npy")
    monkeypatch.chdir(tmp_path)
    pickled = [pickle.dumps(imported(path.name)) for path in [*paths, tmp_path / "export"]]
    monkeypatch.chdir("/")
    for data in pickled:
        np.testing.assert_array_equal(all_of(pickle.loads(data))[1], VECTORS)


def test_columns_whose_values_do_not_fit_into_one_type_are_refused(tmp_path):
    for name, prices in (("a", [2**60 + 1]), ("b", [0.5]), ("c", [3])):
        table = pa.table({"vector": VECTORS[:1].tolist(), "price": prices})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"b.parquet: column 'price' holds double, in other files int64"):
        imported([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert len(imported([tmp_path / "a.parquet", tmp_path / "c.parquet"])) == 2


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_views_of_text_are_text(tmp_path, ending):
    """Which other programs write by default, and of which Arrow itself picks no rows."""
    views = pa.table(
        {
            "vector": pa.array(VECTORS.tolist(), pa.list_(pa.float32())),
            "key": pa.array(IDS, pa.string_view()),
            "species": pa.array(["owl", "jay"] * (ROWS // 2), pa.string_view()),
            "path": pa.array([f"{row}.jpg" for row in range(ROWS)], pa.string_view()),
            "raw": pa.array([b"1"] * ROWS, pa.binary_view()),
            "tags": pa.array([["x", None], None] * (ROWS // 2), pa.list_(pa.string_view())),
        }
    )
    rows = imported(write_table(tmp_path / f"views.{ending}", views), ids="key", labels="species")
    build(rows, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert index.living("label = owl and tags = x and path = '4.jpg'").tolist() == [4]
    hits = index.search(Vectors(VECTORS[:3]), 1, where="path > '0'")
    assert index.records(hits.rows[:, 0]).select(["id", "path", "raw", "tags"]).to_pylist() == [
        {"id": IDS[row], "path": f"{row}.jpg", "raw": b"1", "tags": [["x", None], None][row % 2]}
        for row in range(3)
    ]
    more = imported(VECTORS[:2], ids=pa.array(["a", "b"], pa.string_view()))
    assert add(tmp_path / "index", more).added == 2


def test_categories_in_lists_are_text(tmp_path):
    """As data frames hold the tags of an image."""
    words = pa.array(["x", "y"] * ROWS).dictionary_encode()
    lists = pa.ListArray.from_arrays(pa.array(range(0, 2 * ROWS + 1, 2), pa.int32()), words)
    table = pa.table({"vector": VECTORS.tolist(), "label": lists, "tags": lists})
    build(imported(write_table(tmp_path / "tagged.arrow", table)), tmp_path / "index", shards=2)
    index = Index.open(tmp_path / "index")
    assert index.class_names == ["x", "y"]
    assert index.living("tags = y and label = x").tolist() == list(range(ROWS))
    assert index.records([3])["tags"].to_pylist() == [["x", "y"]]


def test_columns_of_which_no_rows_can_be_picked_are_refused(tmp_path):
    names = pa.DictionaryArray.from_arrays(pa.array([0] * ROWS), pa.array(["x"], pa.string_view()))
    for number, column in enumerate([names, pc.run_end_encode(pa.array([1] * ROWS))]):
        path = tmp_path / f"{number}.arrow"
        table = pa.table({"vector": pa.array(VECTORS.tolist(), pa.list_(pa.float32())), "odd": column})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(DataError, match=rf"{path}: column 'odd' holds .*, of which no rows"):
            build(imported(path), tmp_path / "index")
    with pytest.raises(DataError, match="bare rows: column 'odd' holds run_end_encoded"):
        build_bare(Bare(Vectors(VECTORS), table.select(["odd"])), tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_what_is_asked_for_stands_in_place_of_a_column_of_that_name(tmp_path):
    table = pa.table(
        {"vector": VECTORS[:2].tolist(), "id": [1, 2], "label": [7, 8], "key": ["x", "y"], "kind": ["b", "a"]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = imported(tmp_path / "a.parquet", ids="key", labels="kind")
    assert all_of(rows)[0].to_pydict() == {"id": ["x", "y"], "label": [1, 0]}
    rows = imported(tmp_path / "a.parquet", ids=["p", "q"], labels=[3, 4])
    assert all_of(rows)[0].select(["id", "label"]).to_pydict() == {"id": ["p", "q"], "label": [3, 4]}


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (["12", "3", "12"], [12, 3, 12], None),
        (["007", "12", "3"], [0, 1, 2], ["007", "12", "3"]),
        (["3", "cat", "3"], [0, 1, 0], ["3", "cat"]),
    ],
)
def test_text_is_numbers_wherever_it_comes_from(tmp_path, labels, expected, names):
    """One rule for a file of lines, a column of text, and a list."""
    pq.write_table(pa.table({"vector": VECTORS[:3].tolist(), "kind": labels}), tmp_path / "a.parquet")
    (tmp_path / "labels.txt").write_text("\n".join(labels))
    for rows in (
        imported(VECTORS[:3], labels=labels),
        imported(VECTORS[:3], labels=str(tmp_path / "labels.txt")),
        imported(tmp_path / "a.parquet", labels="kind"),
    ):
        assert all_of(rows)[0]["label"].to_pylist() == expected
        assert rows.class_names == names


def test_lines_are_those_of_an_editor(tmp_path):
    (tmp_path / "ids.txt").write_bytes("\ufeffa\u2028b\r\nc\x0cd\n\n".encode())
    assert imported(VECTORS[:3], ids=str(tmp_path / "ids.txt")).ids().to_pylist() == [
        "a\u2028b",
        "c\x0cd",
        "",
    ]


def test_values_of_a_npz_file_in_another_order_of_bytes(tmp_path):
    np.savez(tmp_path / "a.npz", v=VECTORS, price=np.arange(ROWS, dtype=">i4"))
    table, found = all_of(imported(tmp_path / "a.npz"))
    np.testing.assert_array_equal(found, VECTORS)
    assert table["price"].to_pylist() == list(range(ROWS))


def test_codes_in_cells_of_faiss_are_read_a_cell_at_a_time(tmp_path, monkeypatch):
    path, ids = in_faiss(tmp_path / "made.faiss", CODES, "cells with ids")
    rows = imported(path, bits=BITS)
    monkeypatch.setattr(faiss.IndexBinaryIVF, "reconstruct_c", None, raising=False)
    monkeypatch.setattr(faiss.IndexBinary, "reconstruct_c", None, raising=False)
    monkeypatch.setattr(vector_files, "BLOCK_ROWS", 7)
    np.testing.assert_array_equal(all_of(rows, 5, 50)[1], CODES[np.argsort(ids)[5:50]])


def test_no_rows_are_refused(tmp_path):
    for rows in (VECTORS[:0], CODES[:0]):
        with pytest.raises(ArtefactError, match=r"there are no rows to index \(give some\)"):
            build(imported(rows), tmp_path / "index")


def test_columns_of_our_names_hold_descriptors_only_if_their_type_does(tmp_path):
    table = table_of(VECTORS, pa.list_(pa.float32())).append_column("code", pa.array(IDS))
    rows = imported(write_table(tmp_path / "other.parquet", table))
    assert all_of(rows)[0]["code"].to_pylist() == IDS
    named = table.rename_columns(["key", "vector", "price", "code"]).append_column(
        "embedding", table["embedding"]
    )
    assert "embedding" in imported(write_table(tmp_path / "own.parquet", named)).schema.names
    bytes_of_any_length = table_of(CODES, pa.binary()).rename_columns(["key", "code", "price"])
    assert (
        imported(write_table(tmp_path / "codes.parquet", bytes_of_any_length)).form.size == 8 * CODES.shape[1]
    )


def broken(folder):
    """Files that are not what they should be, with what is said of them."""
    np.save(folder / "flat.npy", VECTORS.ravel())
    np.savez(folder / "complex.npz", v=VECTORS, z=np.zeros(ROWS, np.complex64))
    for name in (
        "folder.npy",
        "folder.faiss",
        "folder.index",
        "folder.parquet",
        "folder.arrow",
        "folder.npz",
    ):
        (folder / name).mkdir()
    pq.write_table(pa.table({"v": pa.array([], pa.list_(pa.float32()))}), folder / "empty.parquet")
    (folder / "large.json").write_text(json.dumps([2**70] * ROWS))
    (folder / "named.json").write_text(json.dumps(dict.fromkeys(IDS, 1)))
    np.save(folder / "plain.npy", VECTORS)
    np.save(folder / "ints.npy", np.ones((3, 4), np.int32))
    (folder / "text.npy").write_text("no array")
    (folder / "cut.npy").write_bytes((folder / "plain.npy").read_bytes()[:200])
    np.save(folder / "objects.npy", np.array([[{}]]), allow_pickle=True)
    (folder / "text.parquet").write_text("no table")
    (folder / "text.feather").write_text("no table")
    (folder / "text.faiss").write_text("no index")
    (folder / "text.npz").write_text("no archive")
    np.savez(folder / "several.npz", a=VECTORS, b=VECTORS)
    np.savez(folder / "turned.npz", a=np.asfortranarray(VECTORS))
    rows = [[1.0, 0.0], [1.0], None]
    pq.write_table(pa.table({"v": rows[:2], "id": [1, 2]}), folder / "ragged.parquet")
    pq.write_table(pa.table({"v": [rows[0], rows[2]]}), folder / "null.parquet")
    pq.write_table(pa.table({"v": [[1.0, None], rows[0]]}), folder / "hole.parquet")
    pq.write_table(pa.table({"v": [rows[0]], "row": [1]}), folder / "row.parquet")
    pq.write_table(pa.table({"a": [rows[0]], "b": [rows[0]]}), folder / "two.parquet")
    for name in ("vector", "b"):
        columns = [pa.array([rows[0]]), pa.array([rows[0]]), pa.array([1])]
        pq.write_table(pa.table(columns, names=["vector", name, "b"]), folder / f"same-{name}.parquet")
    pq.write_table(pa.table({"name": ["x"]}), folder / "none.parquet")
    pq.write_table(pa.table({"v": [rows[0]] * 2, "id": ["x", "x"]}), folder / "twice.parquet")
    pq.write_table(pa.table({"v": [rows[0]] * 2, "id": ["x", None]}), folder / "noid.parquet")
    pq.write_table(pa.table({"v": [rows[0]], "label": [1.5]}), folder / "label.parquet")
    pq.write_table(pa.table({"v": [rows[0]], "label": [-1]}), folder / "minus.parquet")
    pq.write_table(pa.table({"v": [rows[0]], "path": [3]}), folder / "path.parquet")
    beyond = pa.array([2**63 + 5], pa.uint64())
    pq.write_table(pa.table({"v": [rows[0]], "kind": beyond}), folder / "beyond.parquet")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nowhere.npy", {}, "nowhere.npy: the file is missing"),
        ("images.csv", {}, r"its name ends in '.csv' \(known are .npy, "),
        ("flat.npy", {}, r"an array \[rows, width\], got \[360\]"),
        ("ints.npy", {}, "floating-point numbers, got int32"),
        ("complex.npz", {}, "complex.npz: cannot be read"),
        ("folder.npy", {}, "a folder, and no export of an index"),
        ("folder.faiss", {}, "a folder, and no export of an index"),
        ("folder.index", {}, "a folder, and no export of an index"),
        ("folder.parquet", {}, "a folder, and no export of an index"),
        ("folder.arrow", {}, "a folder, and no export of an index"),
        ("folder.npz", {}, "a folder, and no export of an index"),
        ("empty.parquet", {}, "empty.parquet: there are no rows"),
        ("plain.npy", {"ids": "large.json"}, "large.json: cannot be read"),
        ("plain.npy", {"ids": "text.npy"}, "text.npy: it is not in NumPy's format"),
        ("plain.npy", {"ids": "named.json"}, "named.json: cannot be read: a list is expected, got dict"),
        ("text.npy", {}, "text.npy: it is not in NumPy's format .save it with numpy.save"),
        ("cut.npy", {}, "cut.npy: cannot be read"),
        ("objects.npy", {}, "objects.npy: it holds Python objects .save it as numbers or text"),
        ("text.parquet", {}, "text.parquet: cannot be read"),
        ("text.feather", {}, "text.feather: cannot be read"),
        ("text.faiss", {}, "text.faiss: FAISS does not read it"),
        ("text.npz", {}, "text.npz: cannot be read"),
        ("several.npz", {}, "2 columns may hold the descriptors: a, b .*`column`"),
        ("several.npz", {"column": "c"}, "no column 'c'; there are: a, b"),
        ("turned.npz", {}, "column after column"),
        ("ragged.parquet", {}, "column 'v': row 1 holds 1 values, the first row 2"),
        ("null.parquet", {}, "column 'v': row 1 holds nothing"),
        ("hole.parquet", {}, "row 0 holds a list with nothing at a place"),
        ("row.parquet", {}, "column 'row' has a name that an index needs"),
        ("two.parquet", {}, "2 columns may hold"),
        ("same-vector.parquet", {}, "same-vector.parquet: columns stand more than once: 'vector'"),
        ("same-b.parquet", {"column": "vector"}, "same-b.parquet: columns stand more than once: 'b'"),
        ("two.parquet", {"column": "a", "ids": "c"}, "c: neither a file nor a column; columns are: b"),
        ("none.parquet", {}, "no column holds descriptors; there are: name"),
        ("none.parquet", {"column": "name"}, "column 'name' holds string, no descriptors"),
        ("twice.parquet", {}, "1 ids come more than once: 'x'"),
        ("noid.parquet", {}, "row 1 has no id"),
        ("label.parquet", {}, "labels are class names or numbers, got double"),
        ("minus.parquet", {}, "label -1 is no class"),
        ("beyond.parquet", {"labels": "kind"}, "column 'kind': labels are .* value 9223372036854775813 not"),
        ("path.parquet", {}, "'path' says where an image lies, got int64"),
        ("two.parquet", {"column": "a", "bits": 8}, "values are no codes"),
        ("two.parquet", {"column": "a", "bit": 8}, "unknown key 'bit'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, name, settings, message):
    broken(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((DataError, RecipeError, ArtefactError), match=message) as caught:
        build(imported(tmp_path / name, **settings), tmp_path / "index")
    assert not any(unwanted in str(caught.value) for unwanted in ("\n", "pickle", ".cpp"))
    assert not (tmp_path / "index" / "CURRENT").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ids": ["a", 1]}, "the ids are no column: .* one value a row, all of one kind"),
        ({"labels": np.ones((2, 3), np.bool_)}, "the labels are no column: .* a list of its classes"),
        ({"labels": [2**64, 1]}, "the labels are no column: "),
    ],
)
def test_values_that_are_no_column_are_said_in_one_line(values, message):
    with pytest.raises(DataError, match=message) as caught:
        imported(CODES[:2], **values)
    assert "\n" not in str(caught.value)


def test_codes_have_as_many_bits_as_is_said(tmp_path):
    with pytest.raises(RecipeError, match="codes of 30 bits are 4 bytes a row, got 3"):
        imported(CODES, bits=30)
    with pytest.raises(DataError, match=r"row \d+ has more than 18 bits: the last 6 of its bytes"):
        all_of(imported(CODES, bits=18))
    with pytest.raises(RecipeError, match="`normalise`: codes have no length"):
        imported(CODES, normalise=True)
    with pytest.raises(DataError, match="3 values of uint8 a row, in the array 6 of float32"):
        imported([VECTORS, CODES])
    with pytest.raises(DataError, match=r"a list of numbers is no file \(give an array"):
        imported([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(DataError, match=r"Codes are no file \(give their array: descriptors\.data\)"):
        imported(Codes(CODES, 24))


def test_arrays_are_imported_before_they_are_built_or_added(tmp_path):
    for rows in (VECTORS, VECTORS.tolist(), Vectors(VECTORS)):
        with pytest.raises(DataError, match=r"an embeddings directory, or what imported\(…\) makes"):
            build(rows, tmp_path / "index")
    build(imported(VECTORS), tmp_path / "index")
    with pytest.raises(DataError, match=r"got ndarray \(give imported\(array\)\)"):
        add(tmp_path / "index", VECTORS)
