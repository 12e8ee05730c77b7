"""Laws of adapters: they start as nothing, only they learn, and the export holds what was learnt."""

from __future__ import annotations

import copy

import pytest
import torch

from potstill.core.errors import RecipeError
from potstill.core.types import Batch, Lesson, Need, Signal
from potstill.losses.response import cross_entropy
from potstill.objective import Objective, term
from potstill.students import Adapted, HfModel, adapted, hf, lora, qlora
from tests.students.lm import stories_folder, tiny, tokens
from tests.students.test_hf import LOGITS, ROWS, logits_of, own_logits

pytest.importorskip("peft", reason="peft is not installed: pip install -e .[lora]")


def loss_of(student, batch: Batch) -> torch.Tensor:
    return Objective(term(cross_entropy))(Lesson(student=student(batch, LOGITS), teacher=Signal()), batch)


def trained(family: str = "llama", **knobs) -> Adapted:
    """Adapters after a step large enough to show."""
    torch.manual_seed(0)
    student = adapted(HfModel(tiny(family)), rank=4, alpha=8, **knobs)
    loss_of(student.train(), tokens(*ROWS)).backward()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad).add_(0.1 if "lora_A" in name else 0.0)
    student.zero_grad()
    return student.eval()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi"])
def test_adapters_start_as_nothing(family):
    before = logits_of(HfModel(tiny(family)), tokens(*ROWS))
    assert torch.equal(logits_of(adapted(HfModel(tiny(family))), tokens(*ROWS)), before)


def test_every_linear_layer_but_the_head_is_adapted():
    names = {name for name, p in adapted(HfModel(tiny("llama"))).named_parameters() if p.requires_grad}
    assert len(names) == 2 * 7 * 2
    assert all("lora_" in name and "lm_head" not in name for name in names)


def test_targets_choose_the_layers():
    student = adapted(HfModel(tiny("llama")), targets=["q_proj", "v_proj"])
    assert sum(p.requires_grad for p in student.parameters()) == 2 * 2 * 2


@pytest.mark.parametrize("targets", [["query"], ["lm_head"]])
def test_targets_that_cannot_be_adapted_are_refused(targets):
    with pytest.raises(RecipeError, match="lora"):
        adapted(HfModel(tiny("llama")), targets=targets)


def test_only_adapters_get_a_gradient_and_the_head_allocates_none(monkeypatch):
    from potstill.objective import chunked

    allocated = []
    run = chunked._run
    monkeypatch.setattr(chunked, "_run", lambda *given: allocated.append(run(*given)) or run(*given))
    student = adapted(HfModel(tiny("llama")))
    loss_of(student, tokens(*ROWS)).backward()
    assert [gradient is None for gradient in allocated[0][2]] == [False, True, True]
    assert all(("lora_" in name) == (p.grad is not None) for name, p in student.named_parameters())


def test_checkpointing_reaches_the_adapters_under_a_frozen_embedding(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    gradients = []
    for is_on in (False, True):
        torch.manual_seed(0)
        student = lora(str(tmp_path), gradient_checkpointing=is_on)
        loss_of(student.train(), tokens(*ROWS)).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 28
    torch.testing.assert_close(gradients[0], gradients[1])


def test_without_adapters_the_model_is_as_it_was():
    student, batch = trained(), tokens(*ROWS)
    learnt, before = logits_of(student, batch), logits_of(HfModel(tiny("llama")), batch)
    with student.without_adapters() as bare:
        assert torch.equal(logits_of(bare, batch), before)
    assert torch.equal(logits_of(student, batch), learnt)
    assert not torch.allclose(learnt, before)


def test_without_adapters_what_learns_is_put_back():
    student = trained()
    next(p for p in student.parameters() if p.requires_grad).requires_grad_(False)
    learning = [p.requires_grad for p in student.parameters()]
    with student.without_adapters():
        pass
    assert [p.requires_grad for p in student.parameters()] == learning


@pytest.mark.parametrize("family", ["tied", "gemma2", "gpt2"])
def test_the_export_holds_what_was_learnt_and_no_adapter(family, tmp_path):
    import transformers

    student, batch = trained(family), tokens(*ROWS)
    student.export(tmp_path / "out")
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["unexpected_keys"]
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(own_logits(model, batch)[real], logits_of(student, batch)[real])


def test_exporting_leaves_the_student_as_it_is(tmp_path):
    student, batch = trained(), tokens(*ROWS)
    before, state = logits_of(student, batch), copy.deepcopy(student.state_dict())
    student.export(tmp_path / "out")
    assert torch.equal(logits_of(student, batch), before)
    torch.testing.assert_close(student.state_dict(), state)


def test_a_half_precision_base_is_merged_in_full_precision_and_rounded_once(tmp_path):
    torch.manual_seed(0)
    student = adapted(HfModel(tiny("llama").bfloat16()), rank=4, alpha=8)
    layer = student.student.model.model.layers[0].mlp.up_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.dtype == up.dtype == torch.float32
    torch.nn.init.normal_(up)
    student.export(tmp_path / "out")
    found = hf(str(tmp_path / "out"), dtype="bfloat16").model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(found, (layer.base_layer.weight.float() + 2.0 * up @ down).bfloat16(), rtol=0, atol=0)


def test_exported_adapters_load_onto_the_base(tmp_path):
    from peft import PeftModel

    student, batch = trained(), tokens(*ROWS)
    student.export_adapters(tmp_path / "adapters")
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapters")
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(own_logits(again, batch)[real], logits_of(student, batch)[real])


def test_a_student_with_adapters_is_made_from_a_folder():
    student = lora(str(stories_folder()), rank=2)
    assert student.fingerprint == hf(str(stories_folder())).fingerprint
    assert (
        student(tokens(*ROWS), Need(features=frozenset({"model.layers.4"}))).features["model.layers.4"].shape[-1] == 64
    )


def test_a_copy_with_adapters_learns_by_itself():
    student, batch = trained(), tokens(*ROWS)
    before = logits_of(student, batch)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    with twin.without_adapters():
        assert torch.equal(logits_of(student, batch), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_four_bits_without_a_gpu_are_refused():
    with pytest.raises(RecipeError, match="qlora: needs a CUDA GPU"):
        qlora(str(stories_folder()))
