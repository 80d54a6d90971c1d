"""The exact scan against a stable sort, FAISS and itself."""

import itertools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_parts import assert_same

from ray_retrieval.errors import ArtefactError, QueryError
from ray_retrieval.search import scan as module
from ray_retrieval.search.hits import NO_DISTANCE, NO_ROW, Hits
from ray_retrieval.search.scan import Segment, scan, scan_segments, to_words, words_per_row
from ray_retrieval.search.threads import run_all


def nearest(database, queries, bits, k):
    """What a search must return, by a stable sort of all distances."""
    unpack = [np.unpackbits(codes, axis=1)[:, :bits].astype(np.int64) for codes in (database, queries)]
    distances = (unpack[1][:, None, :] != unpack[0][None, :, :]).sum(axis=2)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, k - order.shape[1]))
    found = np.take_along_axis(distances, order, axis=1)
    return Hits(
        np.pad(found, missing, constant_values=NO_DISTANCE).astype(np.int32),
        np.pad(order, missing, constant_values=NO_ROW).astype(np.int64),
    )


def codes(generator, count, bits, distinct=None):
    """Packed codes; few distinct ones make many ties."""
    drawn = np.packbits(generator.integers(0, 2, (distinct or count, bits), np.uint8), axis=1)
    return drawn[generator.integers(0, distinct, count)] if distinct else drawn


def segments_of(words, cuts):
    edges = [0, *sorted(cuts), len(words)]
    return [Segment(words[a:b], a) for a, b in itertools.pairwise(edges)]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), bits=st.integers(1, 130), count=st.integers(0, 300), seed=st.integers(0, 2**32 - 1))
def test_any_scan_equals_a_stable_sort(data, bits, count, seed):
    generator = np.random.default_rng(seed)
    database = codes(generator, count, bits, data.draw(st.sampled_from([None, 1, 3, 20])))
    queries = codes(generator, data.draw(st.integers(0, 40)), bits, data.draw(st.sampled_from([None, 2])))
    k = data.draw(st.sampled_from([1, 2, 5, max(count, 1), count + 7]) | st.integers(1, 400))
    cuts = data.draw(st.lists(st.integers(0, count), max_size=4))
    expected = nearest(database, queries, bits, k)
    # Shares and groups are made small, so that few rows and queries are split as many are.
    with mock.patch.multiple(module, _SMALLEST_WORK=1, _BUFFERED_HITS=data.draw(st.sampled_from([1, 1000]))):
        for threads in (1, data.draw(st.integers(2, 5))):
            assert_same(scan(database, queries, bits, k, threads=threads), expected)
            segments = segments_of(to_words(database, bits), cuts)
            assert_same(scan_segments(segments, queries, bits, k, threads=threads), expected)


@pytest.mark.parametrize("bits", [200, 256, 257, 512, 700])
def test_wide_codes_equal_a_stable_sort(bits):
    generator = np.random.default_rng(bits)
    database, queries = codes(generator, 333, bits), codes(generator, 9, bits)
    database[200:] = database[:133]
    for k in (1, 10, 333, 340):
        assert_same(scan(database, queries, bits, k), nearest(database, queries, bits, k))


@pytest.mark.parametrize("k", [1, 10, 1000])
def test_rows_in_any_order_of_distance(k):
    """Ascending, descending and equal distances fill and empty the buffer of hits in different ways."""
    ladder = np.packbits(np.tri(64, 64, dtype=np.uint8), axis=1).repeat(70, axis=0)
    queries = np.zeros((2, 8), np.uint8)
    queries[1] = 255
    for database in (ladder, ladder[::-1], np.zeros_like(ladder)):
        assert_same(scan(database, queries, 64, k), nearest(database, queries, 64, k))


def test_many_rows_cross_panels_and_shares():
    generator = np.random.default_rng(0)
    database, queries = codes(generator, 150_001, 64), codes(generator, 40, 64)
    single = scan(database, queries, 64, 100)
    words = to_words(database, 64)
    flat = [np.bitwise_count(words ^ query).astype(np.int32) for query in to_words(queries, 64)[:3, 0]]
    for number, distances in enumerate(flat):
        order = np.argsort(distances[:, 0], kind="stable")[:100]
        np.testing.assert_array_equal(single.rows[number], order)
    for threads in (2, 3):
        assert_same(scan(database, queries, 64, 100, threads=threads), single)
        with mock.patch.object(module, "_SMALLEST_WORK", 1):
            assert_same(scan(database, queries[:1], 64, 100, threads=threads), single.take(slice(1)))


@pytest.mark.parametrize("bits", [16, 64, 128, 256, 512])
def test_distances_are_those_of_faiss(bits):
    generator = np.random.default_rng(bits)
    database, queries = codes(generator, 5000, bits, 3000), codes(generator, 7, bits)
    flat = faiss.IndexBinaryFlat(bits)
    flat.add(database)
    found = scan(database, queries, bits, 50)
    np.testing.assert_array_equal(found.distances, flat.search(queries, 50)[0])
    np.testing.assert_array_equal(found.distances, faiss.knn_hamming(queries, database, 50)[0])


def test_first_row_shifts_the_rows():
    database = codes(np.random.default_rng(1), 100, 20)
    found, shifted = (
        scan(database, database[:3], 20, 5),
        scan(database, database[:3], 20, 5, first_row=10**12),
    )
    np.testing.assert_array_equal(shifted.rows, found.rows + 10**12)


def test_more_hits_than_rows_leave_places_empty():
    found = scan(np.zeros((2, 1), np.uint8), np.zeros((1, 1), np.uint8), 8, 4)
    assert found.rows.tolist() == [[0, 1, NO_ROW, NO_ROW]]
    assert found.distances.tolist() == [[0, 0, NO_DISTANCE, NO_DISTANCE]]


def test_no_rows_and_no_queries():
    none, one = np.zeros((0, 3), np.uint8), np.zeros((1, 3), np.uint8)
    assert scan(none, one, 24, 2).rows.tolist() == [[NO_ROW, NO_ROW]]
    assert scan(one, none, 24, 2).rows.shape == (0, 2)
    assert scan_segments([], one, 24, 2).distances.tolist() == [[NO_DISTANCE, NO_DISTANCE]]


def test_arrays_of_every_layout(tmp_path):
    generator = np.random.default_rng(2)
    database, queries = codes(generator, 500, 64), codes(generator, 3, 64)
    expected = nearest(database, queries, 64, 10)
    path = tmp_path / "codes.bin"
    path.write_bytes(b"\0" * 64 + database.tobytes())
    mapped = np.memmap(path, np.uint8, "r", offset=64, shape=database.shape)
    unaligned = np.frombuffer(b"\0" + database.tobytes(), np.uint8)[1:].reshape(database.shape)
    frozen = database.copy()
    frozen.flags.writeable = False
    for layout in (mapped, unaligned, frozen, np.asfortranarray(database), np.repeat(database, 2, 0)[::2]):
        assert_same(scan(layout, queries, 64, 10), expected)


def test_whole_words_are_not_copied_and_inputs_stay_writable():
    database = np.zeros((10, 8), np.uint8)
    assert np.shares_memory(to_words(database, 64), database)
    assert database.flags.writeable
    assert not to_words(database, 64).flags.writeable


def test_bits_that_fill_the_last_byte_do_not_count():
    database, queries = np.full((1, 2), 255, np.uint8), np.array([[255, 0b11100000]], np.uint8)
    assert scan(database, queries, 11, 1).distances.tolist() == [[0]]


@pytest.mark.parametrize("bits", [3, 60, 63, 100, 125, 255, 260, 509])
def test_what_stands_past_the_end_of_a_query_does_not_count(bits):
    database = np.packbits(np.ones((3, bits), np.uint8), axis=1)
    queries = np.full((2, (bits + 7) // 8), 255, np.uint8)
    assert scan(database, queries, bits, 3).distances.tolist() == [[0, 0, 0]] * 2
    assert (queries == 255).all()


@pytest.mark.parametrize(
    ("bits", "words"), [(1, 1), (64, 1), (65, 2), (256, 4), (257, 8), (512, 8), (513, 16)]
)
def test_words_of_a_row(bits, words):
    assert words_per_row(bits) == words
    assert to_words(np.zeros((3, (bits + 7) // 8), np.uint8), bits).shape == (3, words)


def test_wrong_arrays_are_refused():
    good = np.zeros((2, 2), np.uint8)
    for bad in (np.zeros((2, 3), np.uint8), np.zeros((2, 2), np.int8), np.zeros(2, np.uint8)):
        with pytest.raises(ArtefactError, match="codes of 12 bits are uint8"):
            scan(bad, good, 12, 1)
        with pytest.raises(ArtefactError, match="codes of 12 bits are uint8"):
            scan(good, bad, 12, 1)
    with pytest.raises(QueryError, match="got 0"):
        scan(good, good, 12, 0)


def test_searches_run_side_by_side():
    generator = np.random.default_rng(3)
    database, queries = codes(generator, 70_000, 64), codes(generator, 40, 64)
    expected = scan(database, queries, 64, 10)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: scan(database, queries, 64, 10, threads=3), range(30)))
    for one in found:
        assert_same(one, expected)


def test_after_an_error_of_a_helper_no_other_call_is_begun():
    begun, here, failed = [], threading.Event(), threading.Event()

    def work(number, _):
        begun.append(number)
        if threading.current_thread() is threading.main_thread():
            here.set()
            assert failed.wait(60)
            time.sleep(0.05)  # until it is known
            return
        assert here.wait(60)
        failed.set()
        raise ValueError(f"call {number}")

    with pytest.raises(ValueError, match=r"call [01]"):
        run_all(work, [(number, 0) for number in range(100)], 2)
    assert sorted(begun) == [0, 1]


@pytest.mark.parametrize("place", ["in a call", "while it waits"])
def test_an_interrupted_thread_leaves_no_helper_at_work(place, request):
    """A second interrupt changes nothing: whoever asks for the calls may hold a lock for them."""
    begun, ended, here, helping = [], [], threading.Event(), threading.Event()
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell none is there

    def work(number, _):
        begun.append(number)
        if threading.current_thread() is threading.main_thread():
            here.set()
            assert helping.wait(60)
            if place == "in a call":
                raise KeyboardInterrupt
            return
        helping.set()
        assert here.wait(60)
        for _ in range(2):
            time.sleep(0.05)
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.05)
        ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        run_all(work, [(number, 0) for number in range(100 if place == "in a call" else 2)], 2)
    assert (len(begun), len(ended)) == (2, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_searches_too():
    database = codes(np.random.default_rng(4), 70_000, 64)
    expected = scan(database, database[:40], 64, 10, threads=2)
    child = os.fork()
    if child == 0:
        found = scan(database, database[:40], 64, 10, threads=2)
        os._exit(0 if np.array_equal(found.rows, expected.rows) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
