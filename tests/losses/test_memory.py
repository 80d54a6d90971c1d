"""The cross-batch memory, against lists that do the same naively."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_retrieval.losses.memory import CrossBatchMemory


def embeddings_of(ids, stamp):
    """Rows that tell which image and which write they come from."""
    return torch.stack([ids.float(), torch.full((len(ids),), float(stamp))], dim=1)


@settings(max_examples=80, deadline=None)
@given(capacity=st.integers(1, 9), sizes=st.lists(st.integers(0, 12), max_size=8))
def test_a_ring_holds_the_newest_in_the_order_of_writing(capacity, sizes):
    memory, queue, count = CrossBatchMemory(capacity, 2), [], 0
    for stamp, size in enumerate(sizes):
        ids = torch.arange(count, count + size)
        count += size
        slots = memory.write(ids, embeddings_of(ids, stamp), ids % 3, step=stamp)
        queue = (queue + [(int(i), stamp) for i in ids])[-capacity:]
        assert torch.equal(memory.ids[slots], ids[max(0, size - capacity) :])
        assert memory.written == count
        assert len(memory) == len(queue) == int(memory.seen.sum())
    held = {(int(i), int(e[1])) for i, e, _ in zip(*memory.contents(), strict=True)}
    assert held == set(queue)
    start = memory.written % capacity if memory.written >= capacity else 0
    order = [(start + place) % capacity for place in range(len(queue))]
    assert [int(memory.ids[slot]) for slot in order] == [i for i, _ in queue]
    assert all(int(label) == int(i) % 3 for i, _, label in zip(*memory.contents(), strict=True))


@settings(max_examples=60, deadline=None)
@given(writes=st.lists(st.lists(st.integers(0, 6), max_size=10), max_size=6))
def test_a_slot_for_each_image_holds_its_newest(writes):
    memory, newest = CrossBatchMemory(7, 2, slot_per_image=True), {}
    for stamp, ids in enumerate(writes):
        tensor = torch.tensor(ids, dtype=torch.int64)
        marks = torch.arange(len(ids)) + 100 * stamp
        memory.write(tensor, torch.stack([tensor.float(), marks.float()], dim=1), tensor, step=stamp)
        newest |= {i: 100 * stamp + place for place, i in enumerate(ids)}
    assert len(memory) == len(newest)
    found = {int(i): int(e[1]) for i, e, _ in zip(*memory.contents(), strict=True)}
    assert found == newest


def test_what_has_not_been_written_is_not_among_the_contents():
    memory = CrossBatchMemory(5, 2, slot_per_image=True)
    memory.write(torch.tensor([3, 1]), torch.ones(2, 2), torch.tensor([7, 8]), step=0)
    assert memory.seen.tolist() == [False, True, False, True, False]
    ids, embeddings, labels = memory.contents()
    assert (ids.tolist(), labels.tolist(), embeddings.shape) == ([1, 3], [8, 7], (2, 2))


def test_several_labels_are_kept_as_bits():
    memory = CrossBatchMemory(4, 2, classes=3)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    memory.write(torch.tensor([5, 6]), torch.zeros(2, 2), labels, step=0)
    assert memory.labels.dtype == torch.bool
    assert torch.equal(memory.contents()[2], labels.bool())


def test_no_gradient_goes_into_the_memory():
    memory, values = CrossBatchMemory(4, 2), torch.ones(2, 2, requires_grad=True)
    memory.write(torch.tensor([0, 1]), 2 * values, torch.tensor([0, 1]), step=0)
    assert not memory.contents()[1].requires_grad


@pytest.mark.parametrize("slot_per_image", [True, False])
def test_its_state_is_whole(slot_per_image):
    first = CrossBatchMemory(4, 2, slot_per_image=slot_per_image)
    second = CrossBatchMemory(4, 2, slot_per_image=slot_per_image)
    first.write(torch.tensor([0, 1, 2]), torch.rand(3, 2), torch.tensor([4, 5, 6]), step=4)
    second.write(torch.tensor([1]), torch.rand(1, 2), torch.tensor([9]), step=1)
    second.load_state(first.state())
    for memory in (first, second):
        memory.write(torch.tensor([3, 0]), torch.full((2, 2), 9.0), torch.tensor([7, 8]), step=5)
    assert all(torch.equal(a, b) for a, b in zip(first.contents(), second.contents(), strict=True))
    assert first.written == second.written == 5
    assert torch.equal(first.ages(9), second.ages(9))
    assert sorted(first.ages(9).tolist()) == ([4, 4, 5, 5])


@settings(max_examples=80, deadline=None)
@given(
    slot_per_image=st.booleans(),
    capacity=st.integers(7, 12),
    writes=st.lists(st.lists(st.integers(0, 6), max_size=10), max_size=6),
)
def test_it_knows_the_newest_of_each_image_and_when_it_was_written(slot_per_image, capacity, writes):
    memory, queue = CrossBatchMemory(capacity, 1, slot_per_image=slot_per_image), []
    for stamp, ids in enumerate(writes):
        marks = [100 * stamp + place for place in range(len(ids))]
        tensor = torch.tensor(ids, dtype=torch.int64)
        memory.write(tensor, torch.tensor(marks, dtype=torch.float32)[:, None], tensor, step=3 * stamp)
        queue += list(zip(ids, marks, strict=True))
        kept = dict(queue).items() if slot_per_image else queue[-capacity:]
    held = dict(kept) if writes else {}
    slots = memory.newest(torch.arange(9))
    found = {image: int(memory.embeddings[slot]) for image, slot in enumerate(slots.tolist()) if slot >= 0}
    assert found == held
    ages = [50 - 3 * (mark // 100) for _, mark in (kept if writes else [])]
    assert sorted(memory.ages(50).tolist()) == sorted(ages)


def test_the_contents_of_a_ring_that_is_not_full_are_its_first_slots():
    memory = CrossBatchMemory(5, 1)
    memory.write(torch.tensor([4, 2]), torch.ones(2, 1), torch.tensor([1, 0]), step=0)
    assert memory.contents()[1].data_ptr() == memory.embeddings.data_ptr()
    assert memory.contents()[0].tolist() == [4, 2]


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"ids of the memory are \[4\], saved \[5\]"):
        CrossBatchMemory(4, 2).load_state(CrossBatchMemory(5, 2).state())
    with pytest.raises(ValueError, match="1 slot or more, got 0"):
        CrossBatchMemory(0, 2)
