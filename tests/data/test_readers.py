"""Each layout on disk reads back what was written; each way it can be spoilt is refused by name."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.core.errors import DataError
from potstill.data import images
from potstill.data.readers import IDX_FILES, LAYOUTS, read
from tests.data.places import shared


def pixels(num: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(num).integers(0, 256, (num, *shape), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, *, ending: str = "") -> dict[str, np.ndarray]:
    written = dict(zip(IDX_FILES, (pixels(5, 3, 4), pixels(5) % 2, pixels(2, 3, 4), np.array([1, 0])), strict=True))
    written["train-labels-idx1-ubyte"][:2] = (0, 1)
    for name, array in written.items():
        content = idx(array.astype(np.uint8))
        (folder / f"{name}{ending}").write_bytes(gzip.compress(content) if ending else content)
    return written


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files_read_back(tmp_path, ending):
    written = write_idx(tmp_path, ending=ending)
    parts = read(str(tmp_path))
    assert np.array_equal(parts.train.pixels.squeeze(1).numpy(), written["train-images-idx3-ubyte"])
    assert parts.test.labels.tolist() == [1, 0]


def test_fashion_mnist_has_its_official_counts():
    fashion = images(str(shared("fashion-mnist")))
    assert (len(fashion.train), len(fashion.test), fashion.shape) == (60_000, 10_000, (1, 28, 28))
    assert torch.bincount(fashion.train.pictures.labels).tolist() == [6_000] * 10
    # The training mean and deviation everybody quotes for it, in units of 255.
    assert fashion.train.pictures.mean.item() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert fashion.train.pictures.std.item() / 255 == pytest.approx(0.3530, abs=5e-5)


@pytest.mark.parametrize("keep", [0, 9, 30, -1])
def test_a_torn_gzip_is_named(tmp_path, keep):
    write_idx(tmp_path, ending=".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        read(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 6, 20, -1])
def test_a_short_idx_file_is_named(tmp_path, keep):
    write_idx(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte"):
        read(str(tmp_path))


def test_a_missing_idx_file_is_named(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\[.gz\] is missing"):
        read(str(tmp_path))


def test_labels_in_the_place_of_pictures_are_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes((tmp_path / "train-labels-idx1-ubyte").read_bytes())
    with pytest.raises(DataError, match="does not begin as an idx3 file"):
        read(str(tmp_path))


def write_npz(path: Path, **changed: np.ndarray) -> dict[str, np.ndarray]:
    written = {"x_train": pixels(6, 4, 4, 3), "y_train": np.arange(6) % 3, "x_test": pixels(3, 4, 4, 3)}
    written |= {"y_test": np.arange(3), **changed}
    np.savez(path, **written)
    return written


def test_an_npz_file_reads_back(tmp_path):
    written = write_npz(tmp_path / "set.npz")
    parts = read(str(tmp_path / "set.npz"))
    assert np.array_equal(parts.train.pixels.numpy(), written["x_train"].transpose(0, 3, 1, 2))
    assert parts.class_names == ("0", "1", "2")


def test_a_missing_array_is_named(tmp_path):
    np.savez(tmp_path / "set.npz", x_train=pixels(3, 2, 2), labels=np.arange(3))
    with pytest.raises(DataError, match=r"no array 'y_train'\. It holds: x_train, labels"):
        read(str(tmp_path / "set.npz"))


def test_a_torn_npz_file_is_named(tmp_path):
    write_npz(tmp_path / "set.npz")
    (tmp_path / "set.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:200])
    with pytest.raises(DataError, match=r"set\.npz cannot be read"):
        read(str(tmp_path / "set.npz"))


class Trap:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_pickled_is_loaded(tmp_path):
    write_npz(tmp_path / "set.npz", y_train=np.array([Trap(tmp_path / "sprung")] * 6, dtype=object))
    with pytest.raises(DataError, match="plain arrays"):
        read(str(tmp_path / "set.npz"))
    assert not (tmp_path / "sprung").exists()


def test_a_bare_pickle_is_not_loaded_either(tmp_path):
    (tmp_path / "set.npz").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(DataError, match="plain arrays"):
        read(str(tmp_path / "set.npz"))
    assert not (tmp_path / "sprung").exists()


def test_a_test_label_unknown_in_training_is_refused(tmp_path):
    write_npz(tmp_path / "set.npz", y_test=np.array([0, 7, 1]))
    with pytest.raises(DataError, match="test row 1 has the label 7, but there are the classes 0 to 2"):
        read(str(tmp_path / "set.npz"))


def write_tree(top: Path, counts: dict[str, int], *, mode: str = "RGB", side: int = 6) -> dict[str, np.ndarray]:
    """counts: folder -> number of pictures in it. Returns the pixels by folder."""
    written = {}
    for number, (folder, count) in enumerate(counts.items()):
        shape = (side, side, 3) if mode == "RGB" else (side, side)
        written[folder] = np.random.default_rng(number).integers(0, 256, (count, *shape), dtype=np.uint8)
        (top / folder).mkdir(parents=True, exist_ok=True)
        for index, values in enumerate(written[folder]):
            Image.fromarray(values).save(top / folder / f"{index:03}.png")
    return written


def test_a_folder_of_pictures_reads_back(tmp_path):
    written = write_tree(tmp_path, {"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 2})
    parts = read(str(tmp_path))
    expected = np.concatenate([written["train/cat"], written["train/dog"]]).transpose(0, 3, 1, 2)
    assert np.array_equal(parts.train.pixels.numpy(), expected)
    assert (parts.train.labels.tolist(), parts.test.labels.tolist()) == ([0, 0, 0, 1, 1], [0, 1, 1])
    assert parts.class_names == ("cat", "dog")


def test_grey_pictures_have_one_channel(tmp_path):
    write_tree(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1}, mode="L")
    assert read(str(tmp_path)).train.pixels.shape == (4, 1, 6, 6)


def test_grey_pictures_among_coloured_ones_become_coloured(tmp_path):
    grey = write_tree(tmp_path, {"a": 2}, mode="L")["a"]
    write_tree(tmp_path, {"b": 2})
    parts = read(str(tmp_path))
    stored = torch.cat([parts.train.pixels, parts.test.pixels])[torch.cat([parts.train.labels, parts.test.labels]) == 0]
    assert {row.tobytes() for row in stored[:, 2].numpy()} == {row.tobytes() for row in grey}


def test_without_a_test_part_a_tenth_of_each_class_is_held_back(tmp_path):
    write_tree(tmp_path, {"a": 20, "b": 11, "c": 2})
    parts = read(str(tmp_path))
    assert torch.bincount(parts.test.labels).tolist() == [2, 1, 1]
    assert len(parts.train) == 33 - 4


def test_what_is_held_back_does_not_depend_on_file_names(tmp_path):
    write_tree(tmp_path / "one", {"a": 20})
    write_tree(tmp_path / "two", {"a": 20})
    for index, path in enumerate(sorted((tmp_path / "two" / "a").iterdir(), reverse=True)):
        path.rename(path.with_name(f"renamed-{index:03}.png"))
    first, second = (read(str(tmp_path / name)).test.pixels for name in ("one", "two"))
    assert {row.numpy().tobytes() for row in first} == {row.numpy().tobytes() for row in second}


@pytest.mark.parametrize("keep", [0, 20, 60])
def test_a_broken_picture_is_named(tmp_path, keep):
    write_tree(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "b" / "001.png").write_bytes((tmp_path / "b" / "001.png").read_bytes()[:keep])
    with pytest.raises(DataError, match=r"b/001\.png cannot be read as a picture"):
        read(str(tmp_path))


def test_a_text_file_among_pictures_is_named(tmp_path):
    write_tree(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    with pytest.raises(DataError, match=r"a/notes\.txt is no picture by its name"):
        read(str(tmp_path))


def test_pictures_of_two_sizes_are_named(tmp_path):
    write_tree(tmp_path, {"a": 2})
    write_tree(tmp_path, {"b": 2}, side=7)
    with pytest.raises(DataError, match=r"b/000\.png is 7 x 7 .*a/000\.png is\s+6 x 6"):
        read(str(tmp_path))


def test_sixteen_bits_per_value_are_refused(tmp_path):
    write_tree(tmp_path, {"a": 2, "b": 2})
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(tmp_path / "a" / "001.png")
    with pytest.raises(DataError, match=r"a/001\.png holds more than 8 bits"):
        read(str(tmp_path))


def test_a_class_only_in_the_test_part_is_refused(tmp_path):
    write_tree(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/c": 1})
    with pytest.raises(DataError, match=r"the class 'c' has no folder for training\. There is: a, b"):
        read(str(tmp_path))


def test_a_test_part_without_a_training_part_is_refused(tmp_path):
    write_tree(tmp_path, {"test/a": 2})
    with pytest.raises(DataError, match="'test' but no 'train'"):
        read(str(tmp_path))


def test_an_empty_class_is_named(tmp_path):
    write_tree(tmp_path, {"a": 3, "b": 0})
    with pytest.raises(DataError, match=r"b: no picture in it"):
        read(str(tmp_path))


def test_a_picture_beside_the_class_folders_is_named(tmp_path):
    write_tree(tmp_path, {"a": 3, "b": 3, ".": 1})
    with pytest.raises(DataError, match=r"000\.png lies outside the folders of the classes"):
        read(str(tmp_path))


def test_one_picture_per_class_is_too_few(tmp_path):
    write_tree(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(DataError, match="too few to hold any back"):
        read(str(tmp_path))


def refusal(path: object) -> str:
    with pytest.raises(DataError) as caught:
        read(str(path))
    return str(caught.value)


def test_a_refusal_lists_every_layout(tmp_path):
    message = refusal(tmp_path)
    assert all(layout.about in message for layout in LAYOUTS)
    assert "the folder is empty" in message


def test_a_refusal_says_what_the_folder_holds(tmp_path):
    (tmp_path / "data.csv").touch()
    assert "the folder holds data.csv" in refusal(tmp_path)


def test_a_refusal_says_what_kind_of_file_it_is(tmp_path):
    (tmp_path / "set.csv").touch()
    assert "this is a file ending in '.csv'" in refusal(tmp_path / "set.csv")


def test_a_missing_folder_is_said_to_be_missing(tmp_path):
    assert "there is no such file or folder" in refusal(tmp_path / "nowhere")


def test_a_misspelling_of_digits_is_told_the_right_word():
    assert "did you mean 'digits'?" in refusal("digit")
