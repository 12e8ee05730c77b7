"""Laws of language models as teachers: frozen, in eval mode, themselves and nobody else."""

from __future__ import annotations

import shutil

import pytest
import torch

from potstill.core.errors import DataError, RecipeError, SignalError
from potstill.core.types import Batch, Need, Projection, Teacher
from potstill.losses.divergence import forward_kl
from potstill.objective import Objective, term
from potstill.schemes import Offline
from potstill.students import HfModel, adapted, hf_fresh
from potstill.teachers import AdaptersOff, HfTeacher, adapters_off, hf
from tests.students.lm import stories_folder, tiny, tokens
from tests.students.test_hf import LOGITS, ROWS, logits_of
from tests.students.test_lora import trained


@pytest.fixture(scope="module")
def stories() -> HfTeacher:
    return hf(str(stories_folder()))


def checksum(model: torch.nn.Module) -> float:
    return sum(float(tensor.double().abs().sum()) for tensor in model.state_dict().values())


def taught(teacher: Teacher, batch: Batch) -> torch.Tensor:
    signal = teacher(batch, LOGITS)
    assert isinstance(signal.logits, Projection)
    return signal.logits.hidden


def test_it_is_a_teacher_and_no_module(stories):
    teacher: Teacher = stories
    assert not isinstance(teacher, torch.nn.Module)


def test_it_answers_in_eval_mode_whatever_a_parent_does():
    student = HfModel(tiny("gpt2", resid_pdrop=0.5))
    teacher, batch = HfTeacher(student), tokens(*ROWS)
    first = taught(teacher, batch)
    torch.nn.ModuleList([student]).train()
    assert torch.equal(taught(teacher, batch), first)
    assert not any(module.training for module in student.modules())


def test_it_is_frozen_and_its_answers_carry_no_gradient(stories):
    assert not any(parameter.requires_grad for parameter in stories.parameters())
    assert not stories(tokens(*ROWS), LOGITS).logits.hidden.requires_grad


def test_answers_of_half_precision_can_be_chosen():
    assert taught(hf(str(stories_folder()), dtype="bfloat16"), tokens(*ROWS)).dtype == torch.bfloat16


def test_a_batch_of_another_tokenizer_is_refused(stories):
    with pytest.raises(SignalError, match=r"another tokenizer.*teachers\.aligned"):
        stories(tokens(*ROWS, vocabulary="another"), LOGITS)


def test_a_text_longer_than_the_teacher_reads_is_refused(stories):
    with pytest.raises(DataError, match="a text has 513 tokens"):
        stories(tokens([5] * 513), LOGITS)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(RecipeError, match=f"device: .*'{device}'"):
        hf(str(stories_folder()), device=device)


def test_on_the_batchs_own_device_a_device_of_its_own_changes_nothing(stories):
    placed = hf(str(stories_folder()), device="cpu")
    assert torch.equal(taught(placed, tokens(*ROWS)), taught(stories, tokens(*ROWS)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_teacher_elsewhere_brings_its_answers_to_the_batch():
    placed, batch = hf(str(stories_folder()), device="cpu"), tokens(*ROWS).to(torch.device("cuda"))
    one, two = (placed(batch, Need(logits=True, features=frozenset({"hidden/1"}))) for _ in range(2))
    assert one.logits.hidden.is_cuda and one.features["hidden/1"].is_cuda
    assert one.logits.weight.is_cuda and one.logits.weight is two.logits.weight
    assert next(placed.parameters()).device.type == "cpu"


# Identity


def test_identity_is_that_of_the_content_not_of_the_folder(stories, tmp_path):
    shutil.copytree(stories_folder(), tmp_path / "copy")
    assert hf(str(tmp_path / "copy")).identity == stories.identity


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: tiny("gemma2", seed=1), id="weights"),
        pytest.param(lambda: tiny("gemma2", final_logit_softcapping=0.6), id="soft cap"),
        pytest.param(lambda: tiny("gemma2", rms_norm_eps=1e-3), id="configuration"),
        pytest.param(lambda: tiny("gemma2").bfloat16(), id="precision"),
    ],
)
def test_identity_changes_with_what_decides_the_answers(other):
    assert HfTeacher(HfModel(other())).identity != HfTeacher(HfModel(tiny("gemma2"))).identity


def test_identity_changes_with_the_number_of_classes():
    one, other = (HfTeacher(HfModel(tiny("llama"), vocabulary=size)) for size in (39, 40))
    assert one.identity != other.identity


# A student with its adapters off


def test_adapters_off_is_the_model_as_it_was():
    batch = tokens(*ROWS)
    before = HfTeacher(HfModel(tiny("llama")))
    assert torch.equal(taught(adapters_off(trained()), batch), taught(before, batch))


def test_adapters_off_has_the_identity_of_the_model_it_was_made_from():
    assert adapters_off(trained("gpt2")).identity == HfTeacher(HfModel(tiny("gpt2"))).identity


def test_adapters_off_holds_no_second_copy():
    student = trained()
    signal = adapters_off(student)(tokens(*ROWS), LOGITS)
    assert signal.logits.weight.data_ptr() == student.student.model.lm_head.weight.data_ptr()


def test_adapters_off_leaves_the_student_as_it_was():
    student, batch = trained().train(), tokens(*ROWS)
    student.student.model.lm_head.eval()
    before = [(m.training, [p.requires_grad for p in m.parameters()]) for m in student.modules()]
    taught(adapters_off(student), batch)
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in student.modules()] == before


def test_adapters_off_answers_without_gradient_and_without_dropout():
    student, batch = trained("gpt2", dropout=0.5).train(), tokens(*ROWS)
    teacher = adapters_off(student)
    assert not teacher(batch, LOGITS).logits.hidden.requires_grad
    assert torch.equal(taught(teacher, batch), taught(teacher, batch))


# In a scheme


def learn(student: torch.nn.Module, teacher: Teacher, batch: Batch, *, steps: int) -> list[float]:
    objective, scheme = Objective(term(forward_kl)), Offline(student, teacher)
    scheme.prepare(objective, batch)
    learning = [p for p in scheme.learners().parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    losses = []
    for _ in range(steps):
        scheme.learners().train()
        for lesson in scheme.lessons(batch, objective.need("student"), objective.need("teacher")):
            loss = objective(lesson, batch)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_a_fresh_student_comes_closer_and_the_teacher_does_not_move(stories):
    torch.manual_seed(0)
    student = hf_fresh(str(stories_folder()), layers=1, hidden=32, heads=4)
    ids = stories.student.tokenizer("Once upon a time there was a little girl named Lily").input_ids
    before = checksum(stories.student)
    losses = learn(student, stories, tokens(ids, vocabulary=stories.fingerprint), steps=30)
    assert losses[-1] < losses[0] / 2
    assert checksum(stories.student) == before


def test_a_student_is_taught_by_itself_with_its_adapters_off():
    student, batch = trained(), tokens(*ROWS)
    teacher = adapters_off(student)
    assert isinstance(teacher, AdaptersOff)
    before = taught(teacher, batch)
    losses = learn(student, teacher, batch, steps=60)
    assert losses[-1] < losses[0] / 5
    assert torch.equal(taught(teacher, batch), before)


def test_at_the_start_a_student_agrees_with_itself():
    student, batch = adapted(HfModel(tiny("llama"))), tokens(*ROWS)
    [loss] = learn(student, adapters_off(student), batch, steps=1)
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert logits_of(student, batch).isfinite().all()
