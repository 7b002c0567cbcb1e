"""Training steps that are recorded and replayed: the losses and the weights of plain steps."""

from __future__ import annotations

import pytest
import torch
from conftest import shake, tiny_teacher
from recorder import recorder_into
from test_distill import LENGTH, rows, weights

from linearize.convert import convert
from linearize.distill import distill, graphed, stages
from linearize.distill.options import FinetuneOptions
from linearize.distill.stages import Place
from linearize.modeling import recording

GPU = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.fixture
def recordings(monkeypatch):
    """Lets steps be recorded on the CPU; the list of what was recorded."""
    made = []
    monkeypatch.setattr(recording, "record", recorder_into(made))
    monkeypatch.setattr(recording, "records_on", lambda device: True)
    monkeypatch.setattr(recording, "cannot_look", lambda: False)
    # what is recorded on a GPU knows that it is, and takes the layout as compiled code does
    monkeypatch.setattr("linearize.modeling.layout.cannot_look", lambda: bool(made) and made[-1].recording)
    return made


def trained(teacher, data, stage, mixer="linear", cuda_graph=False, device="cpu", **options):
    """The log of a run and the student's weights after it."""
    student = shake(convert(teacher, mixer, window=8, sinks=1)).to(device)
    settings = {"batch_size": 2, "max_length": LENGTH, "log_steps": 1, "warmup": 0.0, "device": device}
    teacher = teacher.to(device)
    distill(student, teacher, data, stage=stage, cuda_graph=cuda_graph, **settings, **options)
    return student.distillation[0].log, weights(student)


def same(plain, recorded):
    for (log, state), (log2, state2) in [(plain, recorded)]:
        assert log == log2 and len(log) > 4
        assert all(torch.equal(state[name], state2[name]) for name in state)


@pytest.mark.parametrize("stage", ["transfer", "blocks", "logits"])
def test_replayed_steps_train_alike(teacher, mixer_name, stage, recordings):
    data = rows(16)
    plain = trained(teacher, data, stage, mixer_name)
    assert not recordings
    same(plain, trained(teacher, data, stage, mixer_name, cuda_graph=True))
    assert len(recordings) == 1


@pytest.mark.parametrize("stage", ["transfer", "logits"])
def test_gradients_add_up_over_the_batches_of_a_step(teacher, stage, recordings):
    options = {"gradient_accumulation": 3, "tokens": 6 * 6 * LENGTH}
    plain = trained(teacher, rows(36), stage, **options)
    same(plain, trained(teacher, rows(36), stage, cuda_graph=True, **options))
    assert len(recordings) == 1


def test_steps_without_windows_are_a_recording_of_their_own(teacher, recordings):
    options = {"window_dropout": 0.5, "tokens": 16 * 2 * LENGTH}
    plain = trained(teacher, rows(32), "logits", **options)
    assert any("loss_window_off" in line for line in plain[0])
    same(plain, trained(teacher, rows(32), "logits", cuda_graph=True, **options))
    assert len(recordings) == 2


def test_batches_of_other_counts_run_plainly(teacher, recordings):
    """No step has as many scored tokens as another; those of two counts are recorded, where they come again."""
    data = rows(16, ignored=True)
    options = {"batch_size": 1}
    settings = {"ce_weight": 0.5, "tokens": 4 * 16 * LENGTH}

    def run(cuda_graph):
        student = shake(convert(teacher, "linear", window=8, sinks=1))
        distill(student, teacher, data, stage="logits", max_length=LENGTH, log_steps=1, device="cpu",
                cuda_graph=cuda_graph, **options, **settings)  # fmt: skip
        return student.distillation[0].log, weights(student)

    plain = run(False)
    same(plain, run(True))
    assert len(recordings) == graphed.MOST_GRAPHS


def test_documents_told_apart_are_not_recorded(teacher, recordings):
    data = [row | {"position_ids": torch.arange(LENGTH) % 11} for row in rows(16)]
    same(trained(teacher, data, "transfer"), trained(teacher, data, "transfer", cuda_graph=True))
    assert not recordings


def test_what_cannot_be_recorded_goes_on_plainly(teacher, recordings, monkeypatch):
    plain = trained(teacher, rows(16), "transfer")
    norm = type(teacher.model.norm)
    forward = norm.forward

    def looking(self, x):
        assert bool(x.isfinite().all())
        return forward(self, x)

    monkeypatch.setattr(norm, "forward", looking)
    with pytest.warns(UserWarning, match="training without CUDA graphs, which is slower: a value was looked at"):
        same(plain, trained(teacher, rows(16), "transfer", cuda_graph=True))
    assert len(recordings) == 1


def test_lora_is_recorded(teacher, recordings):
    def run(cuda_graph):
        student = shake(convert(teacher, "gla", window=8, sinks=1))
        options = FinetuneOptions(
            batch_size=2, max_length=LENGTH, log_steps=1, device="cpu", merge=True, cuda_graph=cuda_graph
        )
        _, result = stages.finetune(student, rows(16), options, Place())
        return result.log, weights(student)

    same(run(False), run(True))
    assert len(recordings) == 1


def test_without_a_gpu_nothing_is_recorded(teacher):
    same(trained(teacher, rows(16), "logits"), trained(teacher, rows(16), "logits", cuda_graph=True))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("stage", ["transfer", "logits"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_a_gpu_trains_alike(mixer_name, stage, compile, device, monkeypatch, recwarn):
    made = []
    record = recording.record
    monkeypatch.setattr(recording, "record", lambda *arguments: made.append(1) or record(*arguments))
    teacher, data = tiny_teacher(), rows(24)
    options = {"device": device, "compile": compile, "precision": "fp32", "gradient_checkpointing": False}
    options = {k: v for k, v in options.items() if stage == "logits" or k != "gradient_checkpointing"}
    plain, _ = trained(teacher, data, stage, mixer_name, **options)
    replayed, _ = trained(teacher, data, stage, mixer_name, cuda_graph=True, **options)
    assert not [warning for warning in recwarn if "without CUDA graphs" in str(warning.message)]
    assert len(made) == 1
    for a, b in zip(plain, replayed, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-3 * a["loss"]
