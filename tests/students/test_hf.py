"""Laws of language models as students: they say what transformers says, with the head not yet applied."""

from __future__ import annotations

import copy
import gc
import gzip
import json
import shutil
import weakref

import pytest
import torch
from torch import nn
from transformers.utils import logging

from potstill.core.errors import DataError, RecipeError, SignalError, StorageError
from potstill.core.types import Batch, Dense, Lesson, Need, Signal
from potstill.losses.divergence import forward_kl
from potstill.losses.response import cross_entropy
from potstill.objective import Objective, term
from potstill.objective.representations import dense
from potstill.students import HfModel, hf, hf_fresh
from potstill.students.hf import checkpointing, positions_within
from potstill.students.manners import observe
from potstill.students.pretrained import WORTH_A_BAR, progress_for
from tests.data.places import shared
from tests.students.lm import CAUSAL, MASKED, V, from_ids, stories_folder, tiny, tokens

LOGITS = Need(logits=True)
ROWS = ([5, 6, 7, 8, 9, 10], [11, 12, 13])
PACKABLE = sorted(CAUSAL.keys() - {"opt", "bloom"})


def asks(*features: str, logits: bool = False) -> Need:
    return Need(logits=logits, features=frozenset(features))


def logits_of(student: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return dense(student.eval()(batch, LOGITS).logits)


def own_logits(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        given = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        return model.eval()(**given).logits


def real(batch: Batch) -> torch.Tensor:
    return batch.inputs["attention_mask"].bool()


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def stories() -> HfModel:
    return hf(str(stories_folder())).eval()


# The signal


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
def test_the_projection_gives_the_logits_of_the_model(family):
    model, batch = tiny(family), tokens(*ROWS)
    said = logits_of(HfModel(model), batch)
    torch.testing.assert_close(said[real(batch)], own_logits(model, batch)[real(batch)])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_an_encoder_sees_to_both_sides(family):
    student = HfModel(tiny(family))
    one, other = logits_of(student, tokens([5, 6, 7, 8])), logits_of(student, tokens([5, 6, 7, 9]))
    assert not torch.allclose(one[0, 0], other[0, 0])


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [("llama", 1.0, 0.0), ("gemma2", 1.0, 0.5), ("gemma3", 1.0, 0.5), ("cohere", 0.0625, 0.0), ("granite", 1 / 6, 0.0)],
)
def test_scale_and_soft_cap_are_measured(family, scale, softcap):
    manners = observe(tiny(family), title="")
    assert (manners.scale, manners.softcap) == (pytest.approx(scale, rel=1e-6), pytest.approx(softcap, rel=1e-6))


def test_a_soft_cap_of_thirty_is_found_where_no_logit_comes_near_it():
    assert observe(tiny("gemma2", final_logit_softcapping=30.0), title="").softcap == 30.0


def test_scale_is_measured_exactly_in_half_precision():
    assert observe(tiny("granite").bfloat16(), title="").scale == pytest.approx(1 / 6, rel=1e-6)


def test_a_model_that_does_something_else_to_its_logits_is_refused():
    model = tiny("llama")
    plain = model.forward

    def forward(input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **more):
        output = plain(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)
        output.logits = output.logits.clamp(max=5.0)
        return output

    model.forward = forward
    with pytest.raises(SignalError, match="1 becomes 1, 10 becomes 5, -100 becomes -100"):
        HfModel(model)


def test_a_head_that_is_not_linear_is_refused():
    model = tiny("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    model.lm_head.weight = model.lm_head[0].weight
    with pytest.raises(SignalError, match="Sequential, expected a linear map"):
        HfModel(model)


def test_the_head_is_given_no_rows():
    student, seen = HfModel(tiny("llama")), []
    student.model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.numel()))
    student(tokens(*ROWS), LOGITS)
    assert seen == [0]


def test_the_model_still_writes_text_by_itself():
    model, batch = tiny("llama"), tokens(*ROWS)
    before = own_logits(model, batch)
    HfModel(model)(batch, LOGITS)
    assert torch.equal(own_logits(model, batch), before)


def test_an_empty_need_runs_nothing():
    student, seen = HfModel(tiny("llama")), []
    student.model.register_forward_hook(lambda *_: seen.append(1))
    assert student(tokens(*ROWS), Need()) == Signal()
    assert seen == []


def test_left_padding_changes_nothing():
    student, row = HfModel(tiny("gpt2")), torch.tensor([[5, 6, 7]])
    alone = logits_of(student, from_ids(row, torch.ones_like(row)))
    padded = from_ids(torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]]))
    torch.testing.assert_close(logits_of(student, padded)[:, 2:], alone)


def test_wrapping_and_asking_take_nothing_from_the_random_stream():
    model = tiny("gpt2")
    before = torch.get_rng_state()
    HfModel(model).eval()(tokens(*ROWS), LOGITS)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_hook_and_no_tensor_stays_behind():
    student, need = HfModel(tiny("llama")), asks("hidden/1", "model.layers.0.mlp", logits=True)
    # transformers puts hooks of its own in place at the first call.
    student(tokens(*ROWS), need)
    before = num_hooks(student)
    signal = student(tokens(*ROWS), need)
    kept = weakref.ref(signal.logits.hidden)
    del signal
    gc.collect()
    assert kept() is None
    assert num_hooks(student) == before


def test_a_copy_answers_like_the_original():
    student = HfModel(tiny("gemma2"))
    assert torch.equal(logits_of(copy.deepcopy(student), tokens(*ROWS)), logits_of(student, tokens(*ROWS)))


# Packed rows


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_texts_do_not_see_each_other(family):
    # Long enough for the sliding windows of four to slide.
    student, texts = HfModel(tiny(family)), ([5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17])
    segments = torch.tensor([[1] * 7 + [2] * 6 + [0, 0]])
    packed = from_ids(torch.tensor([[*texts[0], *texts[1], 0, 0]]), (segments > 0).long(), segments=segments)
    together = logits_of(student, packed)
    for start, text in ((0, texts[0]), (7, texts[1])):
        torch.testing.assert_close(together[:, start : start + len(text)], logits_of(student, tokens(text)))


@pytest.mark.parametrize("family", ["opt", "bloom", "bert"])
def test_models_that_cannot_keep_texts_apart_refuse_packed_rows(family):
    segments = torch.tensor([[1, 1, 1, 2, 2, 2]])
    packed = from_ids(torch.arange(5, 11)[None], torch.ones_like(segments), segments=segments)
    with pytest.raises(SignalError, match="cannot keep the texts of a packed row apart"):
        HfModel(tiny(family))(packed, LOGITS)


def test_positions_start_again_with_each_text():
    segments = torch.tensor([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2]])
    assert positions_within(segments).tolist() == [[0, 1, 2, 0, 0, 1, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5]]


# Features


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_hidden_states_are_those_of_transformers(family):
    model, batch = tiny(family), tokens(*ROWS)
    with torch.no_grad():
        expected = model(**batch.inputs, output_hidden_states=True).hidden_states
        features = HfModel(model).eval()(batch, asks("hidden/0", "hidden/1", "hidden/2")).features
    for index, tensor in enumerate(expected):
        torch.testing.assert_close(features[f"hidden/{index}"][real(batch)], tensor[real(batch)])


def test_the_last_hidden_state_is_what_the_head_is_given():
    signal = HfModel(tiny("llama"))(tokens(*ROWS), asks("hidden/2", logits=True))
    assert torch.equal(signal.features["hidden/2"], signal.logits.hidden)


def test_a_block_by_its_dotted_name_is_taken_before_the_final_norm():
    student = HfModel(tiny("llama"))
    features = student(tokens(*ROWS), asks("hidden/2", "model.layers.1")).features
    torch.testing.assert_close(student.model.model.norm(features["model.layers.1"]), features["hidden/2"])


def test_attention_probabilities_are_those_of_the_block():
    model, batch = tiny("llama", attention="eager"), tokens(ROWS[0], ROWS[0])
    with torch.no_grad():
        expected = model(**batch.inputs, output_attentions=True).attentions[1]
    found = HfModel(model).eval()(batch, asks("attention/2")).features["attention/2"]
    assert found.shape == (2, 2, 6, 6)
    torch.testing.assert_close(found, expected)


def test_attention_needs_the_eager_kernel():
    with pytest.raises(SignalError, match=r"'attention/1' is not computed by the attention kernel 'sdpa'.*eager"):
        HfModel(tiny("llama", attention="sdpa"))(tokens(*ROWS), asks("attention/1"))


@pytest.mark.parametrize("name", ["hidden/3", "attention/0", "attention/3", "hiden/1", "hidden/last", "hidden/-1"])
def test_a_feature_that_does_not_exist_is_named_with_those_that_do(name):
    with pytest.raises(SignalError, match=f"'{name}'.*hidden/0 to hidden/2, attention/1 to attention/2"):
        HfModel(tiny("llama", attention="eager"))(tokens(*ROWS), asks(name))


@pytest.mark.parametrize(("family", "name"), [("llama", "lm_head"), ("bert", "cls"), ("bert", "cls.predictions#1")])
def test_the_head_cannot_be_asked_for_as_a_layer(family, name):
    with pytest.raises(SignalError, match="is the head, which is not applied here"):
        HfModel(tiny(family))(tokens(*ROWS), asks(name))


def test_an_encoder_without_a_head_gives_hidden_states_and_no_logits():
    student = HfModel(tiny("encoder"))
    assert student(tokens(*ROWS), asks("hidden/2")).features["hidden/2"].shape == (2, 6, 16)
    with pytest.raises(SignalError, match="has no head"):
        student(tokens(*ROWS), LOGITS)


# Through the engine


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "cohere", "granite", "phi", "tied", "bert"])
def test_fused_and_dense_losses_have_the_same_value_and_gradient(family):
    objective = Objective(term(forward_kl, 0.7), term(cross_entropy, 0.3), chunk_bytes=1)
    batch = tokens(*ROWS)
    taught = Signal(logits=HfModel(tiny(family, seed=1).double()).eval()(batch, LOGITS).logits).detach()
    losses, gradients = [], []
    for fused in (True, False):
        student = HfModel(tiny(family).double()).eval()
        given = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        said = student(batch, LOGITS) if fused else Signal(logits=Dense(logits=student.model(**given).logits))
        loss = objective(Lesson(student=said, teacher=taught), batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


def test_near_convergence_the_gradient_of_a_half_precision_head_is_right():
    torch.manual_seed(0)
    student = HfModel(tiny("llama", vocab_size=2000).bfloat16()).eval()
    batch = tokens(list(range(5, 45)))
    said = student(batch, LOGITS)
    weight, hidden = said.logits.weight.detach().double().requires_grad_(), said.logits.hidden.detach().double()
    exact = hidden @ weight.T
    taught = Signal(logits=Dense(logits=exact.detach() + 0.03 * torch.randn_like(exact)))
    objective = Objective(term(forward_kl))
    objective(Lesson(student=said, teacher=taught), batch).backward()
    objective(Lesson(student=Signal(logits=Dense(logits=exact)), teacher=taught), batch).backward()
    rounded = (hidden.bfloat16() @ weight.detach().bfloat16().T).double().requires_grad_()
    objective(Lesson(student=Signal(logits=Dense(logits=rounded)), teacher=taught), batch).backward()
    naive = rounded.grad.flatten(0, 1).T @ hidden.flatten(0, 1)

    def wrong(gradient: torch.Tensor) -> float:
        return float((gradient.double() - weight.grad).norm() / weight.grad.norm())

    assert wrong(student.model.lm_head.weight.grad) < 0.01
    assert wrong(naive) > 0.05


def test_gradient_checkpointing_changes_no_gradient():
    batch, gradients = tokens(*ROWS), []
    for prepare in (lambda student: student, checkpointing):
        student = prepare(HfModel(tiny("llama"))).train()
        signal = student(batch, asks("hidden/1", "model.layers.0.mlp", logits=True))
        (signal.logits.hidden.sum() + sum(tensor.pow(2).sum() for tensor in signal.features.values())).backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_frozen_head_gets_no_gradient():
    student, batch = HfModel(tiny("llama")), tokens(*ROWS)
    student.model.lm_head.requires_grad_(False)
    Objective(term(cross_entropy))(Lesson(student=student(batch, LOGITS), teacher=Signal()), batch).backward()
    assert student.model.lm_head.weight.grad is None
    assert student.model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


# Vocabulary


def test_padded_rows_of_the_head_are_cut_off():
    student = HfModel(tiny("phi"), vocabulary=V - 7)
    signal = student.eval()(tokens(*ROWS), LOGITS)
    assert signal.logits.weight.shape[0] == signal.logits.bias.shape[0] == V - 7
    whole = own_logits(student.model, tokens(*ROWS))
    torch.testing.assert_close(dense(signal.logits)[0], whole[0, :, : V - 7])


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(DataError, match="vocabulary asks for 41 tokens, but the model has 40"):
        HfModel(tiny("llama"), vocabulary=V + 1)


def test_a_family_member_with_more_padding_has_the_same_width(stories):
    model = copy.deepcopy(stories.model)
    model.resize_token_embeddings(528)
    padded = HfModel(model, tokenizer=stories.tokenizer).eval()
    assert padded.vocabulary == stories.vocabulary == 512
    torch.testing.assert_close(logits_of(padded, tokens(*ROWS)), logits_of(stories, tokens(*ROWS)))


def test_a_batch_of_another_tokenizer_is_refused(stories):
    with pytest.raises(SignalError, match=r"another tokenizer.*teachers\.aligned"):
        stories(tokens(*ROWS, vocabulary="another"), LOGITS)


def test_a_batch_of_the_same_tokenizer_is_read(stories):
    stories(tokens(*ROWS, vocabulary=stories.fingerprint), LOGITS)


def test_a_text_longer_than_the_model_reads_is_refused(stories):
    with pytest.raises(DataError, match="a text has 513 tokens, the model reads at most 512"):
        stories(tokens([5] * 513), LOGITS)


def test_a_packed_row_may_be_longer_than_the_model_reads():
    student, half = HfModel(tiny("llama")), 40
    segments = torch.tensor([[1] * half + [2] * half])
    packed = from_ids(torch.full((1, 2 * half), 5), torch.ones_like(segments), segments=segments)
    assert student(packed, LOGITS).logits.hidden.shape == (1, 2 * half, 16)
    with pytest.raises(DataError, match="a text has 80 tokens"):
        student(from_ids(torch.full((1, 80), 5), segments * 0 + 1, segments=segments * 0 + 1), LOGITS)


def test_roberta_reads_two_tokens_fewer_than_it_has_positions():
    with pytest.raises(DataError, match="a text has 63 tokens, the model reads at most 62"):
        HfModel(tiny("roberta"))(tokens([5] * 63), LOGITS)


def test_a_batch_of_images_is_refused():
    batch = Batch(keys=(), inputs={"image": torch.ones(1)}, labels=torch.ones(1), mask=torch.ones(1))
    with pytest.raises(SignalError, match="reads the input 'input_ids'; the batch has: image"):
        HfModel(tiny("llama"))(batch, LOGITS)


# The trained model


def test_the_stories_model_says_what_its_reference_says(stories):
    reference = json.loads((stories_folder() / "reference.json").read_text())
    logits = logits_of(stories, tokens(reference["prompt_ids"]))[0, -1]
    assert logits.argmax() == reference["last_logits_argmax"]
    torch.testing.assert_close(logits[:8], torch.tensor(reference["last_logits_first8"]), rtol=0, atol=1e-4)


def test_the_stories_model_has_its_published_perplexity(stories):
    reference = json.loads((stories_folder() / "reference.json").read_text())["eval_test_split"]
    with gzip.open(shared("tinystories-1k") / "stories.jsonl.gz", "rt") as file:
        rows = [row["text"] for row in map(json.loads, file) if row["split"] == "test"]
    batches = [
        tokens(*(stories.tokenizer(text).input_ids[:512] for text in rows[i : i + 25])) for i in range(0, 100, 25)
    ]
    objective = Objective(term(cross_entropy))
    counts = objective.counts(batches)
    with torch.no_grad():
        nll = sum(objective(Lesson(student=stories(b, LOGITS), teacher=Signal()), b, counts) for b in batches)
    assert int(counts.divisors) == reference["tokens"]
    assert float(nll) == pytest.approx(reference["nll_per_token"], abs=1e-4)


# Fresh students


def test_a_fresh_student_has_the_sizes_asked_for_and_keeps_proportions():
    student = hf_fresh(str(stories_folder()), layers=2, hidden=32, heads=4)
    config = student.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 32, 4)
    assert (config.num_key_value_heads, config.intermediate_size, config.head_dim) == (2, 86, 8)
    assert student.vocabulary == 512


def test_a_fresh_student_is_decided_by_the_seed():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(hf_fresh(str(stories_folder()), layers=1).model.lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_fresh_student_keeps_the_pattern_of_its_layers(tmp_path):
    tiny("gemma2").save_pretrained(tmp_path)
    kinds = hf_fresh(str(tmp_path), layers=3).model.config.layer_types
    assert kinds == ["sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(("sizes", "where"), [({"hidden": 30}, "hidden: 30"), ({"kv_heads": 3}, "heads: 8")])
def test_sizes_that_do_not_divide_are_refused(sizes, where):
    with pytest.raises(RecipeError, match=f"{where} is not a multiple of"):
        hf_fresh(str(stories_folder()), **sizes)


# Folders


@pytest.mark.parametrize("family", ["tied", "gemma2", "phi", "bert"])
def test_an_exported_folder_loads_with_equal_logits(family, tmp_path):
    import transformers

    student, batch = HfModel(tiny(family)), tokens(*ROWS)
    student.export(tmp_path / "out")
    reader = transformers.AutoModelForMaskedLM if family in MASKED else transformers.AutoModelForCausalLM
    assert torch.equal(own_logits(reader.from_pretrained(tmp_path / "out"), batch), own_logits(student.model, batch))


def test_an_export_has_the_tokenizer_beside_it(stories, tmp_path):
    stories.export(tmp_path / "out")
    assert hf(str(tmp_path / "out")).fingerprint == stories.fingerprint


def test_an_export_replaces_an_older_one(tmp_path):
    for seed in (0, 1):
        HfModel(tiny("llama", seed=seed)).export(tmp_path / "out")
    again = hf(str(tmp_path / "out"))
    assert torch.equal(again.model.lm_head.weight, tiny("llama", seed=1).lm_head.weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_type_of_the_weights_can_be_chosen(dtype):
    student = hf(str(stories_folder()), dtype=dtype)
    assert {parameter.dtype for parameter in student.parameters()} == {getattr(torch, dtype)}


def test_loading_takes_nothing_from_the_random_stream():
    before = torch.get_rng_state()
    hf(str(stories_folder()))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_small_model_is_loaded_and_written_without_a_progress_bar(tmp_path, capsys):
    hf(str(stories_folder())).export(tmp_path / "out")
    assert capsys.readouterr() == ("", "")


def test_a_large_model_keeps_its_progress_bars():
    enabled = []
    with progress_for(WORTH_A_BAR):
        enabled.append(logging.is_progress_bar_enabled())
    with progress_for(WORTH_A_BAR - 1):
        enabled.append(logging.is_progress_bar_enabled())
    assert [*enabled, logging.is_progress_bar_enabled()] == [True, False, True]


def test_an_encoder_folder_loads_without_its_head(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    assert hf(str(tmp_path), task="features").vocabulary == 0
    assert hf(str(tmp_path), task="masked").vocabulary == V


def folder_with(path, **changes):
    """A good folder with some entries of config.json changed."""
    tiny("llama").save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return str(path)


def test_a_missing_folder_is_named():
    with pytest.raises(DataError, match=r"^/nowhere/at/all: there is no such folder"):
        hf("/nowhere/at/all")


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no config\.json"):
        hf(str(tmp_path))


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path):
    folder = folder_with(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"found pytorch_model\.bin, expected \*\.safetensors"):
        hf(folder)


def test_a_model_with_code_of_its_own_is_refused(tmp_path):
    folder = folder_with(tmp_path, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (tmp_path / "mine.py").write_text("raise AssertionError('foreign code ran')")
    with pytest.raises(DataError, match=r"code of its own .*never runs"):
        hf(folder)


def test_an_unknown_architecture_is_refused(tmp_path):
    with pytest.raises(DataError, match="knows no model_type 'lama'"):
        hf(folder_with(tmp_path, model_type="lama"))


def test_a_torn_configuration_is_named(tmp_path):
    folder_with(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(StorageError, match=r"config\.json is torn"):
        hf(str(tmp_path))


def test_torn_weights_are_named(tmp_path):
    folder = folder_with(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(DataError, match="cannot be loaded"):
        hf(folder)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    with pytest.raises(DataError, match=r"the weights lack 'model\.layers\.2.* and 8 more"):
        hf(folder_with(tmp_path, num_hidden_layers=3))


def test_weights_of_other_shapes_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be loaded"):
        hf(folder_with(tmp_path, intermediate_size=32))


def test_a_task_that_the_architecture_has_not_is_refused(tmp_path):
    with pytest.raises(DataError, match="'llama' has no form for the task 'masked'"):
        hf(folder_with(tmp_path), task="masked")


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/nothing: there is no such folder, and the hub did not give it"):
        hf("nobody/nothing")


def test_a_broken_tokenizer_is_named(tmp_path):
    folder = folder_with(tmp_path)
    shutil.copy(stories_folder() / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(DataError, match="the tokenizer cannot be read"):
        hf(folder)
