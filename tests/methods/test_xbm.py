"""XBM: both terms against loops over pairs, and what may be paired."""

import numpy as np
import pytest
import torch
from samples import coloured_table

from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.losses.metric import contrastive_losses, multi_similarity_losses, triplet_losses
from ray_retrieval.methods.base import Batch, Clock
from ray_retrieval.methods.xbm import Xbm, XbmConfig

CPU = torch.device("cpu")


def method(**settings):
    torch.manual_seed(0)
    config = XbmConfig(
        dimension=6, backbone=BackboneConfig(name="small", weights="none"), image={"size": 16}, **settings
    )
    made = Xbm(config, classes=4)
    made.start_training(coloured_table(20, classes=4), CPU)
    return made


def unit(count, seed):
    vectors = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=1).float()


def terms_of(made, embeddings, rows, labels, step=5000):
    batch = Batch.whole(torch.as_tensor(rows), torch.as_tensor(labels))
    return made.objective({"embeddings": embeddings}, batch, Clock(seed=0, step=step))


def contrastive(anchors, labels, references):
    """Mean over anchors of Σ (1 − s) + Σ s; references: (embedding, label, pairs with anchor i?)."""
    total = 0.0
    for i, (anchor, label) in enumerate(zip(anchors, labels, strict=True)):
        for reference, other, allowed in references:
            similarity = float(anchor.double() @ reference.double())
            if allowed(i):
                total += 1 - similarity if label == other else similarity * (similarity > 0.5)
    return total / len(anchors)


@pytest.mark.parametrize("includes", [True, False])
@pytest.mark.parametrize("same_instance", ["positive", "exclude"])
def test_both_terms_are_the_loops_of_the_paper(includes, same_instance):
    made = method(memory_size=6, memory_includes_batch=includes, same_instance=same_instance)
    steps = [(unit(4, 1), [0, 1, 2, 3], [0, 0, 1, 1]), (unit(4, 2), [2, 3, 4, 5], [1, 1, 0, 0])]
    ring = []
    for embeddings, rows, labels in steps:
        terms = terms_of(made, embeddings, rows, labels)
        own = [(embeddings[j], labels[j], lambda i, j=j: i != j) for j in range(4)]
        assert float(terms["batch"]) == pytest.approx(contrastive(embeddings, labels, own), rel=1e-5)
        new = [(embeddings[j], labels[j], rows[j], j) for j in range(4)]
        held = (ring + new)[-6:] if includes else ring

        def allowed(entry, rows=rows):
            _, _, image, place = entry
            return lambda i: i != place and (same_instance == "positive" or rows[i] != image)

        references = [(entry[0], entry[1], allowed(entry)) for entry in held]
        assert float(terms["memory"]) == pytest.approx(contrastive(embeddings, labels, references), rel=1e-5)
        ring = [(*entry[:3], None) for entry in (ring + new)[-6:]]


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (contrastive_losses, {"margin": 0.1}),
        (triplet_losses, {"margin": 0.7}),
        (multi_similarity_losses, {"alpha": 3.0, "beta": 9.0, "base": 0.1, "mining": 0.4}),
    ],
)
def test_the_settings_of_a_loss_count_in_both_terms(loss, settings):
    name = loss.__name__.removesuffix("_losses")
    made = method(loss={"name": name, **settings}, batch_weight=2.0, memory_weight=0.5)
    embeddings, labels = unit(8, 3), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    same = labels[:, None] == labels
    expected = loss(embeddings @ embeddings.T, same & ~torch.eye(8, dtype=torch.bool), ~same, **settings)
    terms = terms_of(made, embeddings, range(8), labels)
    for term, weight in (("batch", 2.0), ("memory", 0.5)):  # of which the memory holds just the batch
        assert float(terms[term]) == pytest.approx(weight * float(expected.values.mean()), rel=1e-5)


def test_before_the_warm_up_is_over_nothing_is_remembered():
    made = method(warmup_steps=1000)
    assert "memory" not in terms_of(made, unit(4, 1), range(4), range(4), step=999)
    assert len(made.memory) == 0
    assert "memory" in terms_of(made, unit(4, 1), range(4), range(4), step=1000)
    assert len(made.memory) == 4


def test_without_weight_there_is_no_memory():
    made = method(memory_weight=0.0)
    assert made.memory is None
    assert set(terms_of(made, unit(4, 1), range(4), range(4))) == {"batch"}


def test_equal_images_are_positives_all_the_same():
    """A pair of similarity 1 that is not the anchor itself counts: it is known by its slot, not its value."""
    embeddings = torch.eye(6)[[0, 0, 1, 1]].requires_grad_()
    terms = terms_of(method(loss={"name": "triplet", "margin": 0.5}), embeddings, range(4), [0, 1, 1, 0])
    # Hardest positive at 0, hardest negative at 1: a hinge of 1.5 for each.
    assert float(terms["batch"].detach()) == pytest.approx(1.5)


def test_a_memory_smaller_than_the_batch_keeps_its_last_rows():
    made = method(memory_size=3)
    embeddings, labels = unit(5, 3), [0, 0, 1, 1, 0]
    terms = terms_of(made, embeddings, range(5), labels)
    held = [(embeddings[j], labels[j], lambda i, j=j: i != j) for j in (2, 3, 4)]
    assert float(terms["memory"]) == pytest.approx(contrastive(embeddings, labels, held), rel=1e-5)


@pytest.mark.parametrize("includes", [True, False])
def test_gradients_go_into_anchors_and_batch_but_not_into_the_memory(includes):
    made = method(memory_includes_batch=includes)
    terms_of(made, unit(4, 1), range(4), [0, 0, 1, 1])
    embeddings = unit(4, 2).requires_grad_()
    sum(terms_of(made, embeddings, range(4, 8), [0, 0, 1, 1]).values()).backward()
    assert embeddings.grad.abs().sum() > 0
    assert not made.memory.embeddings.requires_grad


def test_descriptions_are_unit_vectors():
    found = method().eval().describe(torch.zeros(3, 3, 16, 16, dtype=torch.uint8))
    assert found.data.shape == (3, 6)
    assert np.allclose(np.linalg.norm(found.data, axis=1), 1, atol=1e-6)


def test_batches_have_so_many_images_of_each_class():
    made, table = method(images_per_class=4), coloured_table(40, classes=4)
    plan = made.plan(table, 8, Clock(seed=1))
    for batch in plan:
        assert sorted(np.unique(table.labels[batch], return_counts=True)[1]) == [4, 4]
    with pytest.raises(RecipeError, match=r"train.batch_size: 10 images are not a multiple of the 4"):
        made.plan(table, 10, Clock(seed=1))


def test_images_with_several_labels_are_refused():
    with pytest.raises(DataError, match="XBM learns from one class an image"):
        method().start_training(coloured_table(20, classes=4, several_labels=True), CPU)


def test_the_memory_starts_with_encoded_images_that_are_drawn_by_the_seed():
    asked = []

    def encode(rows):
        asked.append(rows)
        return {"embeddings": unit(20, 9)[torch.from_numpy(rows)]}

    def filled(capacity, seed, **settings):
        made = method(memory_size=capacity, warmup_steps=3, memory_init="encoded", **settings)
        for step in (0, 2, 4, 5):
            made.before_step(Clock(seed=seed, step=step), encode)
            assert len(made.memory) == 0
        made.before_step(Clock(seed=seed, step=3), encode)
        return made.memory

    small, again, other = filled(8, seed=0), filled(8, seed=0), filled(8, seed=1)
    assert len(small) == len(np.unique(asked[0])) == 8
    assert torch.equal(small.ids, again.ids)
    assert not torch.equal(small.ids, other.ids)
    ids, embeddings, labels = small.contents()
    assert torch.equal(embeddings, unit(20, 9)[ids])
    assert torch.equal(labels, ids % 4)  # the classes of the images of the table
    assert small.ages(10).tolist() == [7] * 8
    assert sorted(filled(50, seed=0).contents()[0].tolist()) == list(range(20))


def test_a_memory_that_starts_empty_encodes_nothing():
    def encode(rows):
        raise AssertionError

    for made in (method(warmup_steps=3), method(memory_weight=0.0, memory_init="encoded", warmup_steps=3)):
        made.before_step(Clock(seed=0, step=3), encode)


@pytest.mark.parametrize("includes", [True, False])
def test_drift_age_and_active_negatives_are_those_of_loops(includes):
    made = method(memory_size=6, memory_includes_batch=includes)
    assert made.observations() == {}
    # When image 2 comes for the third time it is in the memory twice; images 0 and 7 have left it.
    ring = []
    for step, rows in enumerate([[0, 1, 7, 2], [2, 3, 4, 5], [2, 0, 7, 4]]):
        embeddings = unit(4, step)
        terms_of(made, embeddings, rows, [row % 2 for row in rows], step=5000 + 10 * step)
        found = {name: (float(total), float(of)) for name, (total, of) in made.observations().items()}
        new = [(row, vector, step) for row, vector in zip(rows, embeddings, strict=True)]
        newest = {row: vector for row, vector, _ in ring}
        moved = [float((vector - newest[row]).square().sum()) for row, vector, _ in new if row in newest]
        assert found["drift"] == (pytest.approx(sum(moved), abs=1e-6), len(moved))
        before, ring = ring, (ring + new)[-6:]
        assert found["memory_age"] == (sum(10 * (step - written) for _, _, written in ring), len(ring))
        active = [
            float(vector @ other) > 0.5
            for row, vector, _ in new
            for image, other, _ in (ring if includes else before)
            if (row - image) % 2
        ]
        assert found["active_negatives"] == (sum(active), 4)
    assert set(newest) == {2, 3, 4, 5, 7}


@pytest.mark.parametrize("loss", ["triplet", "multi_similarity"])
def test_other_losses_do_not_count_active_negatives(loss):
    made = method(memory_size=6, loss={"name": loss})
    terms_of(made, unit(4, 1), range(4), [0, 0, 1, 1])
    assert set(made.observations()) == {"drift", "memory_age"}


@pytest.mark.parametrize("loss", ["contrastive", "triplet", "multi_similarity"])
@pytest.mark.parametrize("includes", [True, False])
def test_the_gradient_of_the_memory_term_is_that_of_constant_references(loss, includes):
    made = method(memory_size=7, memory_includes_batch=includes, loss={"name": loss})
    terms_of(made, unit(4, 1), range(4), [0, 0, 1, 1])
    before = made.memory.embeddings[:4].clone()
    # Near to what the memory holds, so that some negatives are above the margin.
    near = torch.nn.functional.normalize(unit(4, 2) + unit(4, 1), dim=1)
    labels = torch.tensor([0, 1, 1, 0])
    anchors = near.clone().requires_grad_()
    (found,) = torch.autograd.grad(terms_of(made, anchors, range(4, 8), labels)["memory"], anchors)

    references, others = before, torch.tensor([0, 0, 1, 1])
    itself = torch.zeros(4, len(references), dtype=torch.bool)
    if includes:  # seven slots: the last image of the batch has taken the place of the first
        references, others = torch.cat([near[3:], before[1:], near[:3]]), torch.tensor([0, 0, 1, 1, 0, 1, 1])
        itself = torch.arange(7) == torch.tensor([[4], [5], [6], [0]])
    same = labels[:, None] == others
    again = near.clone().requires_grad_()
    losses = made.config.loss.losses(again @ references.T, same & ~itself, ~same & ~itself)
    (expected,) = torch.autograd.grad(losses.values.mean(), again)
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.abs().max() > 0


def peer_of(name, reduction):
    """The same loss by pytorch-metric-learning: a function of embeddings and labels."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    cosine = pytest.importorskip("pytorch_metric_learning.distances").CosineSimilarity()
    reducer = reducers.MeanReducer() if reduction == "anchors" else reducers.AvgNonZeroReducer()
    if name == "triplet":
        loss = losses.TripletMarginLoss(margin=0.1, distance=cosine, reducer=reducer)
        miner = miners.BatchHardMiner(distance=cosine)
    else:
        loss = losses.MultiSimilarityLoss(alpha=2, beta=40, base=0.5, distance=cosine, reducer=reducer)
        miner = miners.MultiSimilarityMiner(epsilon=0.1, distance=cosine)
    return lambda embeddings, labels: loss(embeddings, labels, miner(embeddings, labels))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("triplet", "anchors"),
        ("triplet", "active"),
        ("multi_similarity", "anchors"),
        ("multi_similarity", "mined"),
    ],
)
def test_reductions_are_those_of_pytorch_metric_learning(name, reduction, seed):
    made = method(memory_weight=0, loss={"name": name, "reduction": reduction})
    # Two far classes, whose anchors have no loss, and two that lie together.
    labels = torch.arange(4).repeat(3)
    centres = torch.eye(6)[[0, 1, 2, 2]][labels]
    embeddings = torch.nn.functional.normalize(centres + 0.1 * unit(12, seed), dim=1)
    found = terms_of(made, embeddings, range(12), labels)["batch"]
    losses = made.config.loss.losses(embeddings @ embeddings.T, *masks_of(labels))
    assert 0 < int(losses.active.sum()) < 12
    assert float(found) == pytest.approx(float(peer_of(name, reduction)(embeddings, labels)), rel=1e-5)


def masks_of(labels):
    same, itself = labels[:, None] == labels, torch.eye(len(labels), dtype=torch.bool)
    return same & ~itself, ~same


def test_the_mean_over_pairs_does_not_grow_with_the_memory():
    """Over `pairs`, a memory that holds everything several times has the loss of one that holds it once."""
    found = {}
    for reduction in ("anchors", "pairs"):
        for copies in (1, 3):
            settings = {"loss": {"name": "contrastive", "margin": 0.0, "reduction": reduction}}
            made = method(memory_size=4 * copies, memory_includes_batch=False, **settings)
            for _ in range(copies):
                terms_of(made, unit(4, 1), range(4), [0, 0, 1, 1])
            terms = terms_of(made, unit(4, 2), range(4, 8), [0, 1, 1, 0])
            found[reduction, copies] = float(terms["memory"])
    assert found["anchors", 3] == pytest.approx(3 * found["anchors", 1], rel=1e-5)
    assert found["pairs", 3] == pytest.approx(found["pairs", 1], rel=1e-5)
    pulled_and_pushed = [
        1 - s if a == b else s
        for anchor, a in zip(unit(4, 2), [0, 1, 1, 0], strict=True)
        for reference, b in zip(unit(4, 1), [0, 0, 1, 1], strict=True)
        for s in [float(anchor @ reference)]
        if a == b or s > 0
    ]
    assert found["pairs", 1] == pytest.approx(np.mean(pulled_and_pushed), rel=1e-5)


def test_where_nothing_is_active_the_loss_is_zero():
    made = method(memory_weight=0, loss={"name": "triplet", "reduction": "active"})
    terms = terms_of(made, torch.eye(6)[:4].repeat_interleave(2, 0)[:6], range(6), [0, 0, 1, 1, 2, 2])
    assert float(terms["batch"]) == 0
