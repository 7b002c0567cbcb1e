"""Training steps that are recorded and replayed: the losses and the weights of plain steps."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import pytest
import torch
from conftest import shake, tiny_teacher
from distilling import LENGTH, rows, weights
from families import teacher_of
from recorder import Recorder, recorder_into
from transformers import masking_utils

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
    return made


def trained(teacher, data, stage, mixer="linear", cuda_graph=False, device="cpu", **options):
    """The log of a run and the student's weights after it."""
    # from the CPU: what a mixer draws at random is drawn where the teacher is
    student = shake(convert(teacher.to("cpu"), mixer, window=8, sinks=1)).to(device)
    settings = {"batch_size": 2, "max_length": LENGTH, "log_steps": 1, "warmup": 0.0, "device": device, **options}
    if stage == "logits":
        settings.setdefault("gradient_checkpointing", False)  # which a CPU has by itself
    distill(student, teacher.to(device), data, stage=stage, cuda_graph=cuda_graph, **settings)
    return student.distillation[0].log, weights(student)


def same(plain, recorded):
    (log, state), (log_again, state_again) = plain, recorded
    assert log == log_again and len(log) > 5
    assert all(torch.equal(state[name], state_again[name]) for name in state)


@pytest.mark.parametrize("stage", ["transfer", "mixing", "blocks", "logits"])
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
    """Steps of other numbers of scored tokens than those before."""
    data = rows(16, ignored=True)
    options = {"batch_size": 1, "ce_weight": 0.5, "tokens": 4 * 16 * LENGTH}
    plain = trained(teacher, data, "logits", **options)
    same(plain, trained(teacher, data, "logits", cuda_graph=True, **options))
    assert not recordings


def test_documents_told_apart_are_not_recorded(teacher, recordings):
    data = [row | {"position_ids": torch.arange(LENGTH) % 11} for row in rows(16)]
    same(trained(teacher, data, "transfer"), trained(teacher, data, "transfer", cuda_graph=True))
    assert not recordings


@pytest.mark.parametrize("rehearsed", [True, False])
def test_what_cannot_be_recorded_goes_on_plainly(teacher, rehearsed, recordings, monkeypatch):
    plain = trained(teacher, rows(16), "transfer", gradient_accumulation=2, tokens=16 * 2 * LENGTH)
    norm = type(teacher.model.norm)
    forward = norm.forward

    def looking(self, x):
        assert bool(x.isfinite().all())
        return forward(self, x)

    monkeypatch.setattr(norm, "forward", looking)
    if rehearsed:
        monkeypatch.setattr(graphed, "no_waiting", lambda device: Recorder())
    with pytest.warns(UserWarning, match="training without CUDA graphs, which is slower: a value was looked at"):
        options = {"gradient_accumulation": 2, "tokens": 16 * 2 * LENGTH}
        same(plain, trained(teacher, rows(16), "transfer", cuda_graph=True, **options))
    assert len(recordings) == (0 if rehearsed else 1)


def test_recomputed_activations_are_not_recorded(teacher, recordings):
    options = {"gradient_checkpointing": True}
    plain = trained(teacher, rows(16), "logits", **options)
    with pytest.warns(UserWarning, match="--no-gradient-checkpointing"):
        same(plain, trained(teacher, rows(16), "logits", cuda_graph=True, **options))
    assert not recordings


def test_layers_that_are_skipped_by_a_draw_are_not_recorded(recordings):
    teacher = teacher_of("opt")
    student = shake(convert(teacher, "gla", window=8, sinks=1))
    student.base_model.decoder.layerdrop = 0.1
    options = {"batch_size": 2, "max_length": LENGTH, "gradient_checkpointing": False}
    with pytest.warns(UserWarning, match="draw which layers they skip"):
        distill(student, teacher, rows(16), stage="logits", cuda_graph=True, **options)
    assert not recordings


def test_lora_is_recorded(teacher, recordings):
    def run(cuda_graph):
        student = shake(convert(teacher, "gla", window=8, sinks=1))
        options = FinetuneOptions(
            batch_size=2,
            max_length=LENGTH,
            log_steps=1,
            device="cpu",
            merge=True,
            cuda_graph=cuda_graph,
            gradient_checkpointing=False,
        )
        _, result = stages.finetune(student, rows(16), options, Place())
        return result.log, weights(student)

    same(run(False), run(True))
    assert len(recordings) == 1


def test_a_recording_is_not_taken_for_tracing(teacher, monkeypatch):
    """Where transformers believes that it traces it makes a mask; a recorded step has none, as a plain one has none."""
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
    masks, ids = [], torch.arange(3, 35)[None]
    layer = teacher.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda *call: masks.append(call[2]["attention_mask"]), with_kwargs=True)
    try:
        with graphed.as_recorded():
            assert not masking_utils.is_tracing()
            teacher(ids)
    finally:
        hook.remove()
    assert masks == [None] and masking_utils.is_tracing()


def test_without_a_gpu_nothing_is_recorded(teacher):
    same(trained(teacher, rows(16), "logits"), trained(teacher, rows(16), "logits", cuda_graph=True))


ON_A_GPU = [pytest.param("cuda", marks=gpu)]


def on_a_gpu(teacher, stage, mixer, made, device, **options):
    """A run whose steps are recorded beside a plain one; `made` counts recordings."""
    options |= {"device": device, "precision": "fp32"}
    plain, _ = trained(teacher, rows(24), stage, mixer, **options)
    assert not made
    replayed, _ = trained(teacher, rows(24), stage, mixer, cuda_graph=True, **options)
    for a, b in zip(plain, replayed, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-3 * a["loss"]


@pytest.fixture
def counted(monkeypatch):
    """What is recorded on the GPU, an entry each."""
    made, record = [], recording.record
    monkeypatch.setattr(recording, "record", lambda *arguments: made.append(1) or record(*arguments))
    return made


@pytest.mark.parametrize("stage", ["transfer", "mixing", "blocks", "logits"])
@pytest.mark.parametrize("device", ON_A_GPU)
def test_a_gpu_trains_alike(mixer_name, stage, device, counted, recwarn):
    on_a_gpu(tiny_teacher(), stage, mixer_name, counted, device)
    # "mixing" reads the teacher's weights from eager attention, whose mask waited for a copy up to transformers 5.17
    waits = stage == "mixing" and "torch.tensor(0.0" in inspect.getsource(masking_utils.eager_mask)
    if waits:
        assert not counted and [warning for warning in recwarn if "without CUDA graphs" in str(warning.message)]
        return
    assert not [warning for warning in recwarn if "without CUDA graphs" in str(warning.message)]
    assert len(counted) == 1


@pytest.mark.parametrize("stage", ["transfer", "logits"])
@pytest.mark.parametrize("mixer", ["linear", "gla"])
@pytest.mark.parametrize("device", ON_A_GPU)
def test_a_gpu_trains_compiled_alike(mixer, stage, device, counted, recwarn):
    on_a_gpu(tiny_teacher(), stage, mixer, counted, device, compile=True)
    assert not [warning for warning in recwarn if "without CUDA graphs" in str(warning.message)]
    assert len(counted) == 1


@pytest.mark.parametrize("device", ON_A_GPU)
def test_a_gpu_takes_sliding_windows(device, counted):
    teacher = tiny_teacher("mistral", sliding_window=LENGTH // 2)
    on_a_gpu(teacher, "transfer", "linear", counted, device)
    assert len(counted) == 1


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("device", ON_A_GPU)
def test_a_gpu_goes_on_where_a_step_waits(late, device, counted, monkeypatch):
    """Found in the rehearsal, or as late as in the recording: training goes on, in this stage and the next."""
    teacher = tiny_teacher()

    def wait(*_):
        if not late or torch.cuda.is_current_stream_capturing():
            teacher.model.norm.weight.sum().item()

    teacher.model.norm.register_forward_hook(wait)
    monkeypatch.setattr(recording, "_broken", [])  # this process's later tests record again
    for stage in ("transfer", "logits"):
        before = len(counted)
        # once a recording has broken off, no other is tried
        tried = stage == "transfer" or not late
        with pytest.warns(UserWarning, match="without CUDA graphs") if tried else nullcontext():
            on_a_gpu(teacher, stage, "linear", [], device)
        assert len(counted) == before + (late and stage == "transfer")
    assert torch.isfinite(torch.rand(8, device=device)).all()
