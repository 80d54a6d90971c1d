"""GeM: what it mines, what it minimises, how it describes and whitens."""

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from samples import coloured_table

from ray_retrieval.config import validate
from ray_retrieval.data.mixed import groups_of, in_order
from ray_retrieval.data.source import ImageSource
from ray_retrieval.data.table import ImageTable
from ray_retrieval.errors import DataError, RecipeError
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.layers.pooling import SuperGlobalPooling
from ray_retrieval.methods.base import Batch, Clock
from ray_retrieval.methods.gem import Gem, GemConfig

CPU = torch.device("cpu")
TUPLES = {"name": "contrastive", "negatives": 3, "queries": 12, "pool": 40}


def method(table=None, **settings):
    torch.manual_seed(0)
    settings = {"image": {"size": 24, "resize": "long_side"}, "loss": TUPLES, **settings}
    config = GemConfig(backbone=BackboneConfig(name="small", weights="none"), **settings)
    made = Gem(config, classes=6).double()
    made.start_training(table if table is not None else photographs(), CPU)
    return made.eval()


def photographs(count=60, classes=6):
    return coloured_table(count, classes=classes, mixed_sizes=True)


def encoder(made, table):
    """What the training loop hands to a method, in one process."""

    def encode(rows, work=None):
        with ImageSource(table, made.preprocessing, memory_bytes=0, threads=1) as source, torch.no_grad():
            groups = groups_of(source.batch(rows))
            found = [(work or made)(images) for _, images in groups]
        places = [positions for positions, _ in groups]
        return {name: in_order(places, [outputs[name] for outputs in found]) for name in found[0]}

    def totals(rows, work):
        with ImageSource(table, made.preprocessing, memory_bytes=0, threads=1) as source, torch.no_grad():
            parts = [work(images) for _, images in groups_of(source.batch(rows))]
        return {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}

    encode.totals = totals
    return encode


def pictures(count=4, size=(24, 20)):
    generator = np.random.default_rng(3)
    return torch.from_numpy(generator.integers(0, 256, (count, 3, *size), dtype=np.uint8))


class TestMining:
    def test_negatives_are_the_most_alike_of_other_clusters(self):
        table = photographs()
        made = method(table)
        encode, clock = encoder(made, table), Clock(seed=4, epoch=2)
        made.before_round(clock, encode)
        batches = made.plan(table, 15, clock)
        tuples = np.concatenate(batches).reshape(-1, 5)
        vectors = encode(np.arange(60))["embeddings"].numpy()
        pool = set(np.unique(tuples[:, 2:]).tolist())
        assert [len(batch) for batch in batches] == made.plan_sizes(table, 15, clock) == [15] * 4
        for query, positive, *negatives in tuples.tolist():
            clusters = table.labels[negatives]
            assert table.labels[query] == table.labels[positive]
            assert query != positive
            assert len({*clusters.tolist(), int(table.labels[query])}) == 4
            # Nothing that any query found in the pool is nearer and of a cluster that was left out.
            similarity = vectors @ vectors[query]
            for row in pool - set(negatives):
                if table.labels[row] not in {*clusters.tolist(), table.labels[query]}:
                    assert similarity[row] <= similarity[negatives].min()

    def test_it_is_drawn_by_seed_epoch_and_round(self):
        table = photographs()
        made = method(table, loss={**TUPLES, "rounds": 2})
        encode = encoder(made, table)
        drawn = {}
        for key in [(4, 0, 0), (4, 0, 1), (4, 1, 0), (5, 0, 0), (4, 0, 0)]:
            clock = Clock(seed=key[0], epoch=key[1], round=key[2])
            made._mined = {}
            made.before_round(clock, encode)
            rows = np.concatenate(made.plan(table, 15, clock)).tolist()
            assert drawn.setdefault(key, rows) == rows
        assert len({tuple(rows) for rows in drawn.values()}) == 4

    def test_a_round_that_was_mined_is_not_mined_again(self):
        table = photographs()
        made = method(table)
        clock = Clock(seed=4, epoch=1)
        made.before_round(clock, encoder(made, table))
        state = made.training_state()
        other = method(table)
        other.load_training_state(state)
        other.before_round(clock, None)  # would encode
        for expected, found in zip(made.plan(table, 15, clock), other.plan(table, 15, clock), strict=True):
            np.testing.assert_array_equal(found, expected)

    def test_pairs_may_be_listed(self):
        table = photographs(12, 6)
        positives = [[6], None, [8, 2], *[[]] * 9]
        listed = ImageTable(
            table.table.append_column("positives", pa.array(positives, pa.list_(pa.int64()))), name="listed"
        )
        made = method(listed, loss={**TUPLES, "queries": 50})
        made.before_round(Clock(seed=0), encoder(made, listed))
        tuples = np.concatenate(made.plan(listed, 10, Clock(seed=0))).reshape(-1, 5)
        assert {tuple(pair) for pair in tuples[:, :2].tolist()} == {(0, 6), (2, 8), (2, 2)}

    def test_what_cannot_be_mined_is_told_first(self):
        with pytest.raises(DataError, match="3 clusters, and the 3 negatives"):
            method().plan_sizes(photographs(60, 3), 15, Clock(seed=0))
        with pytest.raises(RecipeError, match="a tuple has 5 images"):
            method().plan_sizes(photographs(), 4, Clock(seed=0))


def naive_tuple_loss(name, query, positive, negatives):
    distance = lambda a, b: float((a - b + (1e-6 if name == "contrastive" else 0)).norm())  # noqa: E731
    near = distance(query, positive)
    if name == "contrastive":
        return 0.5 * near**2 + sum(0.5 * max(0.0, 0.85 - distance(query, n)) ** 2 for n in negatives)
    return sum(max(0.0, near**2 - distance(query, n) ** 2 + 0.5) for n in negatives)


@pytest.mark.parametrize("name", ["contrastive", "triplet"])
def test_the_loss_is_the_sum_over_tuples(name):
    made = method(loss={**TUPLES, "name": name})
    vectors = F.normalize(torch.randn(15, 8, dtype=torch.float64), dim=1)
    batch = Batch.whole(torch.arange(15), torch.zeros(15, dtype=torch.int64))
    found = made.objective({"embeddings": vectors}, batch, Clock(seed=0))
    expected = [naive_tuple_loss(name, t[0], t[1], t[2:]) for t in vectors.view(3, 5, 8)]
    assert float(found["tuples"]) == pytest.approx(sum(expected), rel=1e-9)
    total, count = made.observations()["negative_distance"]
    gaps = [float((t[0] - n).norm()) for t in vectors.view(3, 5, 8) for n in t[2:]]
    assert (float(total), float(count)) == (pytest.approx(sum(gaps)), 9)


class TestTraining:
    def test_statistics_of_batch_normalisation_stay(self):
        made = method().train()
        before = {name: value.clone() for name, value in made.named_buffers()}
        weights = [value for name, value in made.backbone.named_parameters() if name.startswith("1.")]
        made(pictures())["embeddings"].sum().backward()
        assert all(torch.equal(value, before[name]) for name, value in made.named_buffers())
        assert all(value.grad is not None for value in weights)

    def test_scale_and_shift_may_stay_too(self):
        made = method(train_batch_norm=False)
        assert {name for name, value in made.named_parameters() if not value.requires_grad} == {
            f"backbone.{layer}.{kind}" for layer in (1, 4, 8, 11, 15, 18) for kind in ("weight", "bias")
        }

    @pytest.mark.parametrize(("pooling", "factor"), [("gem", 10), ("gemmp", 100)])
    def test_the_exponent_learns_faster_and_does_not_decay(self, pooling, factor):
        made = method(pooling=pooling, projection=True)
        others, exponent = made.parameter_groups()
        assert (exponent.lr_factor, exponent.decays, len(exponent.parameters)) == (factor, False, 1)
        assert exponent.parameters[0] is made.pooling.p
        assert len(others.parameters) == len(list(made.parameters())) - 1
        assert len(method(pooling="max").parameter_groups()) == 1


def embedded(made, images):
    """The published pipeline, written out: features, pooling, length, projection, length."""
    features = made.backbone(made.normalised(images))
    pooled = features.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
    found = pooled / (pooled.norm(dim=1, keepdim=True) + 1e-6)
    if made.projection is not None:
        found = found @ made.projection.weight.T + made.projection.bias
        found = found / (found.norm(dim=1, keepdim=True) + 1e-6)
    return found


class TestDescriptors:
    @pytest.mark.parametrize("projection", [False, True])
    def test_one_scale(self, projection):
        made = method(projection=projection)
        with torch.no_grad():
            expected = embedded(made, pictures())
            assert torch.allclose(made(pictures())["embeddings"], expected, atol=1e-9)
            np.testing.assert_allclose(made.describe(pictures()).data, expected.numpy(), atol=1e-5)

    @pytest.mark.parametrize(
        ("settings", "power"), [({}, 3), ({"projection": True}, 1), ({"combine": "max"}, None)]
    )
    def test_several_scales(self, settings, power):
        scales = (1.0, 0.7071, 0.5)
        made = method(scales=scales, **settings)
        with torch.no_grad():
            normalised = made.normalised(pictures())
            found = []
            for scale in scales:
                sides = [int(side * scale) for side in (24, 20)]
                one = F.interpolate(normalised, size=sides, mode="bilinear", align_corners=False)
                pooled = made.pooling(made.backbone(one if scale != 1 else normalised))
                vectors = F.normalize(pooled, dim=1)
                found.append(
                    vectors if made.projection is None else F.normalize(made.projection(vectors), dim=1)
                )
            stacked = torch.stack(found)
            expected = stacked.amax(dim=0) if power is None else stacked.pow(power).mean(dim=0).pow(1 / power)
            expected = F.normalize(expected, dim=1)
            np.testing.assert_allclose(made.describe(pictures()).data, expected.numpy(), atol=2e-5)

    def test_superglobal_pooling_describes_and_is_not_trained(self):
        made, plain = method(describe_with="superglobal"), method()
        assert torch.equal(made(pictures())["embeddings"], plain(pictures())["embeddings"])
        with torch.no_grad():
            pooled = SuperGlobalPooling()(made.backbone(made.normalised(pictures())))
        expected = F.normalize(pooled, dim=1).numpy()
        np.testing.assert_allclose(made.describe(pictures()).data, expected, atol=1e-5)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"dimension": 64}, "'dimension' is 128, the channels of small"),
            ({"dimension": 129, "projection": True}, "at most the 128 channels"),
            ({"pooling": "rmac", "describe_with": "superglobal"}, "regions of its own"),
        ],
    )
    def test_what_does_not_go_together(self, wrong, message):
        with pytest.raises(RecipeError, match=message):
            validate(GemConfig, {"backbone": {"name": "small", "weights": "none"}, **wrong})


class TestWhitening:
    def test_it_is_a_part_of_the_descriptor(self):
        table = photographs(120)
        for name in ("learned", "pca"):
            made = method(table, dimension=16, whitening={"name": name})
            with torch.no_grad():
                raw = embedded(made, pictures())
                assert made.describe(pictures()).data.shape == (4, 128)  # not learned yet
            made.after_training(encoder(made, table))
            with torch.no_grad():
                whitened = raw @ made.whitening.weight.T + made.whitening.bias
            expected = F.normalize(whitened, dim=1).numpy()
            found = made.describe(pictures()).data
            assert found.shape == (4, 16)
            np.testing.assert_allclose(found, expected, atol=1e-4)
            assert not any(value.requires_grad for value in made.whitening.parameters())

    def test_a_training_leaves_out_that_of_the_model_it_starts_from(self):
        """It was learned of another network."""
        table = photographs(120)
        made = method(table, dimension=16, whitening={"name": "pca"})
        made.after_training(encoder(made, table))
        made.start_training(table, CPU)
        with torch.no_grad():
            np.testing.assert_allclose(made.describe(pictures()).data, embedded(made, pictures()), atol=1e-5)

    @pytest.mark.parametrize(("name", "most"), [("learned", 20), ("pca", 20)])
    def test_it_is_learned_from_so_many_images(self, name, most):
        table = photographs(120)
        made = method(table, dimension=4, whitening={"name": name, "images": most})
        encode, asked = encoder(made, table), []

        def counted(rows, work):
            asked.append(rows)
            return encode(rows, work)

        counted.totals = lambda rows, work: (asked.append(rows), encode.totals(rows, work))[1]
        made.after_training(counted)
        (rows,) = asked
        assert most - 4 <= len(rows) <= most  # an image may be of two pairs
        assert (np.diff(rows) > 0).all()

    def test_pca_whitens_the_training_images(self):
        table = photographs(200)
        made = method(table, dimension=4, whitening={"name": "pca"})
        encode = encoder(made, table)
        made.after_training(encode)
        raw = encode(np.arange(200))["embeddings"]
        with torch.no_grad():
            white = (raw @ made.whitening.weight.T + made.whitening.bias).numpy()
        np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(4), atol=1e-3)
        np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-3)


class TestStart:
    """Linear layers start from whitenings of the untrained network's features."""

    def test_a_projection_whitens_differences_within_pairs(self):
        table = photographs(600)
        made = method(table, projection=True)
        encode = encoder(made, table)
        assert torch.equal(made.projection.weight, torch.eye(128, dtype=torch.float64))
        made.before_training(encode)
        pooled = encode(np.arange(600), made._pooled)["vectors"]
        with torch.no_grad():
            white = made.projection(pooled).numpy()
        # Of all pairs of a class, not of those alone that it was learned from.
        labels = np.asarray(table.labels)
        differences = np.concatenate([white[labels == c][::2] - white[labels == c][1::2] for c in range(6)])
        assert 0.5 < np.square(differences).mean() < 2
        before = made.projection.weight.clone()
        made.before_training(None)  # a start from a model: it has been done
        assert torch.equal(made.projection.weight, before)

    def test_with_too_few_pairs_it_stays_the_identity(self):
        table = photographs(200)
        made = method(table, projection=True, dimension=40)
        made.before_training(encoder(made, table))
        assert torch.equal(made.projection.weight, torch.eye(40, 128, dtype=torch.float64))

    @pytest.mark.parametrize("layer", ["local", "regional"])
    def test_places_and_regions_are_white(self, layer):
        table = photographs(100)
        settings = {"local_whitening": True} if layer == "local" else {"regional": True}
        made = method(table, **settings)
        encode = encoder(made, table)
        places = made._places if layer == "local" else made._regions
        made.before_training(encode)
        with torch.no_grad():
            vectors = encode(np.arange(100), places)["vectors"].reshape(-1, 128)
            white = (made.local or made.pooling.whitening)(vectors).numpy()
        variances = white.var(axis=0)
        alive = variances > 1e-3
        assert alive.sum() > 20
        np.testing.assert_allclose(np.cov(white[:, alive].T, bias=True), np.eye(alive.sum()), atol=0.01)
        assert (variances[~alive] < 1e-6).all()

    def test_layers_that_another_model_lacks_still_have_it_before_them(self):
        table = photographs(600)
        made = method(table, projection=True, regional=True)
        made.initialised.fill_(1)
        made.started_from(["projection.weight", "projection.bias", "whitened"])
        assert made.initialised.tolist() == [1, 1, 0]
        regions = made.pooling.whitening.weight.clone()
        made.before_training(encoder(made, table))
        assert torch.equal(made.pooling.whitening.weight, regions)
        assert not torch.equal(made.projection.weight, torch.eye(128, dtype=torch.float64))


class TestBeforehand:
    """What is told before a training starts."""

    @pytest.mark.parametrize(
        ("whitening", "message"),
        [
            ({"name": "learned"}, "whitening of 128 dimensions is learned from 60 pairs only"),
            ({"name": "learned", "images": 40}, "learned from 20 pairs only"),
            ({"name": "pca"}, "whitening to 128 dimensions is learned from 60 images only"),
        ],
    )
    def test_too_few_images_for_whitening(self, whitening, message):
        (found,) = method(whitening=whitening).warnings(photographs(), 100)
        assert message in found

    def test_enough(self):
        assert method(whitening={"name": "learned"}).warnings(photographs(256), 100) == []
        assert method().warnings(photographs(), 100) == []

    def test_a_pool_too_small_for_different_negatives(self):
        with pytest.raises(RecipeError, match="'pool' is at least 25 for 5 negatives"):
            validate(GemConfig, {"loss": {"name": "triplet", "pool": 24}})

    def test_classes_of_one_image_each_can_be_told_apart_without_pairs(self):
        table = coloured_table(6, classes=6, mixed_sizes=True)
        made = method(table, loss={"name": "arcface"}, projection=True, whitening={"name": "learned"})
        made.before_training(encoder(made, table))
        with pytest.raises(DataError, match="no two images are of one class"):
            made.after_training(encoder(made, table))


def test_copies_that_fill_a_class_up_are_no_positives():
    """With a copy of each image as the only other one of its class, no query has anything to find."""
    made = method(loss={"name": "smooth_ap"})
    vectors = F.normalize(torch.randn(3, 8, dtype=torch.float64), dim=1).repeat_interleave(2, dim=0)
    rows = torch.tensor([4, 4, 7, 7, 9, 9])
    terms = made.objective({"embeddings": vectors}, Batch.whole(rows, rows), Clock(seed=0))
    assert float(terms["precision"]) == 0


@pytest.mark.parametrize("pooling", ["gem", "gemmp", "max"])
def test_the_exponent_is_watched(pooling):
    made = method(pooling=pooling)
    assert made.objective({"embeddings": torch.eye(5, 8)}, Batch.whole(torch.arange(5), torch.zeros(5)), None)
    watched = made.observations()
    assert ("p" in watched) == (pooling != "max")
    if pooling != "max":
        assert [float(value) for value in watched["p"]] == [15, 5]  # by images, for any number of workers


@pytest.mark.parametrize("size", [(24, 3), (3, 3), (1, 40)])
def test_narrow_images_are_described_at_every_scale(size):
    """The map of an image of less than eight pixels would be empty."""
    made = method(scales=(1.0, 0.5))
    found = made.describe(pictures(2, size)).data
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
