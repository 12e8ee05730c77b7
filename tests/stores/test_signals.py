"""Signals are joined to rows by content: by what is shown and counted, whatever stands beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from potstill.core.errors import SignalError, StorageError, UserError
from potstill.core.types import Batch, Dense, Need, Signal, Sparse
from potstill.stores import Contents, Layer, Sampled, SignalReader, Top, Whole, info
from potstill.stores.signals import SignalStore, spread, writing_signals

CONTENTS = Contents(
    teacher="t",
    sketch=Whole(dtype="float32"),
    layers=(Layer(name="last", shape=(2, 3), dtype="float32"), Layer(name="mean", dtype="bfloat16")),
    vocabulary="words",
    size=5,
)
LOGITS = Need(logits=True)


def tokens(*lengths: int, left: int = 0, right: int = 0, first: int = 0) -> Batch:
    """Rows named r0, r1, ..., of which all but the first two real positions count, with padding on both sides."""
    width = max(lengths) + left + right
    real = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real[row, left : left + length] = 1
        mask[row, left + 2 : left + length] = True
    return Batch(
        keys=tuple(f"r{first + row}" for row in range(len(lengths))),
        inputs={"input_ids": real, "attention_mask": real},
        labels=mask.long(),
        mask=mask,
        vocabulary="words",
    )


def pictures(*shades: float) -> Batch:
    """Rows of one key: views of one picture."""
    return Batch(
        keys=("p",) * len(shades),
        inputs={"image": torch.tensor(shades)[:, None, None, None].expand(-1, 1, 2, 2)},
        labels=torch.zeros(len(shades), dtype=torch.long),
        mask=torch.ones(len(shades), dtype=torch.bool),
    )


def said(batch: Batch, *, seed: int = 0) -> Signal:
    """Logits [N, 5] and two layers at the counted positions."""
    generator = torch.Generator().manual_seed(seed)
    num_positions = int(batch.mask.sum())
    return Signal(
        logits=Dense(logits=torch.randn(num_positions, 5, generator=generator)),
        features={
            "last": torch.randn(num_positions, 2, 3, generator=generator),
            "mean": torch.randn(num_positions, generator=generator),
        },
    )


def store(folder: Path, batch: Batch, signal: Signal, contents: Contents = CONTENTS) -> None:
    with writing_signals(folder, contents) as writer:
        keys = writer.keys(batch)
        assert writer.contents.sketch is not None and isinstance(signal.logits, Dense)
        entries = writer.contents.sketch.entries(signal.logits.logits, writer.uniforms(keys, batch))
        writer.write(keys, writer.missing(keys), batch, entries=entries, features=signal.features)


def read(folder: Path, batch: Batch, need: Need = CONTENTS.need) -> Signal:
    reader = SignalReader(folder)
    return reader.read(reader.find(batch), need)


def taken(batch: Batch, rows: list[int]) -> Batch:
    return replace(
        batch,
        keys=tuple(batch.keys[row] for row in rows),
        inputs={name: tensor[rows] for name, tensor in batch.inputs.items()},
        labels=batch.labels[rows],
        mask=batch.mask[rows],
    )


def logits(signal: Signal) -> Tensor:
    assert isinstance(signal.logits, Dense)
    return signal.logits.logits


def test_what_was_said_comes_back(tmp_path):
    batch = tokens(5, 3, 9)
    signal = said(batch)
    store(tmp_path, batch, signal)
    found = read(tmp_path, batch)
    assert torch.equal(logits(found), logits(signal))
    assert torch.equal(found.features["last"], signal.features["last"])
    assert torch.equal(found.features["mean"], signal.features["mean"].bfloat16().float())


def test_only_what_is_needed_is_read(tmp_path):
    batch = tokens(5, 3)
    signal = said(batch)
    store(tmp_path, batch, signal)
    found = read(tmp_path, batch, Need(features=frozenset({"mean"})))
    assert (found.logits, set(found.features)) == (None, {"mean"})
    assert torch.equal(found.features["mean"], signal.features["mean"].bfloat16().float())


def test_rows_come_in_the_order_of_the_batch(tmp_path):
    batch = tokens(5, 3, 9)
    signal = said(batch)
    store(tmp_path, batch, signal)
    by_row = logits(signal).split([3, 1, 7])
    assert torch.equal(logits(read(tmp_path, taken(batch, [2, 0]), LOGITS)), torch.cat([by_row[2], by_row[0]]))


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 2)])
def test_padding_does_not_change_what_is_found(tmp_path, left, right):
    batch = tokens(5, 3, 9)
    store(tmp_path, batch, said(batch))
    padded = tokens(5, 3, 9, left=left, right=right)
    assert torch.equal(logits(read(tmp_path, padded, LOGITS)), logits(said(batch)))


def test_a_row_without_a_counted_position_is_remembered(tmp_path):
    batch = tokens(5, 2)
    store(tmp_path, batch, said(batch))
    assert SignalReader(tmp_path).find(batch).min() >= 0
    assert torch.equal(logits(read(tmp_path, batch, LOGITS)), logits(said(batch)))


def test_equal_rows_are_stored_once(tmp_path):
    batch = taken(tokens(5, 3), [0, 1, 0])
    signal = said(batch)
    store(tmp_path, batch, signal)
    assert info(tmp_path).rows == 2
    first, second, _ = logits(signal).split([3, 1, 3])
    assert torch.equal(logits(read(tmp_path, batch, LOGITS)), torch.cat([first, second, first]))


@pytest.mark.parametrize("which", [[2, 3], [3, 4], [2, 4]], ids=str)
def test_rows_that_count_other_positions_are_refused(tmp_path, which):
    batch = tokens(5)
    store(tmp_path, batch, said(batch))
    mask = torch.zeros_like(batch.mask)
    mask[0, which] = True
    with pytest.raises(SignalError, match=r"row 0 \(r0\) counts 2 positions, the store remembers 3"):
        SignalReader(tmp_path).find(replace(batch, mask=mask))


def test_as_many_other_positions_are_refused_too(tmp_path):
    batch = tokens(5)
    store(tmp_path, batch, said(batch))
    with pytest.raises(SignalError, match="Mask the rows as when the store was built"):
        SignalReader(tmp_path).find(replace(batch, mask=batch.mask.roll(-1, dims=1)))


def test_another_vocabulary_is_refused(tmp_path):
    batch = tokens(5)
    store(tmp_path, batch, said(batch))
    with pytest.raises(SignalError, match=r"vocabulary 'words', the batch is written in 'letters'.*cross-tokenizer"):
        SignalReader(tmp_path).find(replace(batch, vocabulary="letters"))


def test_views_of_one_picture_are_rows_of_their_own(tmp_path):
    contents = replace(CONTENTS, vocabulary="", layers=())
    batch = pictures(0.1, 0.2, 0.3)
    store(tmp_path, batch, said(batch), contents)
    assert torch.equal(logits(read(tmp_path, pictures(0.3, 0.1), LOGITS)), logits(said(batch))[[2, 0]])
    assert SignalReader(tmp_path).find(pictures(0.2, 0.25)).tolist()[1] == -1


# What a store was made with.


CHANGES = {
    "teacher": replace(CONTENTS, teacher="u"),
    "vocabulary": replace(CONTENTS, vocabulary="letters"),
    "template": replace(CONTENTS, template="chatml"),
    "seed": replace(CONTENTS, seed=1),
    "logits": replace(CONTENTS, sketch=Top()),
    "dtype": replace(CONTENTS, sketch=Whole(dtype="float16")),
    "layers": replace(CONTENTS, layers=CONTENTS.layers[:1]),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_store_made_otherwise_is_refused_by_the_name_of_the_field(tmp_path, field):
    store(tmp_path, tokens(5), said(tokens(5)))
    with (
        pytest.raises(UserError, match=f"the store was made with {field} .*build another store"),
        writing_signals(tmp_path, CHANGES[field]),
    ):
        pass


@pytest.mark.parametrize(
    ("one", "other", "field"),
    [
        (Sampled(), Sampled(draws=12), "draws"),
        (Sampled(), Sampled(temperature=2.0), "temperature"),
        (Top(), Top(k=20), "k"),
    ],
)
def test_a_sketch_made_otherwise_is_refused_by_the_name_of_the_field(one, other, field):
    with pytest.raises(UserError, match=f"made with {field} "):
        replace(CONTENTS, sketch=one).check(replace(CONTENTS, sketch=other), place=Path("s"))


@pytest.mark.parametrize("field", CHANGES)
def test_no_row_of_a_store_made_otherwise_is_ever_hit(field):
    batch = tokens(5, 3)
    assert not set(SignalStore(CONTENTS).keys(batch)) & set(SignalStore(CHANGES[field]).keys(batch))


def test_what_only_the_teacher_tells_does_not_change_a_key():
    batch = tokens(5)
    assert SignalStore(CONTENTS.unsaid).keys(batch) == SignalStore(CONTENTS).keys(batch)


@pytest.mark.parametrize("contents", [*CHANGES.values(), replace(CONTENTS, sketch=None), CONTENTS.unsaid])
def test_contents_survive_the_manifest(contents):
    assert Contents.of(contents.fields()) == contents


def test_a_manifest_about_something_else_is_torn(tmp_path):
    store(tmp_path, tokens(5), said(tokens(5)))
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"whole"', '"hole"'))
    with pytest.raises(StorageError, match=r"manifest\.json is torn"):
        SignalReader(tmp_path)


def test_a_layer_that_changes_its_shape_is_refused(tmp_path):
    batch = tokens(5)
    signal = said(batch)
    wide = {**signal.features, "last": torch.zeros(3, 2, 4)}
    with pytest.raises(SignalError, match=r"'last' says \[2, 4\] per position, the store holds \[2, 3\]"):
        store(tmp_path, batch, replace(signal, features=wide))


def test_the_account_of_a_store_adds_up(tmp_path):
    batch = tokens(5, 3, 9)
    store(tmp_path, batch, said(batch))
    found = info(tmp_path)
    assert (found.rows, found.positions, found.shards, found.torn) == (3, 11, 1, ())
    # 5 logits and 6 values of 4 bytes, one value of 2.
    assert (tmp_path / "shard-00000.rows").stat().st_size == 11 * (20 + 24 + 2)
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert ("rows", "3") in found.lines() and ("teacher", "t") in found.lines()


def test_the_account_names_a_torn_shard_without_a_warning(tmp_path):
    store(tmp_path, tokens(5), said(tokens(5)))
    (tmp_path / "shard-00000.rows").write_bytes(b"")
    assert (info(tmp_path).torn, info(tmp_path).rows) == (("shard-00000",), 0)


# Back into the batch.


def test_signals_are_spread_to_the_counted_positions():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    values = torch.arange(1.0, 7.0).reshape(3, 2)
    found = spread(Signal(logits=Dense(logits=values), features={"x": values[:, 0]}), mask)
    assert torch.equal(logits(found)[mask], values)
    assert logits(found)[~mask].eq(0).all()
    assert found.features["x"].tolist() == [[0, 1, 3], [5, 0, 0]]


def test_sparse_padding_has_no_weight():
    mask = torch.tensor([[False, True]])
    sparse = Sparse(ids=torch.tensor([[3, 1]]), log_probs=torch.tensor([[-0.1, -3.0]]), size=5)
    found = spread(Signal(logits=sparse), mask).logits
    assert isinstance(found, Sparse)
    assert found.ids[mask].tolist() == [[3, 1]]
    assert found.log_probs[0, 0].exp().tolist() == [0, 0]
