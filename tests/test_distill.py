"""Attention transfer and logit distillation: what trains, that gradients are right, that runs resume."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import shake, tiny_teacher
from distilling import LENGTH, logit_options, rows, student_of, transfer_options, weights
from families import teacher_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linearize.convert import convert
from linearize.distill import (
    LogitOptions,
    TransferOptions,
    distill,
    stages,
    training_flops,
    training_memory,
)
from linearize.distill.layer_pass import attention_pairs, transfer_pass
from linearize.distill.losses import head_losses, transfer_loss
from linearize.distill.memory import graph_bytes
from linearize.distill.parameters import optimizer_groups
from linearize.distill.stages import wants_checkpoints
from linearize.distill.trainer import StageTrainer
from linearize.errors import UsageError, UserError
from linearize.modeling.cache import CACHE


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"learning_rate": -1}, "--learning-rate must be positive, got -1"),
        ({"batch_size": 0}, "--batch-size"),
        ({"tokens": 0}, "--tokens"),
        ({"max_length": 1}, "--max-length"),
        ({"warmup": 1.5}, "--warmup"),
        ({"precision": "fp8"}, "--precision"),
        ({"schedule": "step"}, "--schedule"),
        ({"lr_scale": {"(": 2.0}}, "--lr-scale"),
        ({"chunk": 0}, "--chunk"),
        ({"lora_rank": 0}, "--lora-rank"),
        ({"ce_weight": 2.0}, "--ce-weight"),
        ({"temperature": 0.0}, "--temperature"),
        ({"train": "none"}, "--train"),
    ],
)
def test_a_bad_option_is_refused_by_its_flag(options, flag) -> None:
    with pytest.raises(UsageError, match=flag):
        LogitOptions(**options)


def test_an_unknown_option_or_stage_is_refused(teacher) -> None:
    with pytest.raises(UsageError, match="learning_rate"):
        distill(None, teacher, rows(), learning_rat=1.0)
    with pytest.raises(UsageError, match="--stage"):
        distill(None, teacher, rows(), stage="both")
    with pytest.raises(UsageError, match="--learning-rate with --stage all"):
        distill(None, teacher, rows(), stage="all", learning_rate=1e-3)


@pytest.mark.parametrize("mixer", ["linear", "based", "gla"])
def test_transfer_trains_new_parameters_alone_and_lowers_every_layers_loss(teacher, mixer, capsys) -> None:
    student = shake(student_of(teacher, mixer))
    before, teacher_before = weights(student), weights(teacher)
    result = distill(
        student,
        teacher,
        rows(),
        transfer=transfer_options(tokens=4 * LENGTH * 60, warmup=0.1, log_steps=5, learning_rate=3e-2),
    ).distillation[0]
    after = weights(student)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    new = {name for name in after if ".mixer." in name}
    assert changed and changed <= new
    # a layer's loss cannot rest on another's: all must fall
    first, last = result.log[0]["layers"], result.log[-1]["layers"]
    assert len(first) == 2 and all(b < 0.95 * a for a, b in zip(first, last, strict=True)), (first, last)
    assert result.log[-1]["loss"] == pytest.approx(sum(last) / 2, rel=1e-5)
    assert result.tokens == 4 * LENGTH * 60 and result.steps == 60
    assert all(torch.equal(teacher_before[n], p) for n, p in teacher.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert not student.training and "use_cache" not in vars(student.config)
    assert capsys.readouterr().out == ""


def test_sequences_that_the_window_covers_are_refused(teacher) -> None:
    student = convert(teacher, "linear", window=32)
    with pytest.raises(UsageError, match="--max-length 16"):
        distill(student, teacher, rows(), stage="transfer", transfer=transfer_options(max_length=16))


def naive_transfer_losses(student, teacher, inputs) -> list[torch.Tensor]:
    """All layers' graphs at once, from recorded inputs."""
    seen = {}
    pairs = attention_pairs(student, teacher)
    handles = [
        original.register_forward_hook(
            lambda m, args, kwargs, out, layer=layer: seen.__setitem__(layer, (args, kwargs, out[0])),
            with_kwargs=True,
        )
        for layer, (_, original) in pairs.items()
    ]
    with torch.no_grad():
        teacher(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    losses = []
    for layer, (attention, _) in pairs.items():
        args, kwargs, target = seen[layer]
        output = attention(*args, **{**kwargs, CACHE: None})[0]
        losses.append((output - target).square().sum() / target.square().sum())
    return losses


class Saved:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("keep", [None, [0]])
def test_backward_layer_by_layer_is_the_gradient_of_the_mean(keep) -> None:
    teacher = tiny_teacher(dtype=torch.float64, num_hidden_layers=3)
    student = student_of(teacher, keep_softmax=keep)
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows(2)])}
    new = {name: p for name, p in student.named_parameters() if ".mixer." in name}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in new)

    losses = naive_transfer_losses(student, teacher, inputs)
    torch.stack(losses).mean().backward()
    expected = {name: p.grad for name, p in new.items()}
    student.zero_grad()

    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    counts = []

    def on_loss(layer: int, loss: torch.Tensor) -> None:
        counts.append(len(alive))
        (loss / len(losses)).backward()

    def save(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
        transfer_pass(teacher, attention_pairs(student, teacher), inputs, on_loss)
    # what autograd keeps is one layer's at a time
    assert len(counts) == len(losses) == (3 if keep is None else 2)
    assert min(counts) > 10 and len(set(counts)) == 1, counts
    assert any(grad is not None and grad.abs().max() > 0 for grad in expected.values())
    for name, parameter in new.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-12)


def test_transfer_leaves_padding_out(teacher) -> None:
    """A padded row's loss is that of the row alone."""
    student = student_of(teacher)
    ids = rows(1)[0]["input_ids"]
    padded = torch.cat([torch.zeros(7, dtype=torch.long), ids])
    mask = torch.cat([torch.zeros(7, dtype=torch.long), torch.ones(LENGTH, dtype=torch.long)])
    inputs = [
        {"input_ids": ids[None]},
        {
            "input_ids": padded[None],
            "attention_mask": mask[None],
            "position_ids": (mask.cumsum(0) - 1).clamp(0)[None],
        },
    ]
    losses: list[list[float]] = [[], []]
    for batch, collected in zip(inputs, losses, strict=True):
        transfer_pass(
            teacher,
            attention_pairs(student, teacher),
            batch,
            lambda _, loss, c=collected: c.append(loss.item()),
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_transfer_keeps_packed_documents_apart(teacher) -> None:
    student = student_of(teacher)
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    apart, packed = [], []
    pairs = attention_pairs(student, teacher)
    outputs: list[torch.Tensor] = []
    for attention, _ in pairs.values():
        attention.register_forward_hook(lambda m, a, out: outputs.append(out[0].detach()))
    transfer_pass(teacher, pairs, {"input_ids": ids}, lambda _, loss: apart.append(loss))
    positions = torch.arange(LENGTH).repeat(2)[None]
    transfer_pass(
        teacher,
        pairs,
        {"input_ids": ids.view(1, -1), "position_ids": positions},
        lambda _, x: packed.append(x),
    )
    for one, two in zip(outputs[:2], outputs[2:], strict=True):
        torch.testing.assert_close(two.view_as(one), one, rtol=1e-4, atol=1e-5)
    assert [loss.item() for loss in packed] == pytest.approx([loss.item() for loss in apart], rel=1e-4)


def test_transfer_loss_is_relative() -> None:
    output, target = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    assert transfer_loss(torch.zeros_like(target), target).item() == pytest.approx(1)
    torch.testing.assert_close(transfer_loss(output * 1e-3, target * 1e-3), transfer_loss(output, target))
    assert transfer_loss(output.bfloat16(), target.bfloat16()).dtype == torch.float32


def naive_head_losses(hidden, labels, head, teacher_hidden, teacher_head, temperature):
    logits, target = head(hidden)[:, :-1], teacher_head(teacher_hidden)[:, :-1]
    scored = labels[:, 1:] != -100
    p = (target / temperature).softmax(-1)
    kl = (p * (p.log() - (logits / temperature).log_softmax(-1))).sum(-1)
    ce = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    return kl[scored].sum() * temperature**2, ce[scored].sum()


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunked_losses_are_the_whole_ones(chunk, temperature) -> None:
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    hidden = torch.randn(3, 11, 8, **double, requires_grad=True)
    teacher_hidden = torch.randn(3, 11, 6, **double)
    head, teacher_head = torch.nn.Linear(8, 29, **double), torch.nn.Linear(6, 29, **double)
    labels = torch.randint(0, 29, (3, 11))
    labels[0, :4] = labels[2, 5] = -100
    leaves = [hidden, head.weight, head.bias]
    expected = naive_head_losses(hidden, labels, head, teacher_hidden, teacher_head, temperature)
    expected_grads = torch.autograd.grad(expected[0] + 0.3 * expected[1], leaves)
    found = head_losses(
        hidden,
        labels,
        head,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        temperature=temperature,
        with_ce=True,
        chunk=chunk,
    )
    grads = torch.autograd.grad(found[0] + 0.3 * found[1], leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-12)


class LogitRows(TorchDispatchMode):
    """Most rows of any tensor over the vocabulary that an operation gives, forward and backward."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.most = vocab, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[-1] == self.vocab:
                self.most = max(self.most, leaf.numel() // self.vocab)
        return result


def test_full_logits_never_exist(monkeypatch) -> None:
    vocab, chunk = 1000, 20
    teacher = tiny_teacher(vocab_size=vocab, hidden_size=16, head_dim=4, intermediate_size=16)
    found = []
    whole = StageTrainer.training_step

    def watched(*args, **kwargs):
        with LogitRows(vocab) as mode:
            loss = whole(*args, **kwargs)
        found.append(mode.most)
        return loss

    monkeypatch.setattr(StageTrainer, "training_step", watched)
    options = logit_options(batch_size=4, chunk=chunk, ce_weight=0.5, tokens=4 * LENGTH)
    distill(student_of(teacher), teacher, rows(4, vocab=vocab), stage="logits", logits=options)
    # 16 rows are the transposed head; the whole batch would be 92, in five chunks of at most 20
    assert found == [19]


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_accumulated_batches_give_the_step_of_one_batch(teacher, ce_weight) -> None:
    data = rows(8, ignored=True)
    found = []
    for batch, accumulation in ((4, 1), (2, 2)):
        student = student_of(teacher)
        options = logit_options(
            batch_size=batch, gradient_accumulation=accumulation, ce_weight=ce_weight, log_steps=1, beta2=0.99
        )
        distill(student, teacher, data, stage="logits", logits=options)
        found.append((student.distillation[0].log, weights(student)))
    for log, after in found[1:]:
        assert len(log) == 6
        for line, expected in zip(log, found[0][0], strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        for name, value in after.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=1e-3, atol=2e-5)


def test_logits_lowers_kl_and_gradient_checkpointing_changes_nothing(teacher, monkeypatch) -> None:
    calls = []
    student = student_of(teacher)
    student.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    fresh = copy.deepcopy(student)
    options = logit_options(tokens=4 * LENGTH * 12, learning_rate=4e-3)
    log = distill(student, teacher, rows(), stage="logits", logits=options).distillation[0].log
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert len(calls) == 24 + 2  # each forward twice, and two that check the head
    plain = logit_options(tokens=4 * LENGTH * 12, learning_rate=4e-3, gradient_checkpointing=False)
    assert distill(fresh, teacher, rows(), stage="logits", logits=plain).distillation[0].log == log
    assert not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())


@pytest.mark.parametrize("what", [{"train": "new"}, {"lora_rank": 2}, {"lora_rank": 2, "lora_on": "swapped"}])
def test_logits_on_a_part_of_the_parameters(teacher, what) -> None:
    student = student_of(teacher)
    before = weights(student)
    options = logit_options(tokens=4 * LENGTH * 10, learning_rate=5e-3, **what)
    log = distill(student, teacher, rows(), stage="logits", logits=options).distillation[0].log
    assert log[-1]["loss"] < (log[0]["loss"] + log[1]["loss"]) / 2  # the steps' batches differ
    after = weights(student)
    assert after.keys() == before.keys()  # LoRA is merged
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any(".mixer." in name for name in changed)
    assert not any("embed" in name or "norm" in name for name in changed - {n for n in changed if ".mixer." in n})
    projections = {name.split(".")[-2] for name in changed if ".mixer." not in name}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (
        projections
        == {
            "new": set(),
            "linear": attention | {"gate_proj", "up_proj", "down_proj"},
            "swapped": attention,
        }[what.get("train") or what.get("lora_on", "linear")]
    )
    assert all(p.requires_grad for p in student.parameters())


def test_distilling_never_reaches_a_teacher_that_shares_its_weights(teacher) -> None:
    before = weights(teacher)
    student = student_of(teacher, share_memory=True)
    distill(student, teacher, rows(), stage="logits", logits=logit_options(tokens=4 * LENGTH))
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())


def test_the_stages_of_all_see_different_text(teacher, monkeypatch) -> None:
    seen = {}

    def record(name):
        def stage(student, teacher, dataset, options, place):
            seen[name] = [tuple(dataset[i]["input_ids"].tolist()) for i in range(len(dataset))]
            return stages.StageResult(stage=name, steps=0, tokens=0, log=[])

        return stage

    monkeypatch.setattr(stages, "transfer", record("transfer"))
    monkeypatch.setattr(stages, "logits", record("logits"))
    distill(student_of(teacher), teacher, rows(9), stage="all")
    assert len(seen["transfer"]) == 3 and len(seen["logits"]) == 6
    assert not set(seen["transfer"]) & set(seen["logits"])


def test_learning_rates_by_name(teacher) -> None:
    student = student_of(teacher)
    options = TransferOptions(learning_rate=1.0, weight_decay=0.1, lr_scale={r"gain": 0.5, r"layers\.1\.": 2.0})
    groups = optimizer_groups(student, options)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = dict(student.named_parameters())
    assert len(rate) == len(named)
    for name, parameter in named.items():
        expected = 0.5 if "gain" in name else 2.0 if "layers.1." in name else 1.0
        assert rate[id(parameter)] == (expected, 0.1 if parameter.ndim >= 2 else 0.0)


def test_half_precision_weights_train_in_fp32_and_come_back(teacher) -> None:
    half = copy.deepcopy(teacher).bfloat16()
    student = student_of(half)
    dtypes = {name: p.dtype for name, p in student.named_parameters()}
    seen = {}
    student.model.layers[0].mlp.register_forward_hook(
        lambda m, args, out: seen.update(weight=m.up_proj.weight.dtype, out=out.dtype)
    )
    log = distill(student, half, rows(), stage="logits", logits=logit_options(learning_rate=1e-3)).distillation[0].log
    assert seen == {"weight": torch.float32, "out": torch.bfloat16}
    assert log[-1]["loss"] < log[0]["loss"]
    assert {name: p.dtype for name, p in student.named_parameters()} == dtypes
    log = distill(student, half, rows(), transfer=transfer_options()).distillation[0].log
    assert all(0 < line["loss"] < 10 for line in log)
    with pytest.raises(UserError, match="--precision fp32"):
        distill(student, half, rows(), transfer=transfer_options(precision="fp32"))


def test_an_8b_model_fits_one_80_gb_card() -> None:
    shape = {
        "parameters": 8_030_261_248, "new_parameters": 21_000_000, "hidden": 4096, "layers": 32,
        "vocab": 128_256, "batch": 8, "length": 1024, "intermediate": 14_336,
    }  # fmt: skip
    assert training_memory(**shape, stage="transfer")["total"] < 60e9
    assert training_memory(**shape, stage="logits", lora_rank=16)["total"] < 60e9
    everything = training_memory(**shape, stage="logits")
    assert everything["total"] > 80e9 and everything["total"] == sum(v for k, v in everything.items() if k != "total")
    cost = {k: v for k, v in shape.items() if k not in ("batch", "intermediate")}
    per_token = training_flops(**cost, stage="transfer", tokens=1) / 8.03e9
    assert 2 < per_token < 4  # one forward of the teacher and little more
    assert training_flops(**cost, stage="logits", tokens=1) > 3 * per_token * 8.03e9
    with pytest.raises(UsageError, match="stage"):
        training_memory(**shape, stage="all")


def test_a_spec_is_packed_with_the_stage_options(teacher, monkeypatch, tmp_path) -> None:
    data = pytest.importorskip("linearize.data")
    asked = {}

    def pack(spec, tokenizer, **kwargs):
        asked.update(kwargs, spec=spec)
        return rows()

    monkeypatch.setattr(data, "pack", pack)
    text = str(Path(tmp_path) / "text.txt")
    Path(text).write_text("some text")
    distill(
        student_of(teacher),
        teacher,
        text,
        tokenizer=object(),
        transfer=transfer_options(seed=3),
        isolate=True,
    )
    assert asked == {
        "spec": text, "length": LENGTH, "tokens": 4 * LENGTH * 8,
        "seed": 3, "isolate": True, "text_field": "text",
    }  # fmt: skip
    with pytest.raises(UserError, match="tokenizer"):
        distill(student_of(teacher), teacher, text, transfer=transfer_options())


def test_checkpoints_are_for_those_who_need_them(teacher):
    student = student_of(teacher)
    config = student.config.get_text_config()
    one = graph_bytes(hidden=64, layers=2, tokens=2 * LENGTH, intermediate=config.intermediate_size)
    options = logit_options(batch_size=2)
    assert not wants_checkpoints(student, options, 4 * one) and wants_checkpoints(student, options, 4 * one - 4)
    assert wants_checkpoints(student, options, None)
    for asked in (False, True):
        options = logit_options(batch_size=2, gradient_checkpointing=asked)
        assert all(wants_checkpoints(student, options, free) == asked for free in (None, 0, 2**60))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage,programs,options",
    [
        ("transfer", 1, {}),
        # a program for the student's layers and one for the teacher's; with the windows off another, and one for chunks
        ("logits", 4, {"window_dropout": 0.4, "gradient_checkpointing": False}),
        ("logits", 3, {"gradient_checkpointing": True}),
    ],
)
def test_compiled_layers_train_alike(teacher, stage, programs, options):
    """One program for all layers of a kind, the losses of eager training, and nothing left behind."""
    logs = []
    for compile in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        student = student_of(teacher, "retention")
        shared = {"stage": stage, "batch_size": 2, "max_length": LENGTH, "log_steps": 1, "device": "cpu"}
        student = distill(student, teacher, rows(), compile=compile, **shared, **options)
        logs.append([line["loss"] for line in student.distillation[0].log])
        assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == programs * compile
        assert not torch._dynamo.utils.counters["graph_break"]
        assert all(module._compiled_call_impl is None for model in (student, teacher) for module in model.modules())
    assert len(logs[0]) == 4
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_compiled_hybrid_layers_share_programs(teacher):
    """Which heads are kept is data: layers that keep as many groups run one program."""
    torch._dynamo.reset()
    losses = []
    for compile in (False, True):
        torch._dynamo.utils.counters.clear()
        student = convert(teacher, "linear", window=4, keep_softmax="heads:0.0,0.1,1.2,1.3")
        options = {"stage": "logits", "batch_size": 2, "max_length": LENGTH, "log_steps": 1, "device": "cpu"}
        student = distill(student, teacher, rows(), compile=compile, gradient_checkpointing=False, **options)
        losses.append([line["loss"] for line in student.distillation[0].log])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
def test_compiled_with_isolated_documents(teacher):
    """Positions cannot be looked at in compiled code: the mixers alone are compiled then, and nothing is refused."""
    data = rows()
    for row in data:
        row["position_ids"] = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])
    losses = []
    for stage in ("transfer", "logits"):
        for compile in (False, True):
            torch._dynamo.reset()
            options = {"stage": stage, "batch_size": 2, "max_length": LENGTH, "log_steps": 1, "device": "cpu"}
            student = distill(student_of(teacher, "retention"), teacher, data, compile=compile, **options)
            losses.append([line["loss"] for line in student.distillation[0].log])
    for eager, ours in ((losses[0], losses[1]), (losses[2], losses[3])):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(eager), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["retention", "gated_delta"])
def test_compiled_gradients(teacher, mixer):
    """Of everything that goes into a mixer: inductor once gave the keys a wrong one."""
    torch._dynamo.reset()
    layer = next(iter(student_of(teacher, mixer).mixer_layers()))[1].mixer.double()
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 40, 4, 16), (2, 40, 2, 16), (2, 40, 2, 16), (2, 40, 64), (2, 40, 4, 16)]
    *leaves, seed = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    wanted = [*leaves, *layer.parameters()]
    exact = torch.autograd.grad(layer(*leaves), wanted, seed, allow_unused=True)
    layer.compile()
    for ours, theirs in zip(torch.autograd.grad(layer(*leaves), wanted, seed, allow_unused=True), exact, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_sequences_end_with_the_learned_positions():
    teacher = teacher_of("gpt2")
    room = teacher.config.max_position_embeddings
    ids = torch.randint(3, 128, (room + 1,))
    data = [{"input_ids": ids, "labels": ids}] * 2
    student = convert(teacher, "linear", window=8)
    for stage in ("transfer", "logits"):
        with pytest.raises(UsageError, match=f"--max-length {room + 1} takes .* learned {room} .*give at most {room}$"):
            distill(student, teacher, data, stage=stage, batch_size=2, device="cpu")
