import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import coloured_table, png
from sklearn.decomposition import PCA

from ray_retrieval import model
from ray_retrieval.data.table import ImageTable
from ray_retrieval.data.transforms import prepare
from ray_retrieval.errors import DataError, ModelError
from ray_retrieval.layers.backbones import BackboneConfig
from ray_retrieval.layers.pyramid import resized
from ray_retrieval.methods.base import Batch, Clock
from ray_retrieval.methods.delf import Delf, DelfConfig
from ray_retrieval.storage import Folder

CLASSES = 4


def config(**settings):
    return DelfConfig(
        **{
            "backbone": BackboneConfig(name="small", weights="none"),
            "image": {"size": 48, "resize": "long_side"},
            "crop": {"size": 32},
            "dimension": 8,
            "hidden": 16,
            **settings,
        }
    )


def built(**settings):
    torch.manual_seed(0)
    method = Delf(config(**settings), classes=CLASSES)
    method.start_training(coloured_table(8, classes=CLASSES), torch.device("cpu"))
    return method


def images(count=4, height=40, width=32):
    shape = (count, 3, height, width)
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def terms(method, pictures, labels=None):
    labels = torch.arange(len(pictures)) % CLASSES if labels is None else labels
    batch = Batch.whole(torch.arange(len(labels)), labels)
    return method.objective(method(pictures), batch, Clock(seed=0))


def save(method, folder):
    model.save(
        Folder(folder),
        config=method.config.model_dump(mode="json"),
        weights=method.state_dict(),
        classes=CLASSES,
        class_names=None,
        precision="float32",
        training={"epoch": 1},
        metrics={},
    )


class Encode:
    """All training images at once, on one process."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __call__(self, rows, work):
        with torch.no_grad():
            return work(self.pictures[torch.from_numpy(rows)])

    totals = __call__


def test_what_each_stage_trains():
    assert set(terms(built(stage="tuning"), images())) == {"classes"}
    assert set(terms(built(stage="attention"), images())) == {"attention"}
    both = built(stage="joint", reduction={"name": "autoencoder"})
    assert set(terms(both, images())) == {"classes", "attention", "autoencoder"}


def test_the_attention_stage_leaves_the_backbone_and_its_statistics_alone():
    method = built(stage="attention").train()
    before = {name: value.clone() for name, value in method.backbone.state_dict().items()}
    sum(terms(method, images()).values()).backward()
    assert not any(parameter.requires_grad for parameter in method.backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in method.backbone.state_dict().items())
    trained = {id(p) for group in method.parameter_groups() for p in group.parameters}
    assert trained == {id(p) for n, p in method.named_parameters() if n.startswith("attention")}


def test_in_joint_training_the_scores_do_not_change_the_backbone():
    method = built(stage="joint", reduction={"name": "autoencoder"}).train()
    found = terms(method, images())
    (found["attention"] + found["autoencoder"]).backward()
    assert all(parameter.grad is None for parameter in method.backbone.parameters())
    assert all(parameter.grad is not None for parameter in method.attention.parameters())


def test_the_loss_is_the_papers():
    method = built(stage="attention").double().eval()
    features = method.backbone(method.normalised(images()))
    scores = method.attention(features)
    logits = []
    for one, weights in zip(features, scores, strict=True):
        cells = one.flatten(1).T
        unit = cells / cells.norm(dim=1, keepdim=True)
        logits.append(method.attention_classifier((weights.flatten()[:, None] * unit).mean(dim=0)))
    expected = F.cross_entropy(torch.stack(logits), torch.arange(4))
    assert terms(method, images())["attention"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_scores_of_a_reconstruction_are_those_of_the_features():
    method = built(stage="joint", reduction={"name": "autoencoder"}).eval()
    features = method.backbone(method.normalised(images()))
    outputs = method(images())
    made = method.autoencoder(features)
    weights = method.attention(features)
    pooled = (weights[:, None] * F.normalize(made, dim=1)).mean(dim=(2, 3))
    assert torch.allclose(outputs["attention_logits"], method.attention_classifier(pooled), atol=1e-5)


def test_described_are_the_cells_of_the_highest_scores():
    method = built(stage="attention", pyramid={"scales": [1.0], "max_features": 7}).eval()
    with torch.inference_mode():
        found = method.describe(images(2))
        features = method.backbone(method.normalised(images(2)))
        scores = method.attention(features)
    assert found.counts.tolist() == [7, 7]
    stride = method.field.stride
    for image in range(2):
        best = scores[image].flatten().argsort(descending=True, stable=True)[:7]
        width = scores.shape[2]
        cells = torch.stack([best % width, best // width], dim=1)
        places = stride * cells + method.field.offset
        mine = slice(7 * image, 7 * image + 7)
        np.testing.assert_allclose(found.locations[mine], places.numpy(), atol=1e-4)
        unit = F.normalize(features[image].flatten(1).T[best], dim=1)
        expected = F.normalize(unit @ method.components.T, dim=1)
        np.testing.assert_allclose(found.data[mine], expected.numpy(), atol=2e-3)
    assert found.sizes.tolist() == [[32, 40]] * 2


def test_images_of_one_shape_are_described_alike_alone_and_together():
    method = built(stage="attention").eval()
    with torch.inference_mode():
        whole = method.describe(images(3))
        alone = [method.describe(images(3)[row : row + 1]) for row in range(3)]
    assert whole.counts.tolist() == [one.counts[0] for one in alone]
    np.testing.assert_allclose(whole.scores, np.concatenate([one.scores for one in alone]), atol=1e-5)


def test_a_small_image_may_have_no_features():
    method = built(stage="attention", pyramid={"scales": [1.0], "min_side": 32}).eval()
    found = method.describe(images(2, height=16, width=16))
    assert found.counts.tolist() == [0, 0]
    assert found.data.shape == (0, 8)


def test_components_and_threshold_are_learned_of_the_models_own_features():
    pictures = images(8, 32, 32)
    settings = {"stage": "attention", "pyramid": {"scales": [0.5, 1.0], "max_features": 20}}
    method = built(**settings, keep_share=0.25).eval()
    method.after_training(Encode(pictures))
    with torch.no_grad():
        found = method._found(pictures, lambda features: features)
    features = torch.cat([one.descriptors for one in found]).numpy()
    reference = PCA(n_components=8).fit(features.astype(np.float64))
    np.testing.assert_allclose(method.centre.numpy(), reference.mean_, atol=1e-6)
    np.testing.assert_allclose(
        np.abs((method.components.numpy() * reference.components_).sum(axis=1)), 1, atol=1e-4
    )
    scores = torch.cat([one.scores for one in found])
    assert (scores >= method.threshold).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert method.describe(pictures).counts.sum() == (scores >= method.threshold).sum()


def test_components_and_threshold_are_learned_from_so_many_images():
    pictures, asked = images(8, 32, 32), []
    method = built(stage="attention", reduction={"images": 5}, keep_share=0.5).eval()

    class Counted(Encode):
        def __call__(self, rows, work):
            asked.append(rows.tolist())
            return super().__call__(rows, work)

        totals = __call__

    method.threshold.fill_(1e9)  # of a model that the training started from
    method.after_training(Counted(pictures))
    assert asked[0] == asked[1] == sorted(set(asked[0]))
    assert len(asked[0]) == 5
    assert 0 < float(method.threshold) < 1e9
    method.config = config(stage="attention")
    method.after_training(Counted(pictures))
    assert float(method.threshold) == float("-inf")


def test_whitened_components_have_one_variance():
    method = built(stage="attention", reduction={"whiten": True}, dimension=4).eval()
    method.after_training(Encode(images(8, 32, 32)))
    with torch.no_grad():
        found = method._found(images(8, 32, 32), lambda features: features)
    projected = method._project(torch.cat([one.descriptors for one in found])).numpy()
    np.testing.assert_allclose(np.cov(projected.T), np.eye(4), atol=0.02)


def test_a_global_descriptor_comes_from_the_same_pass():
    head = {"dimension": 6, "scales": [0.7, 1.0]}
    method = built(stage="joint", global_head=head, pyramid={"scales": [0.7071, 1.0]}).eval()
    with torch.inference_mode():
        found = method.describe(images(3))
    assert found.vectors.shape == (3, 6)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)
    assert method.config.form.vectors == 6
    tiny = method.describe(images(2, height=9, width=9))  # below the least side of the pyramid
    assert tiny.counts.tolist() == [0, 0]
    np.testing.assert_allclose(np.linalg.norm(tiny.vectors, axis=1), 1, atol=1e-5)


def test_the_global_descriptor_is_the_mean_of_the_scales_that_are_nearest_to_its_own():
    head = {"dimension": 6, "scales": [0.7, 1.1]}
    method = built(stage="joint", global_head=head, pyramid={"scales": [0.5, 0.7071, 1.0, 1.4142]}).eval()
    with torch.inference_mode():
        found = method.describe(images(3)).vectors
        normalised = method.normalised(images(3))
        each = []
        for scale in (0.7071, 1.0):
            one = resized(normalised, (round(40 * scale), round(32 * scale)))
            each.append(F.normalize(method._global(method._features(one)), dim=1))
        expected = F.normalize(torch.stack(each).mean(dim=0), dim=1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_probabilities_are_those_of_the_scaled_cosines():
    method = built(stage="joint", global_head={"dimension": 6, "scale": 10.0}).eval()
    with torch.inference_mode():
        cosines, found = method(images())["logits"], method.class_probabilities(images())
    steps = found.log().diff(dim=1)
    assert torch.allclose(steps, 10 * cosines.diff(dim=1), atol=1e-4)


def test_a_network_that_was_only_tuned_has_no_local_features():
    method = built(stage="tuning").eval()
    with pytest.raises(ModelError, match="only tuned"):
        method.describe(images())
    vectors = method.compared(images())
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-4)


def test_the_attention_starts_from_a_tuned_model(tmp_path):
    tuned = built(stage="tuning")
    save(tuned, tmp_path)
    torch.manual_seed(1)
    method = Delf(config(stage="attention"), classes=CLASSES)
    lacking = model.start_from(method, str(tmp_path))
    assert all(name.startswith("attention") for name in lacking)
    assert torch.equal(method.backbone[0].weight, tuned.backbone[0].weight)


def test_a_start_without_its_global_head_is_refused():
    method = built(stage="attention", global_head={"dimension": 6})
    with pytest.raises(ModelError, match="tuned with the same"):
        method.started_from(["global_projection.weight", "attention.score.weight"])
    method.started_from(["attention.score.weight"])
    built(stage="joint", global_head={"dimension": 6}).started_from(["global_projection.weight"])


@pytest.mark.parametrize("stage", ["tuning", "attention", "joint"])
def test_logits_are_not_rounded_to_bfloat16(stage):
    method = built(stage=stage).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = method(images())
    logits = outputs["logits" if stage == "tuning" else "attention_logits"]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.to(torch.bfloat16).float())


def test_with_a_global_head_its_descriptor_is_validated():
    method = built(stage="joint", global_head={"dimension": 6}).eval()
    assert method.compared(images()).shape == (4, 6)
    assert built(stage="joint").eval().compared(images()).shape == (4, 64)
    attended = built(stage="attention", global_head={"dimension": 6}).eval()
    assert attended.compared(images()).shape == (4, 64)


def test_normalised_scores_have_no_scale():
    method = built(stage="attention", normalised_scores=True).eval()
    before = terms(method, images())["attention"]
    fixed = method.backbone(method.normalised(images()))
    doubled = 2 * method.attention(fixed)
    method.attention.forward = lambda _: doubled
    assert terms(method, images())["attention"].item() == pytest.approx(before.item(), rel=1e-5)


def test_features_lie_where_they_are_in_the_file(tmp_path):
    """An image is made smaller, and a box of it is described: places and scales are those of the file."""
    method = built(stage="attention")
    save(method, tmp_path)
    pixels = np.random.default_rng(1).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    encoder = model.Encoder(str(tmp_path))
    for box, corner, part in ((None, (0, 0), (150, 100)), ((30, 20, 130, 90), (30, 20), (100, 70))):
        found, failures = encoder.encode([png(pixels), b"broken"], box)
        assert list(failures) == [1]
        assert found.counts[1] == 0
        prepared = prepare(png(pixels), method.preprocessing, box)
        direct = encoder.method.describe(torch.from_numpy(prepared)[None])
        ratio = np.array([prepared.shape[2] / part[0], prepared.shape[1] / part[1]])
        expected = (direct.locations + 0.5) / ratio - 0.5 + np.array(corner)
        np.testing.assert_allclose(found.locations, expected, atol=1e-3)
        np.testing.assert_allclose(found.scales, direct.scales * np.sqrt(ratio.prod()), rtol=1e-5)
        assert found.sizes.tolist()[0] == [150, 100]
    encoder.close()


def test_pictures_show_the_scores():
    shown = built(stage="attention").eval().pictures(images(2))["attention"]
    assert shown.shape == (2, 3, 40, 32)
    assert shown.dtype == torch.uint8
    assert (shown <= images(2)).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"'dimension' is at most .*, got 400"):
        built(dimension=400)
    with pytest.raises(ValueError, match="trained with the attention"):
        config(stage="tuning", reduction={"name": "autoencoder"})
    with pytest.raises(ValueError, match="described whole"):
        config(image={"size": 32, "resize": "short_side"})
    several = coloured_table(8, classes=CLASSES, several_labels=True)
    with pytest.raises(DataError, match="one class an image"):
        Delf(config(), classes=CLASSES).start_training(several, torch.device("cpu"))
    assert isinstance(several, ImageTable)
