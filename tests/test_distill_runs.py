"""A run of a stage: resumed, stopped, refused, out of disk, and the folder that it writes."""

from __future__ import annotations

import copy
import errno
import json

import pytest
import torch
from conftest import tiny_teacher
from distilling import LENGTH, logit_options, rows, stop_at, student_of, transfer_options, weights
from test_data import letters
from transformers import AutoModelForCausalLM

from linearize.convert import convert
from linearize.distill import (
    distill,
    stages,
    trainer,
    work,
)
from linearize.distill.tally import Tally
from linearize.distill.trainer import StageTrainer
from linearize.errors import UsageError, UserError


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.mark.parametrize("stage", ["transfer", "logits", "lora", "all"])
def test_resume_gives_the_same_run_bit_for_bit(teacher, stage, tmp_path, monkeypatch) -> None:
    start = student_of(teacher)
    options = {
        "stage": "logits" if stage == "lora" else stage,
        "transfer": transfer_options(save_steps=3, tokens=4 * LENGTH * 8),
        "logits": logit_options(
            save_steps=3, tokens=2 * LENGTH * 2 * 8, batch_size=2, gradient_accumulation=2,
            lora_rank=2 if stage == "lora" else None, lora_dropout=0.1,
        ),
    }  # fmt: skip
    data = rows(20)
    straight = copy.deepcopy(start)
    distill(straight, teacher, data, output=tmp_path / "straight", **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 5)
        distill(copy.deepcopy(start), teacher, data, output=tmp_path / "again", **options)
    assert not (tmp_path / "again").exists() and (tmp_path / "again.work").is_dir()
    with pytest.raises(UserError, match="--resume"):
        distill(copy.deepcopy(start), teacher, data, output=tmp_path / "again", **options)
    if stage == "all":  # a second stop, in the other stage
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, 7)
            patch.setattr(stages.TransferTrainer, "training_step", StageTrainer.training_step)
            distill(copy.deepcopy(start), teacher, data, output=tmp_path / "again", resume=True, **options)
    resumed = distill(copy.deepcopy(start), teacher, data, output=tmp_path / "again", resume=True, **options)

    expected = weights(straight)
    assert all(torch.equal(expected[name], p) for name, p in resumed.named_parameters())
    logs = [(tmp_path / name / "loss.jsonl").read_text() for name in ("straight", "again")]
    assert logs[0] == logs[1] and logs[0].count("\n") >= 5
    record = json.loads((tmp_path / "again" / "linearize.json").read_text())
    assert record["seconds"].keys() == record["steps"].keys() and all(took >= 0 for took in record["seconds"].values())
    assert record["hardware"].endswith("threads")


def test_the_time_before_a_checkpoint_counts(tmp_path) -> None:
    before = Tally()
    before.save(tmp_path, seconds=40.0)
    after = Tally()
    after.load(tmp_path)
    assert after.seconds == 40.0 and after.take() == {}


def test_time_goes_on_where_a_run_is_resumed(teacher, tmp_path, monkeypatch) -> None:
    start = student_of(teacher)
    options = {"stage": "transfer", "transfer": transfer_options(save_steps=3, tokens=4 * LENGTH * 8)}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 5)
        distill(copy.deepcopy(start), teacher, rows(20), output=tmp_path / "out", **options)
    [path] = (tmp_path / "out.work").glob("transfer/checkpoint-*/tally.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 1000.0}))
    done = distill(copy.deepcopy(start), teacher, rows(20), output=tmp_path / "out", resume=True, **options)
    assert 1000 < done.distillation[0].seconds < 1100
    assert not (tmp_path / "again.work").exists() and not (tmp_path / "straight.work").exists()


def test_a_run_that_is_complete_but_unwritten_resumes_without_training(teacher, tmp_path, monkeypatch) -> None:
    start = student_of(teacher)
    options = {"transfer": transfer_options(tokens=4 * LENGTH * 3)}
    done = distill(copy.deepcopy(start), teacher, rows(20), work_dir=tmp_path, **options)
    monkeypatch.setattr(StageTrainer, "training_step", lambda *_: pytest.fail("trained again"))
    again = distill(copy.deepcopy(start), teacher, rows(20), work_dir=tmp_path, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(done.parameters(), again.parameters(), strict=True))
    assert done.distillation == again.distillation


def test_a_full_disk_is_said_and_the_checkpoint_before_is_kept(teacher, tmp_path, monkeypatch) -> None:
    whole = trainer.save_file

    def full(tensors, path):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, path)

    monkeypatch.setattr(trainer, "save_file", full)
    options = transfer_options(save_steps=2)
    with pytest.raises(UserError, match=r"the disk is full.*--resume"):
        distill(student_of(teacher), teacher, rows(), work_dir=tmp_path, transfer=options)
    assert work.last_checkpoint(tmp_path / "transfer").name == "checkpoint-2"


def test_resume_refuses_another_run(teacher, tmp_path) -> None:
    start = student_of(teacher)
    distill(copy.deepcopy(start), teacher, rows(), work_dir=tmp_path, transfer=transfer_options())
    with pytest.raises(UserError, match=r"--learning-rate was 0.01 and is 0.5"):
        distill(
            copy.deepcopy(start), teacher, rows(), work_dir=tmp_path, resume=True,
            transfer=transfer_options(learning_rate=0.5),
        )  # fmt: skip
    other = copy.deepcopy(start)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with pytest.raises(UserError, match="other weights"):
        distill(other, teacher, rows(), work_dir=tmp_path, resume=True, transfer=transfer_options())
    changed = copy.deepcopy(teacher)
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1
    with pytest.raises(UserError, match="learned from another teacher"):
        distill(copy.deepcopy(start), changed, rows(), work_dir=tmp_path, resume=True, transfer=transfer_options())
    with pytest.raises(UserError, match="read other text"):
        distill(
            copy.deepcopy(start), teacher, rows(seed=1), work_dir=tmp_path, resume=True, transfer=transfer_options()
        )
    wider = convert(teacher, "linear", window=10, sinks=1)
    with pytest.raises(UserError, match="other weights"):
        distill(wider, teacher, rows(), work_dir=tmp_path, resume=True, transfer=transfer_options())
    with pytest.raises(UsageError, match="--resume"):
        distill(start, teacher, rows(), resume=True)


def test_a_damaged_record_is_said_before_anything_is_trained(teacher, tmp_path, monkeypatch) -> None:
    student_of(teacher).save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "linearize.json").write_text("{")
    monkeypatch.setattr(StageTrainer, "training_step", lambda *args, **kwargs: pytest.fail("it trains"))
    with pytest.raises(UserError, match="not valid JSON"):
        distill(
            str(tmp_path / "student"), teacher, rows(), tokenizer=letters(), output=tmp_path / "out", stage="transfer"
        )
    assert not (tmp_path / "out.work").exists()


def test_the_output_is_a_converted_folder_with_its_history(teacher, tmp_path) -> None:
    parent = tmp_path / "student"
    student_of(teacher).save_pretrained(parent)
    student = AutoModelForCausalLM.from_pretrained(parent)
    out = tmp_path / "out"
    distill(
        student, teacher, rows(20), stage="all", output=out, tokens=4 * LENGTH * 9,
        transfer=transfer_options(tokens=None), logits=logit_options(tokens=None),
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = rows(1)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert "use_cache" not in json.loads((out / "config.json").read_text())
    record = json.loads((out / "linearize.json").read_text())
    assert record["stage"] == "all" and record["parent"] == str(parent)
    assert record["steps"] == {"transfer": 3, "logits": 6}  # a third and two thirds
    assert record["options"]["transfer"]["learning_rate"] == 1e-2
    assert {path.name for path in tmp_path.iterdir()} == {"student", "out"}
    with pytest.raises(UsageError, match="exists"):
        distill(student, teacher, rows(), output=out)


def test_a_loss_that_is_not_finite_names_layer_and_step_and_keeps_the_checkpoint(
    teacher, tmp_path, monkeypatch
) -> None:
    student = student_of(teacher)
    whole = StageTrainer.training_step

    def poisoned(self, *args, **kwargs):
        if self.state.global_step == 3:
            with torch.no_grad():
                next(self.student.model.layers[1].self_attn.mixer.parameters()).fill_(float("nan"))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", poisoned)
    with pytest.raises(UserError, match=r"layer 1 \(model.layers.1.self_attn\) at step 4") as error:
        distill(student, teacher, rows(), work_dir=tmp_path, transfer=transfer_options(save_steps=2))
    assert str(tmp_path) in str(error.value)
    assert [path.name for path in (tmp_path / "transfer").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_gradient_that_is_not_finite_stops_before_it_is_applied(teacher) -> None:
    student = student_of(teacher)
    student.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(UserError, match=r"gradient's norm is (nan|inf).*up_proj.* at step 1"):
        distill(student, teacher, rows(), stage="logits", logits=logit_options())
    assert all(p.isfinite().all() for p in student.parameters())


def test_models_that_do_not_fit_are_refused_before_anything(teacher, tmp_path) -> None:
    student = student_of(teacher)
    out = tmp_path / "out"
    for stage in ("transfer", "logits", "all"):
        with pytest.raises(UserError, match=r"vocab_size is 128 in the student and 160 in the teacher"):
            distill(student, tiny_teacher(vocab_size=160), rows(), stage=stage, output=out)
    with pytest.raises(UserError, match="num_hidden_layers"):
        distill(student, tiny_teacher(num_hidden_layers=3), rows(), output=out)
    assert not list(tmp_path.iterdir())


def test_data_that_does_not_fit_is_refused(teacher) -> None:
    student = student_of(teacher)
    with pytest.raises(UserError, match="empty"):
        distill(student, teacher, [], transfer=transfer_options())
    with pytest.raises(UserError, match="--batch-size"):
        distill(student, teacher, rows(2), transfer=transfer_options())
    with pytest.raises(UserError, match=r"vocabulary ends at 127"):
        distill(student, teacher, rows(vocab=400), transfer=transfer_options())


def test_what_lies_in_the_work_folder_and_is_not_the_stages_stays(teacher, tmp_path) -> None:
    """The student may: it is a stage's, of a recipe that was stopped."""
    work = tmp_path / "out.work"
    (work / "transfer").mkdir(parents=True)
    (work / "notes.txt").write_text("mine")
    (work / "transfer" / "notes.txt").write_text("mine")
    student_of(teacher).save_pretrained(work / "1-convert")
    teacher.save_pretrained(tmp_path / "teacher")
    options = {"stage": "transfer", "tokenizer": letters(), "transfer": transfer_options(tokens=4 * LENGTH)}
    distill(str(work / "1-convert"), str(tmp_path / "teacher"), rows(4), output=tmp_path / "out", **options)
    left = {str(path.relative_to(work)) for path in work.rglob("*")}
    assert {"notes.txt", "transfer/notes.txt", "1-convert/config.json"} <= left
    assert not any("checkpoint" in name or name.endswith(".jsonl") for name in left)


def test_a_work_folder_in_the_output_is_refused(teacher, tmp_path) -> None:
    for inside in (tmp_path / "out", tmp_path / "out" / "work"):
        with pytest.raises(UsageError, match=r"--work-dir: .* choose another folder"):
            distill(student_of(teacher), teacher, rows(), output=tmp_path / "out", work_dir=inside)
    assert not (tmp_path / "out").exists()


def test_overwrite_spares_the_base_of_an_adapter_that_is_read(teacher, tmp_path) -> None:
    student_of(teacher).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "linearize.json").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(UsageError, match="base, which this reads"):
        distill(str(adapter), teacher, rows(), output=tmp_path / "base", overwrite=True)
