import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from ray_retrieval.config import validate
from ray_retrieval.data.decode import png
from ray_retrieval.data.transforms import (
    Augmentation,
    Draws,
    Preprocessing,
    apply,
    draw,
    normalise,
    prepare,
)
from ray_retrieval.errors import DataError, RecipeError

SIZE = 32
EVERYTHING = Augmentation(
    crop_scale=(0.3, 1.0), pad=4, flip=True, brightness=0.4, contrast=0.4, saturation=0.4
)


def batch(count: int, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    """uint8 [n, 3, s, s]: half of it smooth, half noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 5, 5), generator=generator, dtype=torch.uint8)
    images: torch.Tensor = reference.resize(coarse, [size, size], antialias=False)
    images[::2] = torch.randint(0, 256, images[::2].shape, generator=generator, dtype=torch.uint8)
    return images


def draws(count: int, size: int = SIZE, **changes: Any) -> Draws:
    """Identity draws, but for what is given: a value for all images or one each."""
    fields = {
        "boxes": torch.tensor([0, 0, size, size]).expand(count, 4),
        "shifts": torch.zeros(count, 2, dtype=torch.int64),
        "flips": torch.zeros(count, dtype=torch.bool),
        "brightness": torch.ones(count),
        "contrast": torch.ones(count),
        "saturation": torch.ones(count),
    }
    for name, value in changes.items():
        fields[name] = torch.as_tensor(value, dtype=fields[name].dtype).expand(fields[name].shape)
    return Draws(**{name: field.contiguous() for name, field in fields.items()}, size=size, output=size)


def far(images: torch.Tensor, expected: torch.Tensor) -> int:
    """The largest difference in grey levels."""
    assert images.dtype == torch.uint8
    return int((images.int() - expected.int()).abs().max())


class TestPrepare:
    @pytest.mark.parametrize("size", [(40, 30), (30, 40), (32, 32), (200, 50)])
    @pytest.mark.parametrize(("side", "resize_to"), [(24, None), (24, 32), (32, 32)])
    def test_both_resizes_equal_torchvision_on_pillow(
        self, make_image: Any, size: tuple[int, int], side: int, resize_to: int | None
    ) -> None:
        data = make_image(*size)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        short = resize_to or side
        for kind, target in (("squash", [short, short]), ("short_side", [short])):
            found = prepare(data, Preprocessing(size=side, resize=kind, resize_to=resize_to))
            expected = v2.Compose([v2.Resize(target), v2.CenterCrop(side), v2.PILToTensor()])(image)
            assert found.dtype == np.uint8
            assert found.shape == (3, side, side)
            assert found.flags.c_contiguous
            assert np.array_equal(found, expected.numpy()), kind

    def test_image_of_the_right_size_is_untouched(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        assert np.array_equal(prepare(png(pixels), Preprocessing(size=16)), pixels.transpose(2, 0, 1))

    def test_same_bytes_give_the_same_pixels(self, make_image: Any) -> None:
        data = make_image(300, 200, kind="JPEG")
        first, second = (prepare(data, Preprocessing(size=24)) for _ in range(2))
        assert np.array_equal(first, second)

    def test_drafted_photograph_is_close_to_the_full_one(self, make_image: Any) -> None:
        data = make_image(640, 480, kind="JPEG", quality=95)
        full = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BILINEAR)
        found = prepare(data, Preprocessing(size=64)).transpose(1, 2, 0)
        assert np.abs(found.astype(int) - np.asarray(full)).mean() < 1

    def test_wrong_settings_are_refused(self) -> None:
        with pytest.raises(RecipeError, match="'resize_to' is at least 'size'"):
            validate(Preprocessing, {"size": 224, "resize_to": 200})
        with pytest.raises(RecipeError, match="'std' is above 0"):
            validate(Preprocessing, {"std": [0.1, 0.0, 0.1]})


def test_normalise_equals_torchvision() -> None:
    images = batch(3)
    preprocessing = Preprocessing(size=SIZE)
    expected = reference.normalize(images.float() / 255, list(preprocessing.mean), list(preprocessing.std))
    found = normalise(images, preprocessing)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert normalise(images[:0], preprocessing).shape == (0, 3, SIZE, SIZE)


class TestDraw:
    def test_off_is_the_identity(self) -> None:
        images = batch(5)
        nothing = draw(Augmentation(), 5, torch.Generator().manual_seed(0), SIZE)
        assert apply(images, nothing) is images

    def test_same_generator_gives_the_same_draws_whatever_else_is_on(self) -> None:
        whole = draw(EVERYTHING, 50, torch.Generator().manual_seed(3), SIZE)
        crops = draw(Augmentation(crop_scale=(0.3, 1.0)), 50, torch.Generator().manual_seed(3), SIZE)
        flips = draw(Augmentation(flip=True), 50, torch.Generator().manual_seed(3), SIZE)
        assert torch.equal(whole.boxes, crops.boxes)
        assert torch.equal(whole.flips, flips.flips)
        assert not crops.flips.any()

    @settings(deadline=None, max_examples=50)
    @given(
        st.integers(1, 64), st.floats(0.05, 1.0), st.floats(0.2, 1.0), st.integers(0, 8), st.integers(0, 9)
    )
    def test_draws_stay_within_their_ranges(
        self, size: int, low: float, ratio: float, pad: int, seed: int
    ) -> None:
        pad = min(pad, size)
        augmentation = Augmentation(
            crop_scale=(low, 1.0),
            crop_ratio=(ratio, 1 / ratio),
            pad=pad,
            flip=True,
            brightness=1.5,
            contrast=0.2,
        )
        found = draw(augmentation, 40, torch.Generator().manual_seed(seed), size)
        top, left, height, width = found.boxes.T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (height >= 1).all()
        assert (width >= 1).all()
        assert (top + height <= size).all()
        assert (left + width <= size).all()
        assert (found.shifts.abs() <= pad).all()
        assert (found.brightness >= 0).all()
        assert (found.brightness <= 2.5).all()
        assert ((found.contrast - 1).abs() <= 0.2001).all()
        assert (found.saturation == 1).all()

    def test_boxes_are_spread_as_those_of_torchvision(self) -> None:
        scale, ratio = (0.2, 0.8), (0.5, 2.0)
        found = draw(
            Augmentation(crop_scale=scale, crop_ratio=ratio), 4000, torch.Generator().manual_seed(0), 64
        )
        torch.manual_seed(0)
        image = torch.empty(3, 64, 64)
        theirs = [v2.RandomResizedCrop(64, scale, ratio).make_params([image]) for _ in range(4000)]
        expected = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs]).float()
        ours = found.boxes.float()
        # Standard error of a mean over 4,000 draws is below 0.35 pixels.
        torch.testing.assert_close(ours.mean(0), expected.mean(0), rtol=0, atol=1.5)
        torch.testing.assert_close(ours.std(0), expected.std(0), rtol=0, atol=1.5)

    def test_all_shifts_and_both_flips_occur(self) -> None:
        found = draw(Augmentation(pad=2, flip=True), 2000, torch.Generator().manual_seed(0), SIZE)
        assert set(found.shifts.flatten().tolist()) == {-2, -1, 0, 1, 2}
        assert 900 < int(found.flips.sum()) < 1100

    def test_box_that_never_fits_is_the_whole_image(self) -> None:
        wide = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(3.0, 4.0))
        found = draw(wide, 4, torch.Generator().manual_seed(0), SIZE)
        assert found.boxes.tolist() == [[0, 0, SIZE, SIZE]] * 4

    def test_nothing_is_drawn_from_the_global_generator(self) -> None:
        state = torch.get_rng_state()
        draw(EVERYTHING, 8, torch.Generator().manual_seed(0), SIZE)
        assert torch.equal(torch.get_rng_state(), state)

    def test_wrong_settings_are_refused(self) -> None:
        with pytest.raises(DataError, match="'pad' is at most"):
            draw(Augmentation(pad=9), 1, torch.Generator(), 8)
        with pytest.raises(RecipeError, match="crop_scale"):
            validate(Augmentation, {"crop_scale": [0.5, 1.2]})
        with pytest.raises(RecipeError, match="crop_ratio"):
            validate(Augmentation, {"crop_ratio": [2.0, 1.0]})


class TestApply:
    @pytest.mark.parametrize(
        "box", [(0, 0, 32, 32), (3, 5, 20, 16), (10, 0, 22, 32), (31, 31, 1, 1), (0, 12, 7, 20)]
    )
    def test_crop_equals_torchvision(self, box: tuple[int, int, int, int]) -> None:
        images = batch(6)
        expected = reference.resized_crop(images, *box, [SIZE, SIZE], antialias=False)
        assert far(apply(images, draws(6, boxes=box)), expected) <= 1

    @pytest.mark.parametrize("size", [17, 224])
    def test_crop_equals_torchvision_at_other_sizes(self, size: int) -> None:
        images, box = batch(2, size), (size // 5, size // 7, size // 2, size // 3)
        expected = reference.resized_crop(images, *box, [size, size], antialias=False)
        assert far(apply(images, draws(2, size, boxes=box)), expected) <= 1

    def test_flip_is_exact(self) -> None:
        images = batch(4)
        found = apply(images, draws(4, flips=[True, False, True, False]))
        assert torch.equal(found[0::2], reference.hflip(images[0::2]))
        assert torch.equal(found[1::2], images[1::2])

    @pytest.mark.parametrize("shift", [(0, 1), (-4, 3), (7, -7), (32, -32)])
    def test_shift_is_exact_with_mirrored_border(self, shift: tuple[int, int]) -> None:
        images = batch(4)
        down, right = shift
        padded = np.pad(images.numpy(), ((0, 0), (0, 0), (SIZE, SIZE), (SIZE, SIZE)), mode="symmetric")
        expected = padded[:, :, SIZE + down : 2 * SIZE + down, SIZE + right : 2 * SIZE + right]
        assert np.array_equal(apply(images, draws(4, shifts=shift)).numpy(), expected)

    @pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.7])
    @pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
    def test_colours_equal_torchvision(self, name: str, factor: float) -> None:
        images = batch(6)
        expected = getattr(reference, f"adjust_{name}")(images, factor)
        assert far(apply(images, draws(6, SIZE, **{name: factor})), expected) <= 1

    def test_order_is_crop_shift_flip_brightness_contrast_saturation(self) -> None:
        images, box = batch(6)[1::2], (4, 2, 24, 20)
        values = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.4}
        found = apply(images, draws(3, SIZE, boxes=box, shifts=(2, -3), flips=True, **values))
        expected = reference.resized_crop(images, *box, [SIZE, SIZE], antialias=False)
        expected = torch.from_numpy(
            np.pad(expected.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="symmetric")
        )
        expected = reference.hflip(reference.crop(expected, 5, 0, SIZE, SIZE))
        for name, factor in values.items():
            expected = getattr(reference, f"adjust_{name}")(expected, factor)
        # Theirs is cut to whole grey levels four times on the way, and then stretched by 1.3 × 1.4.
        assert far(found, expected) <= 4

    def test_identity_among_others_is_untouched_bit_for_bit(self) -> None:
        images = batch(40)
        busy = draw(EVERYTHING, 40, torch.Generator().manual_seed(1), SIZE)
        still = draws(40)
        keep = torch.arange(40) % 3 == 0
        mixed = Draws(
            **{
                name: torch.where(keep.view(-1, *[1] * (field.ndim - 1)), getattr(still, name), field)
                for name, field in vars(busy).items()
                if name not in ("size", "output")
            },
            size=SIZE,
            output=SIZE,
        )
        found = apply(images, mixed)
        assert torch.equal(found[keep], images[keep])
        assert not torch.equal(found[~keep], images[~keep])

    @pytest.mark.parametrize("workers", [1, 2, 4, 8])
    def test_workers_together_give_what_one_gives(self, workers: int) -> None:
        images = batch(16)
        whole = draw(EVERYTHING, 16, torch.Generator().manual_seed(5), SIZE)
        share = 16 // workers
        parts = [slice(rank * share, (rank + 1) * share) for rank in range(workers)]
        found = torch.cat([apply(images[part], whole.take(part)) for part in parts])
        assert torch.equal(found, apply(images, whole))

    def test_images_are_not_changed_in_place(self) -> None:
        images = batch(4)
        before = images.clone()
        apply(images, draw(EVERYTHING, 4, torch.Generator().manual_seed(0), SIZE))
        assert torch.equal(images, before)

    def test_empty_batch_stays_empty(self) -> None:
        nothing = draw(EVERYTHING, 0, torch.Generator(), SIZE)
        assert apply(batch(0), nothing).shape == (0, 3, SIZE, SIZE)

    def test_draws_of_another_batch_are_refused(self) -> None:
        with pytest.raises(DataError, match=r"uint8 \[3, 3, 32, 32\]"):
            apply(batch(2), draws(3))
        with pytest.raises(DataError, match="float32"):
            apply(batch(3).float(), draws(3))

    def test_take_by_slice_list_and_tensor(self) -> None:
        whole = draw(EVERYTHING, 9, torch.Generator().manual_seed(0), SIZE)
        for index in (slice(2, 8, 3), [2, 5], torch.tensor([2, 5])):
            assert torch.equal(whole.take(index).boxes, whole.boxes[[2, 5]])
            assert len(whole.take(index)) == 2

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_device_gives_what_the_cpu_gives(self) -> None:
        images = batch(32)
        changes = draw(EVERYTHING, 32, torch.Generator().manual_seed(0), SIZE)
        found = apply(images.cuda(), changes)
        assert found.is_cuda
        assert far(found.cpu(), apply(images, changes)) <= 1


def test_random_crops_are_windows_of_the_whole_image() -> None:
    """The source keeps what a centre crop would cut, and the windows reach into every corner of it."""
    chosen = Augmentation(random_crop=True)
    source = chosen.source(Preprocessing(size=24, resize_to=32))
    assert (source.size, source.resize_to) == (32, 32)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (400, 3, 32, 32), dtype=np.uint8))
    drawn = draw(chosen, 400, torch.Generator().manual_seed(1), 32, 24)
    cropped = apply(images, drawn)
    for image, box, found in zip(images, drawn.boxes.tolist(), cropped, strict=True):
        top, left, height, width = box
        assert (height, width) == (24, 24)
        assert torch.equal(found, image[:, top : top + 24, left : left + 24])
    assert {top for top, *_ in drawn.boxes.tolist()} == set(range(9))
    assert {left for _, left, *_ in drawn.boxes.tolist()} == set(range(9))


def test_scaled_crops_are_cut_from_the_whole_image_too() -> None:
    chosen = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert chosen.source(Preprocessing(size=16, resize_to=32)).size == 32
    images = torch.full((3, 3, 32, 32), 7, dtype=torch.uint8)
    made = apply(images, draw(chosen, 3, torch.Generator().manual_seed(1), 32, 16))
    assert torch.equal(made, torch.full((3, 3, 16, 16), 7, dtype=torch.uint8))


def test_without_a_random_crop_training_sees_the_centre_as_inference_does() -> None:
    preprocessing = Preprocessing(size=24, resize_to=32)
    assert Augmentation(pad=2, flip=True).source(preprocessing) is preprocessing
    with pytest.raises(RecipeError, match="two kinds of crops"):
        validate(Augmentation, {"random_crop": True, "crop_scale": (0.5, 1.0)})
