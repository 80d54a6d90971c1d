import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import fs

from ray_retrieval import pictures, storage
from ray_retrieval.errors import RetrievalError
from ray_retrieval.pictures import Example, Shown, grid, opened, save


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def noise(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def shown(
    right: bool | None = None, far: str | None = None, image: bytes | None = None, id_: str = "a/1.png"
) -> Shown:
    return Shown(encoded(noise(32)) if image is None else image, id_, ["cat"], far, right)


def example(rights: list[bool | None]) -> Example:
    return Example(shown(), [shown(right, f"{place} bits") for place, right in enumerate(rights)])


def tile(column: int, top: int = pictures.MARGIN) -> tuple[int, int]:
    """Upper left corner of a hit's frame on the first line of an example."""
    left = pictures.MARGIN + pictures.TILE + pictures.QUERY_GAP + column * (pictures.TILE + pictures.GAP)
    return left, top


def frame_colours(picture: Image.Image, corner: tuple[int, int]) -> set[tuple[int, ...]]:
    """Colours met on the frame; the middles of its sides, because a badge covers one corner."""
    pixels = np.asarray(picture)
    left, top = corner
    middle, last = pictures.TILE // 2, pictures.TILE - 1
    points = [
        (left + middle, top),
        (left, top + middle),
        (left + middle, top + last),
        (left + last, top + middle),
    ]
    return {tuple(int(value) for value in pixels[y, x]) for x, y in points}


def test_frames_tell_right_from_wrong_from_unknown_at_each_hit() -> None:
    picture = grid([example([True, False, None])])
    assert frame_colours(picture, tile(0)) == {pictures.RIGHT}
    assert frame_colours(picture, tile(1)) == {pictures.WRONG}
    assert frame_colours(picture, tile(2)) == {pictures.UNKNOWN}
    assert frame_colours(picture, (pictures.MARGIN, pictures.MARGIN)) == {pictures.INK}


def test_right_and_wrong_differ_by_more_than_colour() -> None:
    def badge(right: bool) -> np.ndarray:
        left, top = tile(0)
        area = grid([example([right])]).crop((left, top, left + 24, top + 24))
        return np.asarray(area.convert("L")) > 200

    assert badge(True).any()
    assert badge(False).any()
    assert (badge(True) != badge(False)).mean() > 0.05


def test_picture_grows_by_one_line_per_example_and_one_column_per_hit() -> None:
    one, two = grid([example([True] * 3)]), grid([example([True] * 3)] * 2)
    assert two.width == one.width
    assert two.height - one.height == pictures.CELL + pictures.EXAMPLE_GAP
    wider = grid([example([True] * 5)])
    assert wider.width - one.width == 2 * (pictures.TILE + pictures.GAP)
    assert wider.height == one.height
    assert tile(4)[0] + pictures.TILE + pictures.MARGIN == wider.width


def test_queries_with_different_numbers_of_hits_share_the_columns() -> None:
    picture = grid([example([True]), example([True, False])])
    second = pictures.MARGIN + pictures.CELL + pictures.EXAMPLE_GAP
    assert frame_colours(picture, tile(1, second)) == {pictures.WRONG}
    assert frame_colours(picture, tile(1)) == {pictures.PAPER}


def test_query_without_hits_is_drawn_alone() -> None:
    picture = grid([Example(shown(), [])])
    assert picture.width == 2 * pictures.MARGIN + pictures.TILE


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_small_images_are_enlarged_pixel_by_pixel(side: int) -> None:
    pixels = noise(side)
    picture = grid([Example(shown(image=encoded(pixels)), [])])
    left = pictures.MARGIN + pictures.FRAME
    drawn = np.asarray(picture.crop((left, left, left + pictures.SIDE, left + pictures.SIDE)))
    factor = pictures.SIDE // side
    np.testing.assert_array_equal(drawn, pixels.repeat(factor, 0).repeat(factor, 1))


def test_large_images_keep_their_aspect_ratio_on_a_neutral_ground() -> None:
    wide = np.zeros((100, 400, 3), np.uint8)
    picture = np.asarray(grid([Example(shown(image=encoded(wide, "JPEG")), [])]))
    first = pictures.MARGIN + pictures.FRAME
    column = picture[first : first + pictures.SIDE, first + pictures.SIDE // 2]
    assert (column == pictures.BLANK).all(axis=1).sum() == pictures.SIDE - 32
    assert (column < 10).all(axis=1).sum() == 32


@pytest.mark.parametrize("image", [b"no image", b"", encoded(noise(64), "JPEG")[:300], None])
def test_undecodable_image_becomes_a_grey_tile_with_its_id(image: bytes | None) -> None:
    def drawn(id_: str) -> np.ndarray:
        hit = Shown(image, id_, ["cat"], "3 bits", False)
        picture = grid([Example(shown(), [hit])])
        assert frame_colours(picture, tile(0)) == {pictures.WRONG}
        left, top = tile(0)
        return np.asarray(picture.crop((left + 5, top + 30, left + pictures.SIDE, top + pictures.SIDE)))

    assert tuple(drawn("one.png")[-1, -1]) == pictures.BLANK
    assert (drawn("one.png") != drawn("two.png")).any(), "the id is not part of the tile"


def test_text_never_leaves_its_tile() -> None:
    long = "a very long name without end " * 20
    picture = grid([Example(shown(), [Shown(None, long, [long, "\n\n\x00"], f"{10**9} bits", True)])])
    right_margin = np.asarray(picture)[:, -pictures.MARGIN :]
    assert (right_margin == pictures.PAPER).all()
    assert (np.asarray(picture)[-pictures.MARGIN :] == pictures.PAPER).all()


def test_labels_and_ids_of_any_script_are_drawn() -> None:
    grid([Example(Shown(None, "图像/一.png", ["猫", "كلب", "🐈"]), [])])


def test_examples_are_required() -> None:
    with pytest.raises(RetrievalError, match="no query"):
        grid([])


def test_opened_never_enlarges_and_fits_the_square() -> None:
    assert opened(encoded(noise(20)), 128).size == (20, 20)  # type: ignore[union-attr]
    assert opened(encoded(noise(100)), 128).size == (100, 100)  # type: ignore[union-attr]
    assert opened(encoded(np.zeros((50, 5000, 3), np.uint8)), 128).size == (128, 1)  # type: ignore[union-attr]
    assert opened(None, 128) is None


@pytest.mark.parametrize(
    ("name", "kind"), [("grid.png", "PNG"), ("grid.JPG", "JPEG"), ("new/grid.jpeg", "JPEG")]
)
def test_saved_picture_reads_back(tmp_path: Path, name: str, kind: str) -> None:
    picture = grid([example([True, False])])
    save(picture, tmp_path / name)
    with Image.open(tmp_path / name) as read:
        assert (read.format, read.size) == (kind, picture.size)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_relative_name_is_saved_where_the_process_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(grid([example([])]), "grid.png")
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("name", ["grid.bmp", "grid", "grid.png.gz", ""])
def test_unknown_suffix_is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(RetrievalError, match=r"end the name in \.png or \.jpg"):
        save(grid([example([True])]), f"{tmp_path}/{name}")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_goes_into_a_store_whose_uri_has_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "store_at", lambda uri: (store, storage.split_query(uri)[0].removeprefix("s3://"))
    )
    save(Image.new("RGB", (4, 4)), "s3://bucket/a.png?endpoint_override=http%3A%2F%2Fhost:9000/")
    assert Image.open(tmp_path / "bucket" / "a.png").size == (4, 4)


def test_failed_save_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(grid([example([True])]), tmp_path / "grid.png")
    before = (tmp_path / "grid.png").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RetrievalError, match="No space left"):
        save(grid([example([False])]), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_place_that_cannot_hold_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RetrievalError, match="the store refuses"):
        save(grid([example([True])]), tmp_path / "file" / "grid.png")
