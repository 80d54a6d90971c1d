import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_retrieval.data import readers
from ray_retrieval.data.columns import canonical_labels
from ray_retrieval.data.source import check_images
from ray_retrieval.data.table import open_images
from ray_retrieval.errors import DataError


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.fixture
def files(tmp_path: Path, make_image: Any) -> Path:
    """a.png, b.png and `sub dir/c.png`."""
    (tmp_path / "sub dir").mkdir()
    for seed, name in enumerate(("a.png", "b.png", "sub dir/c.png")):
        (tmp_path / name).write_bytes(make_image(8, 8, seed))
    return tmp_path


class TestFolder:
    def test_sub_folders_are_classes_in_sorted_order(self, photo_folder: Path) -> None:
        table = open_images(str(photo_folder))
        assert table.class_names == ["cat", "dog", "owl"]
        assert table.ids == sorted(table.ids)
        assert table.ids[0] == "cat/00.png"
        assert table.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
        assert table.image_bytes(13) == (photo_folder / "dog" / "01.png").read_bytes()

    def test_a_uri_gives_the_same_rows(self, photo_folder: Path) -> None:
        local, remote = open_images(str(photo_folder)), open_images(f"file://{photo_folder}")
        assert remote.row_fingerprint == local.row_fingerprint
        assert remote.image_bytes(5) == local.image_bytes(5)

    def test_flat_folder_has_no_labels(self, photo_folder: Path) -> None:
        table = open_images(str(photo_folder / "cat"))
        assert not table.has_labels
        assert table.class_names is None
        assert len(table) == 12

    def test_deeper_folders_belong_to_the_first_and_stray_images_have_no_label(
        self, photo_folder: Path
    ) -> None:
        (photo_folder / "cat" / "kitten").mkdir()
        (photo_folder / "cat" / "00.png").rename(photo_folder / "cat" / "kitten" / "00.PNG")
        (photo_folder / "dog" / "00.png").rename(photo_folder / "stray.png")
        table = open_images(str(photo_folder))
        assert table.table["label"][table.ids.index("cat/kitten/00.PNG")].as_py() == 0
        assert [table.ids[row] for row in table.unlabelled] == ["stray.png"]

    def test_other_files_are_ignored_and_an_empty_folder_is_an_error(self, tmp_path: Path) -> None:
        write(tmp_path, "readme.md", "nothing")
        with pytest.raises(DataError, match="no image in this folder"):
            open_images(str(tmp_path))
        write(tmp_path, "train.txt", "a.png 1")
        with pytest.raises(DataError, match=r"did you mean .*train.txt"):
            open_images(str(tmp_path))

    def test_images_of_kinds_that_cannot_be_decoded_are_not_passed_over(
        self, photo_folder: Path, make_image: Any
    ) -> None:
        (photo_folder / "cat" / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        (photo_folder / "cat" / "b.jfif").write_bytes(make_image(8, 8, kind="JPEG"))
        table = open_images(str(photo_folder))
        assert len(table) == 38
        (error,) = check_images(table, 1)
        assert (error.id, error.reason) == ("cat/a.HEIC", "not a JPEG, PNG, WebP, BMP, GIF or TIFF image")

    def test_a_class_is_one_however_the_letters_of_its_name_are_composed(
        self, photo_folder: Path, files: Path
    ) -> None:
        (photo_folder / "cat").rename(photo_folder / "cafe\u0301")
        folder = open_images(str(photo_folder))
        assert folder.class_names == ["caf\u00e9", "dog", "owl"]
        assert folder.ids[0] == "cafe\u0301/00.png"
        listed = open_images(write(files, "l.csv", "path,label\na.png,cafe\u0301\nb.png,caf\u00e9\n"))
        assert listed.class_names == ["caf\u00e9"]
        text = f"{photo_folder}/caf\u00e9/00.png\n"
        with pytest.raises(DataError, match=r"1 of 1 images are missing.*composed otherwise there: `convmv"):
            open_images(write(files, "l.txt", text))

    def test_folders_named_as_splits_are_not_classes(self, photo_folder: Path) -> None:
        top = photo_folder.parent / "set"
        top.mkdir()
        photo_folder.rename(top / "train")
        with pytest.raises(DataError, match="splits, not classes"):
            open_images(str(top))
        (top / "cover.png").write_bytes((top / "train" / "cat" / "00.png").read_bytes())
        with pytest.raises(DataError, match="splits, not classes"):
            open_images(str(top))
        assert open_images(str(top / "train")).class_names == ["cat", "dog", "owl"]

    @pytest.mark.parametrize("pattern", ["", "*/*.png", "cat"])
    def test_a_name_that_is_not_utf8_is_named(self, photo_folder: Path, pattern: str) -> None:
        (photo_folder / "cat" / "00.png").rename(photo_folder / "cat" / os.fsdecode(b"caf\xe9.png"))
        with pytest.raises(DataError, match=r"1 of \d+ names are not UTF-8, the first is b'.*caf\\xe9.png'"):
            open_images(f"{photo_folder}/{pattern}")

    def test_a_place_and_other_files_that_are_not_utf8(self, photo_folder: Path) -> None:
        place = str(photo_folder / os.fsdecode(b"caf\xe9"))
        with pytest.raises(DataError, match="names are not UTF-8"):
            open_images(place)
        Path(f"{place}.txt").touch()
        assert len(open_images(str(photo_folder))) == 36

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nothing is there"):
            open_images(str(tmp_path / "none"))

    def test_pattern_of_images(self, photo_folder: Path) -> None:
        table = open_images(f"{photo_folder}/*/0[0-2].png")
        assert table.ids == [f"{name}/0{row}.png" for name in ("cat", "dog", "owl") for row in range(3)]
        assert table.image_bytes(0) == (photo_folder / "cat" / "00.png").read_bytes()
        with pytest.raises(DataError, match="no file matches"):
            open_images(f"{photo_folder}/*.png")
        with pytest.raises(DataError, match="folder of this pattern"):
            open_images(f"{photo_folder}/none/*.png")


class TestList:
    def test_multi_hot(self, files: Path) -> None:
        table = open_images(write(files, "l.txt", "a.png 0 1 0\nb.png 0 0 0\n\nsub dir/c.png 1 1 0\n"))
        assert table.ids == ["a.png", "b.png", "sub dir/c.png"]
        assert table.classes == 3
        assert table.labels.tolist() == [[False, True, False], [False] * 3, [True, True, False]]
        assert table.table.schema.field("label").type == pa.list_(pa.int64())
        assert table.image_bytes(2) == (files / "sub dir" / "c.png").read_bytes()

    def test_class_index_and_root(self, files: Path) -> None:
        (files / "lists").mkdir()
        table = open_images(write(files, "lists/l.txt", "./a.png 3\nsub dir/c.png\t12\n"), root=str(files))
        assert table.ids == ["./a.png", "sub dir/c.png"]
        assert table.labels.tolist() == [3, 12]
        assert table.paths == [str(files / "a.png"), str(files / "sub dir" / "c.png")]

    def test_paths_alone_have_no_labels(self, files: Path) -> None:
        table = open_images(write(files, "l.txt", "b.png\r\na.png\r\n"))
        assert table.ids == ["b.png", "a.png"]
        assert not table.has_labels

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("a.png 0 1\nb.png 0\n", 2),
            ("a.png 0 1\n\nb.png 0 1 1\n", 3),
            ("a.png 1\nb.png\n", 2),
            ("a.png\nb.png 1\n", 2),
            ("a.png 0 1\nb.png 0 x\n", 2),
            ("a.png 0 1\nb.png 0 -1\n", 2),
            ("a.png 0 1\nb.png 0 2\n", 2),
        ],
    )
    def test_ragged_line_is_named(self, files: Path, text: str, line: int) -> None:
        with pytest.raises(DataError, match=f"line {line} "):
            open_images(write(files, "l.txt", text))

    def test_missing_images_are_counted_and_the_first_named(self, files: Path) -> None:
        with pytest.raises(DataError, match=r"2 of 3 images are missing, the first is .*x\.png"):
            open_images(write(files, "l.txt", "a.png 0\nx.png 1\ny.png 1\n"))

    @pytest.mark.parametrize(
        "text",
        [
            "a.png -1\nb.png -1\n",
            "a.png 1.0\nb.png 2.0\n",
            "a.png,1\nb.png,2\n",
            "path,label\na.png,cat\n",
            "a.png, 1\nb.png, 2\n",
            "a.png;1\n",
            "a.png cat\n",
            "sub dir/c -1\n",
        ],
    )
    def test_labels_that_a_list_cannot_have_are_not_taken_for_missing_images(
        self, files: Path, text: str
    ) -> None:
        with pytest.raises(DataError, match=r"images are missing.*labels of a list are whole numbers from 0"):
            open_images(write(files, "l.txt", text))

    @pytest.mark.parametrize("text", ["x 1, y.png\n", "x y\n", "a.png\nx.png -1\n"])
    def test_paths_with_spaces_may_be_missing(self, files: Path, text: str) -> None:
        with pytest.raises(DataError, match=r"images are missing.*as 'root'"):
            open_images(write(files, "l.txt", text))

    @pytest.mark.parametrize(
        ("name", "text"), [("l.txt", "sub dir\\c.png 1\n"), ("l.csv", "path\nsub dir\\c.png\n")]
    )
    def test_paths_of_windows_are_told_apart_from_missing_images(
        self, files: Path, name: str, text: str
    ) -> None:
        with pytest.raises(DataError, match=r"1 of 1 images are missing.*write the paths with / between"):
            open_images(write(files, name, text))

    def test_label_of_too_many_digits_is_named(self, files: Path) -> None:
        with pytest.raises(DataError, match="line 2 has the label 99999999999999999999, of more than 18 dig"):
            open_images(write(files, "l.txt", "a.png 1\nb.png 99999999999999999999\n"))

    def test_image_that_stands_twice(self, files: Path) -> None:
        with pytest.raises(DataError, match=r"'a\.png'"):
            open_images(write(files, "l.txt", "a.png 0\na.png 1\n"))

    def test_empty_list_and_wrong_text(self, files: Path) -> None:
        with pytest.raises(DataError, match="list is empty"):
            open_images(write(files, "l.txt", "\n \n"))
        (files / "l.txt").write_bytes(b"\xff\xfe\x00a")
        with pytest.raises(DataError, match="UTF-8"):
            open_images(str(files / "l.txt"))

    def test_real_lists_have_eighty_labels(self, real_data: Path) -> None:
        table = open_images(str(real_data / "coco_lite" / "database.txt"))
        assert table.labels.shape == (13, 80)
        assert table.labels.any(axis=1).all()


class TestCsv:
    def test_names_ids_and_further_columns(self, files: Path) -> None:
        text = "image,label,id,price\na.png,dog,007,1.5\nb.png,cat,008,2\nsub dir/c.png,,009,3\n"
        table = open_images(write(files, "l.csv", text))
        assert table.ids == ["007", "008", "009"]
        assert table.class_names == ["cat", "dog"]
        assert table.table["label"].to_pylist() == [1, 0, None]
        assert table.table["price"].to_pylist() == [1.5, 2.0, 3.0]
        assert table.image_bytes(2) == (files / "sub dir" / "c.png").read_bytes()

    def test_numbers_stay_numbers(self, files: Path) -> None:
        table = open_images(write(files, "l.csv", "path,label\na.png,4\nb.png,10\n"))
        assert table.labels.tolist() == [4, 10]
        assert table.class_names is None
        assert table.ids == ["a.png", "b.png"]

    @pytest.mark.parametrize("sign", ["|", ";"])
    def test_several_labels(self, files: Path, sign: str) -> None:
        text = f"filename,label\na.png,sea{sign}sky\nb.png,sky\nsub dir/c.png,land{sign} sea\n"
        table = open_images(write(files, "l.csv", text))
        assert table.class_names == ["land", "sea", "sky"]
        assert table.labels.tolist() == [[False, True, True], [False, False, True], [True, True, False]]

    @pytest.mark.parametrize(
        ("texts", "names", "labels"),
        [
            (("sea;;sky", "|sky", "sea| ;sky;"), ["sea", "sky"], [[0, 1], [1], [0, 1]]),
            (("1;;2", ";3;", ";"), None, [[1, 2], [3], None]),
            (("a|b|a", "a|b|b", ";"), ["a", "b"], [[0, 1, 0], [0, 1, 1], None]),
        ],
    )
    def test_nothing_between_separators_is_no_label(
        self, files: Path, texts: tuple[str, ...], names: list[str] | None, labels: list[Any]
    ) -> None:
        rows = [
            f"{name},{text}" for name, text in zip(("a.png", "b.png", "sub dir/c.png"), texts, strict=True)
        ]
        table = open_images(write(files, "l.csv", "\n".join(["path,label", *rows])))
        assert table.class_names == names
        assert table.table["label"].to_pylist() == labels

    def test_words_for_nothing_are_unknown_among_numbers_alone(self, files: Path) -> None:
        rows = [
            "path,label,id,country,price",
            "a.png,NA,NA,NA,NA",
            "b.png,FR,null,FR,2.5",
            "sub dir/c.png,,3,,",
        ]
        table = open_images(write(files, "l.csv", "\n".join(rows)))
        assert table.class_names == ["FR", "NA"]
        assert table.ids == ["NA", "null", "3"]
        assert table.table["label"].to_pylist() == [1, 0, None]
        assert table.table["country"].to_pylist() == ["NA", "FR", None]
        assert table.table["price"].to_pylist() == [None, 2.5, None]

    @pytest.mark.parametrize(("text", "labels"), [("4", [4, None, None]), ("4|7", [[4, 7], None, None])])
    def test_labels_that_are_numbers_may_be_unknown_by_a_word(
        self, files: Path, text: str, labels: list[Any]
    ) -> None:
        table = open_images(write(files, "l.csv", f"path,label\na.png,{text}\nb.png,NA\nsub dir/c.png,\n"))
        assert table.table["label"].to_pylist() == labels
        assert table.class_names is None

    def test_empty_columns_without_a_name_and_empty_rows_are_left_out(self, files: Path) -> None:
        table = open_images(write(files, "l.csv", "path,label,,\na.png,x,,\nb.png,y,,\n"))
        assert table.table.column_names == ["id", "image", "label"]
        table = open_images(write(files, "l.csv", "path,label,price\na.png,x,1\n,,\nb.png,,\n,,\n"))
        assert table.ids == ["a.png", "b.png"]
        with pytest.raises(DataError, match="columns stand more than once: ''"):
            open_images(write(files, "l.csv", "path,label,,\na.png,x,1,\nb.png,y,,2\n"))

    def test_spaces_around_the_names_of_columns_are_no_part_of_them(self, files: Path) -> None:
        table = open_images(
            write(files, "l.csv", "\ufeffid, path , label,price\n007,a.png, 04,1\n008,b.png,NA,2\n")
        )
        assert table.table.column_names == ["id", "image", "label", "price"]
        assert table.ids == ["007", "008"]
        assert table.table["label"].to_pylist() == [4, None]
        with pytest.raises(DataError, match="columns stand more than once: 'label'"):
            open_images(write(files, "l.csv", "path,label, label\na.png,x,1\n"))

    @pytest.mark.parametrize("column", ["label", "id"])
    def test_numbers_that_a_spreadsheet_has_shortened_are_refused(self, files: Path, column: str) -> None:
        text = f"path,{column}\na.png,4.00638E+12\nb.png,4.00638E+12\nsub dir/c.png,7\n"
        with pytest.raises(
            DataError, match=rf"2 numbers of the column '{column}' are shortened.*4\.00638E\+12.*as text"
        ):
            open_images(write(files, "l.csv", text))
        kept = open_images(write(files, "l.csv", f"path,{column}\na.png,E+12\nb.png,1E5\n"))
        assert len(kept) == 2

    @pytest.mark.parametrize(
        "text",
        [
            "path,caf\xe9\na.png,1\n",
            "path,label\na.png,caf\xe9\n",
            "path,note\na.png,caf\xe9\n",
            "path,note,id\n" + "".join(f"a.png,x,{row}\n" for row in range(2000)) + "a.png,caf\xe9,last\n",
        ],
        ids=["a name", "a label", "another column", "far below"],
    )
    def test_another_encoding_is_told(self, files: Path, text: str) -> None:
        (files / "l.csv").write_bytes(text.encode("cp1252"))
        with pytest.raises(DataError, match=r"not .*UTF-8 .*spreadsheets call 'CSV UTF-8'"):
            open_images(str(files / "l.csv"))

    @pytest.mark.parametrize("between", [",", ";", "\t"])
    @pytest.mark.parametrize("told", [False, True])
    def test_signs_between_columns(self, files: Path, between: str, told: bool) -> None:
        rows = [["path", "label", "note"], ["a.png", '"x;y"', '"1,5 m"'], ["b.png", "y", ""]]
        text = "\r\n".join(between.join(row) for row in rows)
        table = open_images(write(files, "l.csv", f"sep={between}\r\n" * told + text))
        assert table.ids == ["a.png", "b.png"]
        assert table.class_names == ["x", "y"]
        assert table.labels.tolist() == [[1, 1], [0, 1]]
        assert table.table["note"].to_pylist() == ["1,5 m", None]

    @pytest.mark.parametrize("between", [";", "\t"])
    def test_decimal_commas(self, files: Path, between: str) -> None:
        rows = [
            ["path", "price", "size", "mixed"],
            ["a.png", "100,0", "3", "1,5"],
            ["b.png", "-9,95", "", "x"],
        ]
        table = open_images(write(files, "l.csv", "\n".join(between.join(row) for row in rows))).table
        assert table["price"].to_pylist() == [100.0, -9.95]
        assert table["size"].to_pylist() == [3, None]
        assert table["mixed"].to_pylist() == ["1,5", "x"]
        commas = open_images(write(files, "c.csv", 'path,price\na.png,"100,0"\n')).table
        assert commas["price"].to_pylist() == ["100,0"]  # maybe two of something

    @pytest.mark.parametrize("text", ["\tpath\n0\ta.png\n1\tb.png\n", "path\t\na.png\t\nb.png\t\n"])
    def test_a_tab_at_either_end_of_the_names_stands_between_columns(self, files: Path, text: str) -> None:
        assert open_images(write(files, "l.csv", text)).ids == ["a.png", "b.png"]

    @pytest.mark.parametrize("text", ["picture;label\na.png;x\n", "sep=;\npath,label\na.png,x\n"])
    def test_signs_between_columns_of_which_none_is_of_paths(self, files: Path, text: str) -> None:
        with pytest.raises(
            DataError, match=r"no column of paths among p.*label .*name it 'path'.*put commas, semicolons"
        ):
            open_images(write(files, "l.csv", text))

    def test_text_of_several_lines_stays_together_in_a_large_file(self, files: Path) -> None:
        text = "nine char\n" * 200  # Arrow reads a file in blocks of 2^20 bytes
        rows = "".join(f'a.png,{row},"{text}{row}"\n' for row in range(600))
        table = open_images(write(files, "l.csv", "path,id,note\n" + rows))
        assert table.ids == [str(row) for row in range(600)]
        assert table.table["note"].to_pylist() == [f"{text}{row}" for row in range(600)]

    def test_columns_of_the_same_name(self, files: Path) -> None:
        with pytest.raises(DataError, match="columns stand more than once: 'label'"):
            open_images(write(files, "l.csv", "path,label,label\na.png,x,1\n"))

    def test_errors(self, files: Path) -> None:
        with pytest.raises(DataError, match="no column of paths"):
            open_images(write(files, "l.csv", "picture,label\na.png,1\n"))
        with pytest.raises(DataError, match="no row"):
            open_images(write(files, "l.csv", "path,label\n"))
        with pytest.raises(DataError, match="row 2 has no path"):
            open_images(write(files, "l.csv", "path,label\na.png,1\n,1\n"))
        with pytest.raises(DataError, match="not a valid CSV"):
            open_images(write(files, "l.csv", "path,label\na.png\n"))
        with pytest.raises(DataError, match="not a valid CSV"):
            open_images(write(files, "l.csv", ""))
        with pytest.raises(DataError, match="1 of 1 images are missing"):
            open_images(write(files, "l.csv", "path\nx.png\n"))


class ShortReader(pq.ParquetFile):
    """Reads at most `rows` rows at once, as Arrow does where they hold 2 GiB."""

    rows = 4

    def read_row_group(self, *_: Any, **__: Any) -> pa.Table:
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")

    def iter_batches(self, batch_size: int, **options: Any) -> Any:
        if batch_size > self.rows:
            self.read_row_group()
        return super().iter_batches(batch_size, **options)


class TestParquet:
    def test_hugging_face_layout_with_names(self, tmp_path: Path) -> None:
        features = {"features": {"labels": {"names": ["no", "yes"], "_type": "ClassLabel"}}}
        table = pa.table(
            {
                "img": [{"bytes": b"one", "path": None}, {"bytes": b"three", "path": None}],
                "labels": [1, 0],
                "extra": ["p", "q"],
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": features})})
        pq.write_table(table, tmp_path / "train-0.parquet")
        found = open_images(str(tmp_path / "train-0.parquet"))
        assert found.class_names == ["no", "yes"]
        assert found.labels.tolist() == [1, 0]
        assert found.ids == ["train-0-0000000", "train-0-0000001"]
        assert found.image_bytes(1) == b"three"
        assert found.table["extra"].to_pylist() == ["p", "q"]

    def test_several_labels_with_names(self, tmp_path: Path) -> None:
        inner = {"names": ["x", "y", "z"], "_type": "ClassLabel"}
        features = {"features": {"labels": {"feature": inner, "_type": "Sequence"}}}
        table = pa.table({"image": [b"1", b"2"], "labels": [[0, 2], []]})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": features})})
        pq.write_table(table, tmp_path / "a.parquet")
        found = open_images(str(tmp_path / "a.parquet"))
        assert found.classes == 3
        assert found.labels.tolist() == [[True, False, True], [False] * 3]

    @pytest.mark.parametrize(
        ("lists", "refused"),
        [
            ([[0, 0, 1], [1, 0, 1], None], True),
            ([[0, 1], [1, 1]], True),
            ([[0, 1], [1, 0]], False),
            ([[0, 1, 2], [1, 0, 1]], False),
            ([[0, 0, 1], [1]], False),
            ([None, None], False),
            ([[0], [1]], False),
            ([[], []], False),
        ],
    )
    def test_a_place_for_each_class_is_no_list_of_labels(
        self, tmp_path: Path, lists: list[Any], refused: bool
    ) -> None:
        label = pa.array(lists, pa.list_(pa.int8()))
        pq.write_table(
            pa.table({"image": [b"%d" % n for n in range(len(lists))], "label": label}),
            tmp_path / "a.parquet",
        )
        if refused:
            with pytest.raises(
                DataError, match=r"have a 0 or 1 for each of [23] classes .*such as \[3, 17\]"
            ):
                open_images(str(tmp_path / "a.parquet"))
        else:
            assert open_images(str(tmp_path / "a.parquet")).table["label"].to_pylist() == lists

    def test_empty_text_is_no_class(self, tmp_path: Path) -> None:
        pq.write_table(
            pa.table({"image": [b"1", b"2", b"3"], "label": ["", "cat", "  "]}), tmp_path / "a.parquet"
        )
        found = open_images(str(tmp_path / "a.parquet"))
        assert found.class_names == ["cat"]
        assert found.table["label"].to_pylist() == [None, 0, None]
        pq.write_table(
            pa.table({"image": [b"1", b"2"], "label": [["cat", ""], ["dog"]]}), tmp_path / "b.parquet"
        )
        with pytest.raises(DataError, match="a list of labels holds an unknown one"):
            open_images(str(tmp_path / "b.parquet"))

    def test_a_large_row_group_is_read_in_parts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = [bytes([row]) * 1000 for row in range(50)]
        images = pa.array([{"bytes": item, "path": None} for item in data])
        pq.write_table(pa.table({"image": images, "label": list(range(50))}), tmp_path / "a.parquet")
        monkeypatch.setattr(readers, "_BATCH_BYTES", 10_000)
        monkeypatch.setattr(pq, "ParquetFile", ShortReader)
        found = open_images(str(tmp_path / "a.parquet"))
        assert found.table["image"].num_chunks >= 50 // ShortReader.rows
        assert [found.image_bytes(row) for row in range(50)] == data
        assert found.labels.tolist() == list(range(50))

    def test_a_row_group_that_cannot_be_read_at_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "a.parquet")
        monkeypatch.setattr(ShortReader, "rows", 0)
        monkeypatch.setattr(pq, "ParquetFile", ShortReader)
        with pytest.raises(DataError, match=r"a\.parquet: the Parquet file cannot be read: Nested data"):
            open_images(str(tmp_path / "a.parquet"))

    def test_folder_and_pattern_join_files_in_order(self, tmp_path: Path) -> None:
        for part in (1, 0, 2):
            rows = [{"bytes": bytes([part]), "path": f"{part}/x.png"}]
            pq.write_table(pa.table({"image": rows, "label": [part]}), tmp_path / f"train-{part}.parquet")
        folder, pattern = open_images(str(tmp_path)), open_images(f"{tmp_path}/train-[01].parquet")
        assert folder.labels.tolist() == [0, 1, 2]
        assert folder.ids == ["0/x.png", "1/x.png", "2/x.png"]
        assert folder.image_bytes(2) == b"\x02"
        assert pattern.labels.tolist() == [0, 1]

    def test_string_column_and_struct_without_bytes_are_paths(self, tmp_path: Path, make_image: Any) -> None:
        (tmp_path / "a.png").write_bytes(data := make_image())
        pq.write_table(pa.table({"image": ["a.png"]}), tmp_path / "s.parquet")
        pq.write_table(pa.table({"image": [{"path": "a.png"}], "id": [17]}), tmp_path / "t.parquet")
        strings, structs = (open_images(str(tmp_path / name)) for name in ("s.parquet", "t.parquet"))
        assert strings.ids == ["a.png"]
        assert structs.ids == ["17"]
        assert strings.image_bytes(0) == structs.image_bytes(0) == data

    def test_several_splits_in_one_folder_are_refused(self, tmp_path: Path) -> None:
        for name in ("train-0.parquet", "test-0.parquet"):
            pq.write_table(pa.table({"image": [b"1"]}), tmp_path / name)
        with pytest.raises(DataError, match=r"several splits: test, train.*test\*\.parquet"):
            open_images(str(tmp_path))
        assert len(open_images(f"{tmp_path}/*.parquet")) == 2

    def test_errors(self, tmp_path: Path) -> None:
        write(tmp_path, "a.parquet", "no parquet at all")
        with pytest.raises(DataError, match="not a valid Parquet"):
            open_images(str(tmp_path / "a.parquet"))
        pq.write_table(pa.table({"picture": [b"1"]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="no image column among picture"):
            open_images(str(tmp_path / "a.parquet"))
        pq.write_table(pa.table({"image": [1]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="of type int64"):
            open_images(str(tmp_path / "a.parquet"))
        pq.write_table(pa.table({"image": [b"1"], "label": [0.5]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="labels are of type double"):
            open_images(str(tmp_path / "a.parquet"))
        pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="no row"):
            open_images(str(tmp_path / "a.parquet"))

    def test_columns_of_the_same_name(self, tmp_path: Path) -> None:
        table = pa.table([[b"1"], ["x"], ["y"]], names=["image", "label", "label"])
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet: columns stand more than once: 'label'"):
            open_images(str(tmp_path))

    def test_files_that_do_not_fit_each_other(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [b"1"], "label": [0]}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"image": [b"1"], "label": ["x"]}), tmp_path / "b.parquet")
        with pytest.raises(DataError, match="same columns"):
            open_images(str(tmp_path))


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_files_are_memory_mapped(tmp_path: Path, stream: bool) -> None:
    data = [bytes([row]) * 100_000 for row in range(20)]
    images = pa.array([{"bytes": item, "path": None} for item in data])
    table = pa.table({"image": images, "label": [row % 2 for row in range(20)]})
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    before = pa.total_allocated_bytes()
    found = open_images(str(tmp_path / "a.arrow"))
    assert pa.total_allocated_bytes() - before < 100_000
    assert found.image_bytes(7) == data[7]
    assert found.take(np.array([9, 3])).image_bytes(1) == data[3]


def test_several_paths_are_no_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one path or URI, got list \(name a folder, a pattern"):
        open_images(["a.jpg", "b.jpg"])  # type: ignore[arg-type]


def test_no_letters_are_not_the_folder_one_stands_in(photo_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(photo_folder)
    assert len(open_images("."))
    with pytest.raises(DataError, match="a path of no letters names no images"):
        open_images("")


def test_unknown_form_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of images, a \.txt list, a \.csv, or \.parquet or \.arrow"):
        open_images(write(tmp_path, "a.zip", "x"))
    (tmp_path / "a.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match="not a valid Arrow"):
        open_images(str(tmp_path / "a.arrow"))


@pytest.mark.parametrize(
    ("column", "expected", "names"),
    [
        (["4006381333931", "12", "012", "-1"], [2, 1, 0, None], ["012", "12", "4006381333931"]),
        ([20_000_000, 20_000_001, -1, None], [0, 1, None, None], ["20000000", "20000001"]),
        ([[5_000_000, 7], []], [[0, 1], []], ["5000000", "7"]),
        ([999_999, 7, -1], [999_999, 7, None], None),
    ],
)
def test_large_numbers_are_names(column: list[Any], expected: list[Any], names: list[str] | None) -> None:
    label, found = canonical_labels(pa.array(column), None, where="t")
    assert label.to_pylist() == expected
    assert found == names


def test_views_of_text_and_bytes_are_read_as_what_they_show(tmp_path: Path) -> None:
    text, data = pa.string_view(), pa.binary_view()
    pictures = [b"1", b"2", b"3"]
    columns = {
        "id": pa.array(["a", "b", "c"], text),
        "label": pa.array(["owl", "cat", "owl"], text),
        "shop": pa.array(["x", "y", None], text),
        "tags": pa.array([["x"], [], ["y", "z"]], pa.list_(text)),
    }
    structs = pa.array([{"bytes": picture} for picture in pictures], pa.struct([("bytes", data)]))
    for images in (structs, pa.array(pictures, data)):
        table = pa.table(columns | {"image": images})
        with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as writer:
            writer.write_table(table)
        found = open_images(str(tmp_path / "t.arrow")).take(np.array([2, 0]))
        assert found.ids == ["c", "a"]
        assert found.labels.tolist() == [1, 1]
        assert found.image_bytes(0) == b"3"
        assert found.table["shop"].to_pylist() == [None, "x"]
        assert found.table["tags"].to_pylist() == [["y", "z"], ["x"]]


def test_dictionary_labels_are_decoded() -> None:
    label, names = canonical_labels(pa.array(["b", "a", "b"]).dictionary_encode(), None, where="t")
    assert label.to_pylist() == [1, 0, 1]
    assert names == ["a", "b"]
