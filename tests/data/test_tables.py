"""Hugging Face tables: saved to disk, as parquet, by hub name, and in hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageType
from PIL import Image

from potstill.core.errors import DataError
from potstill.core.types import IGNORED
from potstill.data import from_dataset
from potstill.data.readers import read
from potstill.data.tables import read_hub


def pixels(num: int) -> np.ndarray:
    return np.random.default_rng(num).integers(0, 256, (num, 5, 5), dtype=np.uint8)


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="png")
    return file.getvalue()


def table(num: int, *, image: str = "image", label: str = "label") -> Dataset:
    rows = {image: [{"bytes": png(values), "path": None} for values in pixels(num)], label: [i % 2 for i in range(num)]}
    return Dataset.from_dict(rows, features=Features({image: ImageType(), label: ClassLabel(names=["cat", "dog"])}))


def test_a_saved_data_set_reads_back(tmp_path):
    DatasetDict(train=table(6), test=table(4)).save_to_disk(str(tmp_path / "saved"))
    parts = read(str(tmp_path / "saved"))
    assert np.array_equal(parts.train.pixels.squeeze(1).numpy(), pixels(6))
    assert np.array_equal(parts.test.pixels.squeeze(1).numpy(), pixels(4))
    assert parts.class_names == ("cat", "dog")


def test_a_saved_table_without_parts_is_split(tmp_path):
    table(20).save_to_disk(str(tmp_path / "saved"))
    parts = read(str(tmp_path / "saved"))
    assert (len(parts.train), len(parts.test)) == (18, 2)


def test_parquet_files_read_back(tmp_path):
    table(6).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    table(4).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    parts = read(str(tmp_path))
    assert np.array_equal(parts.train.pixels.squeeze(1).numpy(), pixels(6))
    assert (len(parts.test), parts.class_names) == (4, ("cat", "dog"))


def test_several_parquet_files_of_one_part_are_joined(tmp_path):
    (tmp_path / "train").mkdir()
    table(6).to_parquet(tmp_path / "train" / "0.parquet")
    table(4).to_parquet(tmp_path / "train" / "1.parquet")
    assert sum(map(len, (read(str(tmp_path)).train, read(str(tmp_path)).test))) == 10


def test_parquet_without_the_types_of_datasets_reads_too(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"image": {"bytes": png(values), "path": ""}, "label": i % 2} for i, values in enumerate(pixels(20))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    parts = read(str(tmp_path))
    assert (len(parts.train), parts.class_names) == (18, ("0", "1"))


def test_parquet_files_of_unclear_part_are_refused(tmp_path):
    table(6).to_parquet(tmp_path / "train-0.parquet")
    table(4).to_parquet(tmp_path / "more.parquet")
    with pytest.raises(DataError, match="do not all say which part"):
        read(str(tmp_path))


def test_a_torn_parquet_file_is_named(tmp_path):
    table(6).to_parquet(tmp_path / "train-0.parquet")
    (tmp_path / "train-0.parquet").write_bytes((tmp_path / "train-0.parquet").read_bytes()[:-50])
    with pytest.raises(DataError, match=r"train-0\.parquet cannot be read as parquet"):
        read(str(tmp_path))


def test_a_torn_saved_data_set_is_named(tmp_path):
    table(6).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").unlink()
    with pytest.raises(DataError, match="saved cannot be read as a saved data set"):
        read(str(tmp_path / "saved"))


def test_the_hub_is_asked_by_way_of_load_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "local").mkdir()
    table(6).to_parquet(tmp_path / "local" / "train-00000-of-00001.parquet")
    table(4).to_parquet(tmp_path / "local" / "test-00000-of-00001.parquet")
    parts = read_hub(str(tmp_path / "local"))
    assert (len(parts.train), len(parts.test)) == (6, 4)


def test_a_hub_name_without_a_network_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing: there is no such file or folder here, and the hub did not"):
        read("nobody/nothing")


def test_columns_of_other_names_are_found_by_their_type(tmp_path):
    DatasetDict(train=table(6, image="img", label="kind"), test=table(4, image="img", label="kind")).save_to_disk(
        str(tmp_path / "saved")
    )
    assert read(str(tmp_path / "saved")).train.labels.tolist() == [0, 1] * 3


def test_two_columns_of_labels_must_be_told_apart(tmp_path):
    both = table(6, label="fine").add_column("coarse", [0] * 6).cast_column("coarse", ClassLabel(names=["x"]))
    both.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"2 columns are of type ClassLabel.*from_dataset\(\.\.\., label=\.\.\.\)"):
        read(str(tmp_path / "saved"))


def test_a_data_set_in_hand_is_read_by_its_columns():
    data = from_dataset(
        DatasetDict(train=table(6, image="img"), test=table(4, image="img")), image="img", batch=3, labelled=2
    )
    assert (data.shape, data.train.batch_size, len(data.train.pictures.labelled)) == ((1, 5, 5), 3, 2)


def test_a_column_of_plain_numbers_is_a_picture_too():
    rows = Dataset.from_dict({"image": pixels(20).tolist(), "label": [i % 2 for i in range(20)]})
    data = from_dataset(rows)
    assert (data.shape, len(data.train), len(data.test)) == ((1, 5, 5), 18, 2)


def test_a_missing_column_is_named():
    with pytest.raises(DataError, match=r"there is no column 'picture'. It has: image, label"):
        from_dataset(table(6), image="picture")


def test_a_missing_training_split_is_named():
    with pytest.raises(DataError, match=r"no split 'train'\. It has: test"):
        from_dataset(DatasetDict(test=table(4)))


def test_a_broken_picture_is_named_by_its_row():
    rows = [{"bytes": png(values), "path": None} for values in pixels(4)]
    rows[2]["bytes"] = rows[2]["bytes"][:40]
    features = Features({"image": ImageType(), "label": Value("int64")})
    with pytest.raises(DataError, match=r"from_dataset \(train\) row 2 cannot be read as a picture"):
        from_dataset(Dataset.from_dict({"image": rows, "label": [0, 1, 0, 1]}, features=features))


def test_a_missing_picture_is_named_by_its_row():
    features = Features({"image": ImageType(), "label": Value("int64")})
    rows = [{"bytes": png(pixels(1)[0]), "path": None}, None]
    with pytest.raises(DataError, match="row 1 holds no picture"):
        from_dataset(Dataset.from_dict({"image": rows, "label": [0, 1]}, features=features))


def test_words_for_labels_are_refused():
    words = Dataset.from_dict({"image": pixels(2).tolist(), "label": ["cat", "dog"]})
    with pytest.raises(DataError, match="labels are <U3 such as"):
        from_dataset(words)


def test_only_labelled_rows_are_held_back():
    rows = Dataset.from_dict({"image": pixels(20).tolist(), "label": [IGNORED if i % 2 else 0 for i in range(20)]})
    data = from_dataset(rows)
    assert (len(data.test), data.test.pictures.labels.tolist()) == (1, [0])
