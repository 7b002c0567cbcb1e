"""The kinds of stages beside transfer and logits, what trains in each, and the options that shape a stage's data."""

from __future__ import annotations

import copy
import math
import os
import signal

import pytest
import torch
from conftest import MIXER_NAMES, relative_error, shake, tiny_teacher
from distilling import LENGTH, logit_options, rows, student_of, transfer_options, weights

from linearize.convert import convert
from linearize.distill import BlockOptions, LogitOptions, MixingOptions, TransferOptions, distill, work
from linearize.distill.feed import Repeated, packed
from linearize.distill.losses import transfer_loss
from linearize.distill.mixing import eager_attention, mixing_loss, mixing_matrix
from linearize.distill.stepwise import active_layers, teacher_attention
from linearize.distill.trainer import StageTrainer
from linearize.errors import UsageError, UserError
from linearize.modeling.cache import CACHE

FIELDS = {"batch_size": 4, "max_length": LENGTH, "tokens": 4 * LENGTH * 12, "log_steps": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: TransferOptions(loss="l1"), "--loss must be one of relative, mse, l2"),
        (lambda: TransferOptions(loss_scale=0), "--loss-scale"),
        (lambda: TransferOptions(train="all"), "--train must be one of new, attention"),
        (lambda: BlockOptions(train="all_but_mlp"), "--train"),
        (lambda: LogitOptions(train="mlp"), "all_but_mlp"),
        (lambda: LogitOptions(active="1", lora_rank=2), "--active goes without --lora-rank"),
        (lambda: LogitOptions(window_dropout=1.5), "--window-dropout"),
        (lambda: LogitOptions(repeats=-0.1), "--repeats"),
        (lambda: LogitOptions(skip_tokens=-1), "--skip-tokens"),
        (lambda: LogitOptions(min_learning_rate=1e-3), "--min-learning-rate"),
        (lambda: LogitOptions(min_learning_rate=1e-6, schedule="linear"), "--schedule cosine"),
    ],
)
def test_a_bad_option_is_refused_by_its_flag(make, flag) -> None:
    with pytest.raises(UsageError, match=flag):
        make()


def test_transfer_losses_are_those_of_the_papers() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
    error = (ours - theirs).detach()
    assert transfer_loss(ours, theirs, kind="mse").item() == pytest.approx(error.square().mean().item())
    expected = (error.norm(dim=-1) * 8**-0.5).mean().item()
    assert transfer_loss(ours, theirs, kind="l2").item() == pytest.approx(expected)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[0, :3] = False
    for kind in ("relative", "mse", "l2"):
        kept = transfer_loss(ours[valid][None], theirs[valid][None], kind=kind)
        assert transfer_loss(ours, theirs, valid, kind).item() == pytest.approx(kept.item())
    transfer_loss(theirs + 0 * ours, theirs, kind="l2").backward()
    assert torch.isfinite(ours.grad).all()  # at the teacher itself


@pytest.mark.parametrize("loss", ["mse", "l2"])
def test_transfer_falls_by_every_loss(teacher, loss) -> None:
    student = shake(student_of(teacher))
    options = transfer_options(tokens=4 * LENGTH * 40, loss=loss, loss_scale=100, learning_rate=3e-2, log_steps=8)
    log = distill(student, teacher, rows(), stage="transfer", transfer=options).distillation[0].log
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert log[0]["loss"] == pytest.approx(sum(log[0]["layers"]) / 2)


MODES = {
    "new": {"mixer"},
    "attention": {"mixer", "attention"},
    "all_but_mlp": {"mixer", "attention", "norm", "embedding"},
    "all": {"mixer", "attention", "norm", "embedding", "mlp"},
}


def sort_of(name: str) -> str:
    for part, sort in ((".mixer.", "mixer"), ("self_attn", "attention"), (".mlp.", "mlp"), ("norm", "norm")):
        if part in name:
            return sort
    return "embedding"


@pytest.mark.parametrize("train", MODES)
def test_what_logits_trains(teacher, train) -> None:
    student = shake(student_of(teacher))
    before = weights(student)
    distill(student, teacher, rows(), stage="logits", logits=logit_options(train=train, learning_rate=1e-2))
    changed = {sort_of(name) for name, p in student.named_parameters() if not torch.equal(before[name], p)}
    assert changed == MODES[train]
    assert all(p.requires_grad for p in student.parameters())


def test_attention_of_kept_layers_stays_out(teacher) -> None:
    student = student_of(teacher, keep_softmax=[0])
    before = weights(student)
    distill(student, teacher, rows(), stage="logits", logits=logit_options(train="attention", learning_rate=1e-2))
    changed = {name for name, p in student.named_parameters() if not torch.equal(before[name], p)}
    assert changed and all(name.startswith("model.layers.1.self_attn.") for name in changed)


def test_transfer_of_all_attention_never_reaches_the_teacher(teacher) -> None:
    student, before = student_of(teacher, share_memory=True), weights(teacher)
    options = transfer_options(train="attention")
    distill(student, teacher, rows(), stage="transfer", transfer=options)
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())
    assert not torch.equal(
        student.model.layers[0].self_attn.q_proj.weight, teacher.model.layers[0].self_attn.q_proj.weight
    )


@pytest.mark.parametrize("train", ["new", "attention", "all"])
def test_blocks_lower_every_layers_error(teacher, train) -> None:
    student = shake(student_of(teacher, "retention"))
    before = weights(student)
    options = BlockOptions(**{**FIELDS, "tokens": 4 * LENGTH * 40}, learning_rate=1e-2, train=train)
    log = distill(student, teacher, rows(), stage="blocks", blocks=options).distillation[0].log
    assert all(b < 0.95 * a for a, b in zip(log[0]["layers"], log[-1]["layers"], strict=True)), log
    changed = {sort_of(name) for name, p in student.named_parameters() if not torch.equal(before[name], p)}
    assert (
        changed
        == {
            "new": {"mixer"},
            "attention": {"mixer", "attention"},
            "all": {"mixer", "attention", "mlp", "norm"},
        }[train]
    )


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("mixer", MIXER_NAMES)
def test_the_mixing_matrix_is_what_the_mixer_does(mixer, window) -> None:
    """Times the values it is the output; packed documents too, and heads that stay softmax left out."""
    teacher = tiny_teacher(dtype=torch.float64)
    student = shake(convert(teacher, mixer, window=window, keep_softmax="heads:0.3"))
    attention = student.model.layers[0].self_attn
    if hasattr(attention.mixer, "norm_weight"):  # the matrix has its mean over the channels
        attention.mixer.norm_weight.data = attention.mixer.norm_weight.mean(-1, keepdim=True).expand(-1, 16).clone()
    torch.manual_seed(0)
    hidden = torch.randn(2, 37, 64, dtype=torch.float64)
    positions = torch.cat([torch.arange(20), torch.arange(17)])[None].expand(2, -1)
    kwargs = {
        "position_embeddings": student.model.rotary_emb(hidden, positions),
        "position_ids": positions,
        CACHE: None,
    }
    seen = []
    handle = attention.mixer.register_forward_hook(
        lambda m, args, kwargs, out: seen.append((args, out)), with_kwargs=True
    )
    attention(hidden, **kwargs)
    handle.remove()
    (_, _, v, _), out = seen[0]
    matrix = mixing_matrix(attention, (hidden,), kwargs)
    assert matrix.shape == (2, out.shape[2], 37, 37)
    assert matrix.triu(1).abs().max() == 0 and matrix[:, :, 20:, :20].abs().max() == 0
    product = torch.einsum("bhij,bjhd->bihd", matrix, v.repeat_interleave(out.shape[2] // v.shape[2], dim=2))
    assert relative_error(product.detach(), out.detach()) < 1e-6
    assert not attention.mixer._forward_pre_hooks and "join" not in vars(attention.mixer)


@pytest.mark.parametrize("mixer", ["linear", "mamba2"])
def test_mixing_lowers_every_layers_distance(teacher, mixer) -> None:
    student = shake(student_of(teacher, mixer))
    before = teacher.config._attn_implementation
    options = MixingOptions(**{**FIELDS, "tokens": 4 * LENGTH * 40}, learning_rate=3e-2)
    log = distill(student, teacher, rows(), stage="mixing", mixing=options).distillation[0].log
    assert all(b < 0.95 * a for a, b in zip(log[0]["layers"], log[-1]["layers"], strict=True)), log
    assert teacher.config._attn_implementation == before
    with pytest.raises(UsageError, match="--compile"):
        distill(student, teacher, rows(), stage="mixing", mixing=MixingOptions(**FIELDS, compile=True))


@pytest.mark.parametrize("stage", ["mixing", "blocks"])
def test_half_precision_weights_train_in_fp32(stage) -> None:
    half = tiny_teacher(dtype=torch.bfloat16)
    student = student_of(half, "gated_delta")
    kinds = {"mixing": MixingOptions, "blocks": BlockOptions}
    options = {stage: kinds[stage](**FIELDS, train="attention")}
    log = distill(student, half, rows(), stage=stage, **options).distillation[0].log
    assert all(0 < line["loss"] < 2 for line in log)
    assert student.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_the_mixing_target_is_the_teachers_attention(teacher) -> None:
    """A window over everything is softmax: no distance is left."""
    student = convert(teacher, "linear", window=64, sinks=0)
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    found = []

    def hook(module, args, kwargs, output):
        matrix = mixing_matrix(student.model.layers[1].self_attn, args, {**kwargs, CACHE: None})
        found.append(mixing_loss(matrix, output[1]).item())

    handle = teacher.model.layers[1].self_attn.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad(), eager_attention(teacher):
        teacher(ids, use_cache=False)
    handle.remove()
    assert found[0] < 1e-4


def test_active_layers_are_read() -> None:
    assert active_layers("every:2", [0, 1, 2, 3]) == {1, 3}
    assert active_layers("every:2", [1, 2, 5]) == {1, 5}
    assert active_layers("0, 2", [0, 1, 2]) == {0, 2}
    for text in ("every:0", "half", "7", "every:9"):
        with pytest.raises(UsageError, match="--active"):
            active_layers(text, [0, 1, 2])


@pytest.mark.parametrize("packed_rows", [False, True])
def test_layers_that_wait_run_the_teachers_attention(packed_rows) -> None:
    teacher = tiny_teacher(num_hidden_layers=3)
    student = student_of(teacher)
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows(2)])}
    if packed_rows:
        inputs["position_ids"] = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None].expand(2, -1)
    own = student.model.layers[0].self_attn
    with torch.no_grad(), teacher_attention(student, teacher, "2"):
        ours = student.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        theirs = teacher.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        torch.testing.assert_close(ours[2], theirs[2])  # after layers 0 and 1
        assert not torch.allclose(ours[3], theirs[3], rtol=1e-2)
    assert student.model.layers[0].self_attn is own and not teacher.training


def test_a_stage_with_waiting_layers_leaves_them_and_the_teacher_as_they_were(tmp_path) -> None:
    teacher = tiny_teacher(num_hidden_layers=3)
    student = student_of(teacher)
    before, teacher_before = weights(student), weights(teacher)
    options = logit_options(active="every:2", train="all_but_mlp", learning_rate=1e-3, tokens=4 * LENGTH * 12)
    log = distill(student, teacher, rows(4), stage="logits", logits=options, work_dir=tmp_path).distillation[0].log
    assert log[-1]["loss"] < log[0]["loss"]
    changed = {name for name, p in student.named_parameters() if not torch.equal(before[name], p)}
    assert any(name.startswith("model.layers.1.self_attn.") for name in changed)
    assert not any(".mlp." in n or "layers.0.self_attn" in n or "layers.2.self_attn" in n for n in changed)
    assert all(torch.equal(teacher_before[name], p) for name, p in teacher.named_parameters())
    assert all(p.requires_grad for p in [*student.parameters(), *teacher.parameters()])


@pytest.mark.parametrize("train", ["attention", "all_but_mlp"])
@pytest.mark.parametrize("isolated", [False, True])
def test_a_student_in_half_precision_trains_in_part(teacher, train, isolated) -> None:
    """What trains is fp32 then and the rest is not, in the checks of the head and of documents, too."""
    teacher = copy.deepcopy(teacher).bfloat16()
    places = torch.cat([torch.arange(LENGTH // 4), torch.arange(LENGTH - LENGTH // 4)])
    data = [row | ({"position_ids": places} if isolated else {}) for row in rows(8)]
    log = distill(
        student_of(teacher), teacher, data, stage="logits", logits=logit_options(train=train, precision="bf16")
    )
    assert all(math.isfinite(line["loss"]) for line in log.distillation[0].log)


def test_cross_entropy_alone_asks_no_teacher(teacher) -> None:
    calls, student = [], student_of(teacher)
    handle = teacher.model.register_forward_hook(lambda *_: calls.append(1))
    options = logit_options(ce_weight=1.0)
    log = distill(student, teacher, rows(), stage="logits", logits=options).distillation[0].log
    handle.remove()
    assert not calls and "kl" not in log[0] and log[0]["ce"] == pytest.approx(log[0]["loss"])


def test_a_cosine_ends_where_it_is_told(teacher) -> None:
    options = transfer_options(learning_rate=1e-2, min_learning_rate=1e-3, log_steps=1, tokens=4 * LENGTH * 20)
    log = distill(student_of(teacher), teacher, rows(), stage="transfer", transfer=options).distillation[0].log
    rates = [line["lr"] for line in log]
    assert max(rates) == pytest.approx(1e-2) and 1e-3 <= rates[-1] < 1.2e-3


def test_window_dropout_is_seen_in_the_log_and_needs_windows(teacher) -> None:
    options = logit_options(window_dropout=0.5, log_steps=1, tokens=4 * LENGTH * 16, learning_rate=1e-6)
    student = student_of(teacher)
    log = distill(student, teacher, rows(), stage="logits", logits=options).distillation[0].log
    off = [line for line in log if "loss_window_off" in line]
    on = [line for line in log if "kl" in line]
    assert 3 <= len(off) <= 13 and len(off) + len(on) == 16 and "kl" in log[0]
    assert all(line["loss"] == line["loss_window_off"] == line["kl_window_off"] for line in off)
    assert sum(line["loss"] for line in off) / len(off) > 1.3 * sum(line["loss"] for line in on) / len(on)
    assert all(attention.mixer.window_branch for _, attention in student.mixer_layers())
    bare = convert(teacher, "linear", window=0)
    with pytest.raises(UsageError, match="--window-dropout"):
        distill(bare, teacher, rows(), stage="transfer", transfer=transfer_options(window_dropout=0.1))


def test_a_control_learns_without_its_linear_branch(teacher) -> None:
    student = student_of(teacher)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    options = logit_options(linear_branch=False, tokens=4 * LENGTH * 2)
    distill(student, teacher, rows(), stage="logits", logits=options)
    after = dict(student.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items() if ".mixer." in name)
    assert not torch.equal(
        after["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )
    assert all(attention.mixer.linear_branch for _, attention in student.mixer_layers())
    with pytest.raises(UsageError, match="--no-linear-branch with"):
        logit_options(linear_branch=False, window_dropout=0.1)
    with pytest.raises(UsageError, match="--no-linear-branch: the student"):
        distill(convert(teacher, "linear", window=0), teacher, rows(), stage="logits", logits=options)


def test_repeated_rows_hold_a_passage_twice(teacher) -> None:
    data = rows(40)
    for row in data:
        row["position_ids"] = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])
    half = LENGTH // 2
    made = Repeated(data, 0.25, seed=3)
    assert len(made) == 40 and len(made.chosen) == 10
    for index in range(40):
        item = made[index]
        if index not in made.chosen:
            assert all(torch.equal(item[name], data[index][name]) for name in item)
            continue
        for name in ("input_ids", "labels"):
            assert torch.equal(item[name][:half], data[index][name][:half])
            assert torch.equal(item[name][half:], data[index][name][:half])
        assert item["position_ids"].tolist() == list(range(LENGTH))
    assert Repeated(data, 0.25, seed=3).chosen == made.chosen != Repeated(data, 0.25, seed=4).chosen
    seen = []
    student = student_of(teacher)
    student.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    distill(student, teacher, rows(), stage="logits", logits=logit_options(repeats=1.0, tokens=4 * LENGTH))
    seen = [ids for ids in seen if ids.shape[1] == LENGTH]  # without those that check the head
    assert all(torch.equal(ids[:, :half], ids[:, half:]) for ids in seen) and seen


def test_repeated_rows_come_all_along(teacher) -> None:
    """Drawn with the sampler's own generator they were the first of the run, and then there were no more."""
    half, steps = LENGTH // 2, 16
    student, seen = student_of(teacher), []
    student.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    options = logit_options(repeats=0.25, batch_size=4, tokens=4 * steps * LENGTH)
    distill(student, teacher, rows(4 * steps), stage="logits", logits=options)
    shares = [float((ids[:, :half] == ids[:, half:]).all(1).float().mean()) for ids in seen if ids.shape[1] == LENGTH]
    assert len(shares) == steps and sum(shares) == 0.25 * steps
    assert 0 < sum(shares[: steps // 2]) < sum(shares)


def test_skipped_tokens_are_those_of_the_stage_before() -> None:
    data = rows(10)
    left = packed(data, None, TransferOptions(skip_tokens=3 * LENGTH - 1), isolate=False, text_field="text")
    assert len(left) == 7 and torch.equal(left[0]["input_ids"], data[3]["input_ids"])
    with pytest.raises(UserError, match="--skip-tokens 240 leaves nothing"):
        packed(data, None, TransferOptions(skip_tokens=240), isolate=False, text_field="text")


def sigterm_at(monkeypatch, step: int, title: str | None = None) -> None:
    whole, sent = StageTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step and title in (None, self.title) and not sent:
            sent.append(step)  # a second one would not wait for the step
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", interrupted)


@pytest.mark.parametrize("stage", ["transfer", "logits", "mixing", "blocks"])
def test_sigterm_writes_a_checkpoint_and_the_resumed_run_is_the_same(
    teacher, stage, tmp_path, monkeypatch, capfd
) -> None:
    """Between two lines of the log and two checkpoints, with dropped windows and repeated passages."""
    kinds = {"transfer": TransferOptions, "logits": LogitOptions, "mixing": MixingOptions, "blocks": BlockOptions}
    fields = {**FIELDS, "window_dropout": 0.4, "repeats": 0.5, "batch_size": 2, "gradient_accumulation": 2}
    options = {"stage": stage, stage: kinds[stage](**fields)}
    start, data = student_of(teacher), rows(20)
    before = signal.getsignal(signal.SIGTERM)
    straight = distill(copy.deepcopy(start), teacher, data, output=tmp_path / "straight", **options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        sigterm_at(patch, 5)
        distill(copy.deepcopy(start), teacher, data, output=tmp_path / "again", **options)
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM" in capfd.readouterr().err and not (tmp_path / "again").exists()
    assert work.last_checkpoint(tmp_path / "again.work" / stage).name == "checkpoint-6"
    resumed = distill(copy.deepcopy(start), teacher, data, output=tmp_path / "again", resume=True, **options)
    expected = weights(straight)
    assert all(torch.equal(expected[name], p) for name, p in resumed.named_parameters())
    logs = [(tmp_path / name / "loss.jsonl").read_text() for name in ("straight", "again")]
    assert logs[0] == logs[1] and "loss_window_off" in logs[0]
