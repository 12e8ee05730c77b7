"""`potstill cache`: a recipe's teacher on disk, and runs that need it no more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from potstill.cli import app, cache
from potstill.core.errors import RecipeError, SignalError, UserError
from potstill.core.run import read_json
from potstill.recipe import Progress, Recipe, build, build_cache, plan, run, verify_cache
from potstill.recipe.building import load_student, read_data
from potstill.recipe.stored import needed
from potstill.recipe.text import Tree, override
from potstill.stores import Hidden, Sampled, Top, Whole, contents_of
from tests import tiny
from tests.teachers.tongues import trained

SENTENCES = [f"the cat saw {number} other cats in {2000 + number}" for number in range(14)]
AUGMENTED = 'data.augment=["shift"]'


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("images") / "tiny.npz")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two language models of one tokenizer, one with another, and something to read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("texts")
    tokenizer = trained(splits_digits=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    for seed, name in enumerate(("teacher", "another")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "teacher", folder / "stranger")
    trained(splits_digits=True).save_pretrained(folder / "stranger")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in SENTENCES))
    return folder


def written(texts: Path, *changes: str) -> Recipe:
    """A small recipe that learns to write as the teacher does."""
    content: dict[str, Tree] = {
        "name": "words",
        "data": {"use": "chat", "path": str(texts / "rows.jsonl"), "batch": 4, "length": 48, "test_share": 0.2},
        "teacher": {"use": "hf", "model": str(texts / "teacher")},
        "student": {"use": "hf_fresh", "model": str(texts / "teacher"), "hidden": 8},
        "objective": [{"use": "forward_kl", "temperature": 2.0}, {"use": "cross_entropy"}],
        "fit": {"steps": 4, "lr": 0.01, "optimizer": "adamw"},
        "baseline": None,
    }
    return build(override(content, changes))


def from_store(folder: Path) -> str:
    return f"teacher={{use: remembered, path: {folder}}}"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_student(folder / "distilled-seed0" / "student").state_dict()


def potstill(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stdout, done.stderr


# Pictures.


def test_a_run_from_the_cache_equals_the_live_run_bit_for_bit(images: Path, tmp_path: Path) -> None:
    live = run(tiny.recipe(images, AUGMENTED), tmp_path / "live").path
    build_cache(tiny.recipe(images, AUGMENTED), tmp_path / "cache")
    assert contents_of(tmp_path / "cache").sketch == Whole(dtype="float32")
    cached = run(tiny.recipe(images, AUGMENTED, from_store(tmp_path / "cache")), tmp_path / "cached").path
    one, other = weights(live), weights(cached)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_views_of_another_seed_are_refused_before_anything_is_trained(images: Path, tmp_path: Path) -> None:
    build_cache(tiny.recipe(images, AUGMENTED), tmp_path / "cache")
    other = tiny.recipe(images, AUGMENTED, "seeds=[1]", from_store(tmp_path / "cache"))
    with pytest.raises(UserError, match="made with seed '0', but '1' is asked for"):
        plan(other)


def test_a_cache_of_plain_pictures_is_not_taken_for_views_of_them(images: Path, tmp_path: Path) -> None:
    build_cache(tiny.recipe(images), tmp_path / "cache")
    with pytest.raises(UserError, match="made with seed none, but '0' is asked for"):
        plan(tiny.recipe(images, AUGMENTED, from_store(tmp_path / "cache")))


def test_a_store_holds_the_views_of_one_seed(images: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"found \[0, 1\], but the data are augmented"):
        build_cache(tiny.recipe(images, AUGMENTED, "seeds=[0, 1]"), tmp_path)


def test_one_cache_serves_all_seeds_of_plain_pictures(images: Path, tmp_path: Path) -> None:
    both = "seeds=[0, 1]"
    build_cache(tiny.recipe(images, both, "fit.steps=1"), tmp_path / "cache")
    done = run(tiny.recipe(images, both, from_store(tmp_path / "cache")), tmp_path / "run")
    assert len(read_json(done.summary)["arms"]["distilled"]) == 2


def test_a_teacher_trained_for_the_cache_is_not_mixed_with_another(images: Path, tmp_path: Path) -> None:
    build_cache(tiny.recipe(images), tmp_path)
    with pytest.raises(RecipeError, match=r"teacher with teacher\.fit\.steps 6 says, this one has 7"):
        build_cache(tiny.recipe(images, "teacher.fit.steps=7"), tmp_path)


# Texts.


def test_a_run_from_the_cache_needs_no_teacher_and_measures_no_agreement(texts: Path, tmp_path: Path) -> None:
    home = tmp_path / "texts"
    shutil.copytree(texts, home)
    build_cache(written(home, f"student.model={texts}/teacher", f"data.tokenizer={texts}/teacher"), tmp_path / "cache")
    shutil.rmtree(home / "teacher")
    recipe = written(texts, from_store(tmp_path / "cache"))
    done = run(recipe, tmp_path / "run")
    scores = read_json(done.arm("distilled-seed0").scores)
    assert scores["agreement"] is None and scores["kl_to_teacher"] is None and scores["perplexity"] > 1


def test_test_rows_of_which_some_are_remembered_are_not_measured(texts: Path, tmp_path: Path) -> None:
    from potstill.evaluate import evaluate
    from potstill.teachers import remembered

    recipe = written(texts, "objective=[{use: reverse_kl}]")
    build_cache(recipe, tmp_path)
    data = read_data(recipe.data, seed=0)
    batches = [*data.train.batches(4), *data.test.batches(4)]
    scores = evaluate(recipe.student(), batches, teacher=remembered(tmp_path))
    assert scores.agreement is None and scores.kl_to_teacher is None and scores.num_items > 0


@pytest.mark.parametrize(
    ("objective", "sketch"),
    [
        ("[{use: forward_kl, temperature: 2.0}]", Sampled(temperature=2.0)),
        ("[{use: forward_kl}, {use: forward_kl, temperature: 2.0}]", Top()),
        ("[{use: reverse_kl}]", Top()),
        ("[{use: logit_mse}]", Hidden()),
        ("[{use: cross_entropy}, {use: hidden_mse, at: {hidden/1: hidden/1}}]", None),
    ],
)
def test_logits_are_kept_as_the_objective_allows_and_a_run_learns_from_them(
    texts: Path, tmp_path: Path, objective: str, sketch: object
) -> None:
    changes = f"objective={objective}", "student.hidden=16"
    build_cache(written(texts, *changes), tmp_path)
    assert contents_of(tmp_path).sketch == sketch
    told = dict(plan(written(texts, *changes, from_store(tmp_path))).parts)
    assert ("remembered rows found", "12") in told["teacher"]


def test_a_sketch_is_named_with_its_knobs(texts: Path, tmp_path: Path) -> None:
    build_cache(written(texts), tmp_path / "one", sketch="top k=7")
    build_cache(written(texts), tmp_path / "other", sketch="sampled draws=9")
    assert contents_of(tmp_path / "one").sketch == Top(k=7)
    assert contents_of(tmp_path / "other").sketch == Sampled(draws=9, temperature=2.0)


def test_packed_rows_of_every_seed_are_remembered(texts: Path, tmp_path: Path) -> None:
    packed = "data.layout=packed", "seeds=[0, 1]", "fit.steps=9"
    build_cache(written(texts, *packed), tmp_path)
    assert len(needed(written(texts, *packed)).parts) == 2
    plan(written(texts, *packed, from_store(tmp_path)))


def test_an_interrupted_build_goes_on_where_it_stopped(texts: Path, tmp_path: Path) -> None:
    def unplug(progress: Progress) -> None:
        if progress.batches == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(written(texts), tmp_path / "parts", tell=unplug)
    seen: list[Progress] = []
    build_cache(written(texts), tmp_path / "parts", tell=seen.append)
    assert [progress.asked for progress in seen] == [0, 0, 1]
    assert seen[-1].rows == 4
    plan(written(texts, from_store(tmp_path / "parts")))


def test_the_time_left_follows_from_what_was_asked() -> None:
    progress = Progress(batches=5, of_batches=11, asked=2, rows=16, seconds=4.0)
    assert (progress.rows_per_second, progress.seconds_left) == (4.0, 12.0)
    assert str(progress) == "5 of 11 batches, 4.0 rows/s, 0:12 left"
    assert str(replace(progress, asked=0, seconds=0.0)) == "5 of 11 batches, 0.0 rows/s"


def test_a_teacher_that_answers_at_positions_of_its_own_is_refused(texts: Path, tmp_path: Path) -> None:
    aligned = f"{{use: beside, teacher: {{use: hf, model: {texts}/stranger}}}}"
    recipe = written(texts, f"teacher={aligned}", "objective=[{use: reverse_kl}]")
    with pytest.raises(SignalError, match="answers at positions of its own"):
        build_cache(recipe, tmp_path)


def test_what_an_aligned_teacher_says_is_remembered_in_the_students_tokens(texts: Path, tmp_path: Path) -> None:
    aligned = f"{{use: aligned, teacher: {{use: hf, model: {texts}/stranger}}}}"
    objective = "objective=[{use: alm}, {use: gold}, {use: uld}, {use: mined}]"
    build_cache(written(texts, f"teacher={aligned}", objective), tmp_path, dtype="float32")
    told = [
        [row for row in dict(plan(written(texts, objective, teacher)).parts)["distilled"] if row[0].startswith("loss")]
        for teacher in (f"teacher={aligned}", from_store(tmp_path))
    ]
    assert told[0] == told[1] and len(told[0]) == 5


def test_the_same_teacher_verifies(texts: Path, tmp_path: Path) -> None:
    build_cache(written(texts), tmp_path)
    found = verify_cache(tmp_path, written(texts), sample=6)
    assert found.rows >= 6 and (found.missing, found.divergence, found.torn) == (0, 0.0, ())


# What is refused.


def refused(action: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        action()


@pytest.mark.parametrize(
    ("sketch", "objective", "sentence"),
    [
        ("sampled", "[{use: reverse_kl}]", "reverse_kl is not linear in the teacher.*Take: top, or hidden"),
        ("sampled temperature=1", "[{use: forward_kl, temperature: 2.0}]", "compares at temperature 2, and draws at 1"),
        ("top", "[{use: sinkhorn}]", "reads all of the teacher's logits.*Take: whole, or hidden"),
        ("top", "[{use: logit_mse}]", "reads all of the teacher's logits.*Take: whole, or hidden"),
        ("sampld", "[{use: forward_kl}]", "no sketch is called 'sampld'. Did you mean 'sampled'"),
        ("top kk=5", "[{use: forward_kl}]", "has no knob called 'kk'. Did you mean 'k'"),
        ("top k=0", "[{use: forward_kl}]", "found 0, expected at least 1"),
        ("top k=many", "[{use: forward_kl}]", "--sketch top.k: found the text 'many', expected a whole number"),
        ("top", "[{use: cross_entropy}]", "no term of this recipe reads logits"),
    ],
)
def test_a_sketch_that_cannot_serve_is_refused(
    texts: Path, tmp_path: Path, sketch: str, objective: str, sentence: str
) -> None:
    recipe = written(texts, f"objective={objective}")
    refused(lambda: build_cache(recipe, tmp_path, sketch=sketch), RecipeError, sentence)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("teacher=null", "has none, so there is nothing to remember"),
        ("teacher={use: remembered, path: x}", "in a store already"),
    ],
)
def test_a_teacher_that_cannot_be_remembered_is_refused(
    texts: Path, tmp_path: Path, change: str, sentence: str
) -> None:
    objective = "objective=[{use: cross_entropy}]"
    refused(lambda: build_cache(written(texts, objective, change), tmp_path), RecipeError, sentence)


def test_an_unknown_precision_is_refused(texts: Path, tmp_path: Path) -> None:
    refused(
        lambda: build_cache(written(texts), tmp_path, dtype="float8"), RecipeError, "--dtype: found the text 'float8'"
    )


def test_a_cache_of_another_teacher_is_neither_continued_nor_verified(texts: Path, tmp_path: Path) -> None:
    build_cache(written(texts), tmp_path)
    other = written(texts, f"teacher.model={texts}/another")
    sentence = "the store was made with teacher 'hf:.*Ask for what is there, or build another store"
    refused(lambda: build_cache(other, tmp_path), UserError, sentence)
    refused(lambda: verify_cache(tmp_path, other), UserError, sentence)


def test_a_cache_of_another_tokenizer_is_refused(texts: Path, tmp_path: Path) -> None:
    build_cache(written(texts), tmp_path)
    other = written(texts, f"student.model={texts}/stranger", from_store(tmp_path))
    refused(lambda: plan(other), UserError, "the store was made with vocabulary")


def test_a_cache_of_another_template_is_refused(texts: Path, tmp_path: Path) -> None:
    build_cache(written(texts), tmp_path / "cache")
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    other = written(texts, f"data.template={template}", from_store(tmp_path / "cache"))
    refused(lambda: plan(other), UserError, "the store was made with template 'none', but")


def test_a_cache_of_another_temperature_is_refused(texts: Path, tmp_path: Path) -> None:
    build_cache(written(texts), tmp_path)
    other = written(texts, "objective.0.temperature=3.0", from_store(tmp_path))
    refused(lambda: plan(other), SignalError, "compares at temperature 3, but the teacher's classes were drawn at 2")


def test_a_cache_that_lacks_rows_is_refused_before_anything_is_trained(texts: Path, tmp_path: Path) -> None:
    build_cache(written(texts), tmp_path, batches=1)
    sentence = r"does not remember \d of the 4 rows.*Run potstill cache build"
    refused(lambda: plan(written(texts, from_store(tmp_path))), SignalError, sentence)


@pytest.mark.filterwarnings("ignore:.*is torn")
def test_a_torn_shard_is_named_and_filled_in_by_building_again(texts: Path, tmp_path: Path) -> None:
    build_cache(written(texts), tmp_path)
    (tmp_path / "shard-00000.rows").write_bytes(b"")
    refused(lambda: plan(written(texts, from_store(tmp_path))), SignalError, "Torn: shard-00000")
    build_cache(written(texts), tmp_path)
    plan(written(texts, from_store(tmp_path)))


# The command line.


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_recipe(tmp_path_factory.mktemp("recipe"))


def test_the_commands_build_tell_and_verify(file: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    code, said, errors = potstill("cache", "build", str(file), "--out", folder)
    assert (code, errors) == (0, "") and f"teacher={{use: remembered, path: {folder}}}" in said
    code, said, _ = potstill("cache", "info", folder)
    assert code == 0 and "rows\t48" in said and "torn\tnone" in said
    code, said, _ = potstill("cache", "verify", folder, str(file), "--sample", "5")
    assert code == 0 and "total variation, worst\t0" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("info", "nowhere"), "nowhere: there is no store here"),
        (("verify", "nowhere", "FILE"), "nowhere: there is no store of signals here"),
        (("build", "FILE", "--out", "x", "--sketch", "all"), "no sketch is called 'all'"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_two(file: Path, words: tuple[str, ...], sentence: str) -> None:
    code, _, errors = potstill("cache", *(str(file) if word == "FILE" else word for word in words))
    assert code == 2 and sentence in errors and errors.count("\n") == 1


def test_every_command_has_a_line_of_help() -> None:
    words = ["build", "verify", "info", "export", "import", "forget-refusals"]
    assert [command.name for command in cache.registered_commands] == words
    assert all(command.callback is not None and command.callback.__doc__ for command in cache.registered_commands)


def test_a_full_disk_is_called_so_and_the_build_goes_on_when_there_is_room(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource
    import signal

    folder = str(tmp_path / "cache")
    assert potstill("cache", "build", str(file), "--out", folder, "--batches", "1")[0] == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        code, _, errors = potstill("cache", "build", str(file), "--out", folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert code == 1 and ("disk is full" in errors or "Cannot save" in errors)
    code, said, _ = potstill("cache", "build", str(file), "--out", folder)
    assert code == 0 and "rows\t48" in said
