"""What is measured before training: heads that matter, the teacher's attention, and starts that come nearer to it."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import MIXER_NAMES, relative_error, shake, tiny_teacher
from families import teacher_of
from test_data import letters

from linearize.calibrate import CalibrateOptions, calibrate, measure, sequences
from linearize.calibrate.capture import attentions_of, watch
from linearize.calibrate.closed_form import start_from_batch
from linearize.calibrate.probe import probe_of
from linearize.calibrate.scores import _gradient
from linearize.calibrate.statistics import StatisticsOf
from linearize.convert import convert, plan
from linearize.convert.show import format_plan
from linearize.errors import UsageError, UserError
from linearize.modeling import branch_off
from linearize.surgery.keep import Wanted, as_many, kept_heads, parse_auto

WINDOW = 8


def ids(rows=6, length=48, seed=3):
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_probe_is_the_teacher_and_its_window():
    teacher = tiny_teacher()
    probe, tokens = probe_of(teacher, window=WINDOW, sinks=1), ids()
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    student = convert(teacher, "linear", window=WINDOW, sinks=1)
    with branch_off(student, "linear"):
        assert relative_error(probe(tokens).logits, student(tokens).logits) < 1e-5
    for _, attention in probe.mixer_layers():
        attention.mixer.gate.fill_(1.0)
    assert relative_error(probe(tokens).logits, teacher(tokens).logits) < 1e-5


def test_gradient_scores_add_up_to_the_fall_in_kl(monkeypatch):
    """Integrated gradients are complete: over a fine path the scores sum to KL(window alone) - KL(teacher)."""
    from linearize.calibrate import scores as module

    teacher, tokens = tiny_teacher(dtype=torch.float64), ids(4, 24)
    monkeypatch.setattr(module, "POINTS", tuple((i + 0.5) / 16 for i in range(16)))
    monkeypatch.setattr(module, "ROUNDS", 1)
    probe = probe_of(teacher, window=WINDOW, sinks=1)
    found, chosen = _gradient(teacher, probe, tokens, Wanted(False, 1), [True, True])
    twice = tokens.repeat(1, 2)
    with torch.no_grad():
        for _, attention in probe.mixer_layers():
            attention.mixer.gate.zero_()
        p, q = (model(twice).logits.log_softmax(-1) for model in (teacher, probe))
    kl = (p.exp() * (p - q)).sum(-1)[:, :-1].sum() / twice.numel()
    assert float(found.sum()) == pytest.approx(float(kl), rel=2e-2)
    best = int(found.flatten().argmax())
    assert chosen == [(best // 2, best % 2)]


@torch.no_grad()
def test_a_head_that_does_the_work_is_chosen():
    """With the output of all other groups silenced, one group alone can matter, and both methods rank it by that."""
    teacher = tiny_teacher()
    for layer in teacher.model.layers:
        weight = layer.self_attn.o_proj.weight
        keep = torch.zeros_like(weight)
        if layer is teacher.model.layers[1]:
            keep[:, 32:] = 3.0  # heads 2 and 3, key group 1
        weight.mul_(keep)
    found = measure(teacher, ids(2, 24), Wanted(False, 1), window=WINDOW, sinks=1)
    assert found.chosen == [(1, 1)] and found.keep_softmax == "heads:1.2,1.3"
    assert found.scores[0] == [0.0, 0.0] and found.scores[1][0] == 0.0 < found.scores[1][1]
    assert measure(teacher, ids(2, 24), Wanted(True, 1), window=WINDOW, sinks=1).chosen == [(1, 0), (1, 1)]


@pytest.mark.parametrize("method", ["gradient", "induction"])
def test_half_precision_is_scored_in_fp32_on_a_cpu(method):
    """bf16 kernels are several times slower there; the scores are those of the same weights in fp32."""
    tied = tiny_teacher(dtype=torch.bfloat16, tie_word_embeddings=True)
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in tied.state_dict().items()}
    options = {"window": WINDOW, "sinks": 1, "method": method}
    found = measure(tied, ids(4, 24), Wanted(False, 1), **options)
    assert before == {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in tied.state_dict().items()}
    assert found.scores == measure(tied.float(), ids(4, 24), Wanted(False, 1), **options).scores


def test_half_precision_is_calibrated_in_fp32_on_a_cpu():
    teacher = tiny_teacher(dtype=torch.bfloat16)
    rows, options = ids(6, 32), CalibrateOptions(sequences=6, length=32, passes=1)
    student = convert(teacher, "gla", window=WINDOW, calibrate_on=rows, calibrate_options=options)
    half = convert(teacher, "gla", window=WINDOW).bfloat16()  # as one that was loaded
    started = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    calibrate(half, teacher, rows, options)
    wide = convert(teacher.float(), "gla", window=WINDOW, calibrate_on=rows, calibrate_options=options)
    assert student.calibration.trace == wide.calibration.trace
    for name, tensor in wide.state_dict().items():
        assert torch.equal(student.state_dict()[name].float(), tensor), name
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    changed = {name for name, tensor in started.items() if not torch.equal(half.state_dict()[name], tensor)}
    assert len(changed) > 4 and all(".mixer." in name for name in changed)


def test_widened_tensors_need_memory(monkeypatch):
    from linearize.calibrate import widened as module

    model = tiny_teacher(dtype=torch.bfloat16)
    with module.widened(model):
        assert model.dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr(module, "free_memory", lambda: 1000.0)
        with module.widened(model):
            assert model.dtype == torch.bfloat16
    # the same tensors in two models take their memory once
    need = sum(2 * parameter.nbytes for parameter in model.parameters()) / 0.6
    monkeypatch.setattr(module, "free_memory", lambda: 1.1 * need)
    with module.widened(model, convert(model, "linear", window=WINDOW, share_memory=True)):
        assert model.dtype == torch.float32
    # nothing stays widened where memory ends on the way
    taken, whole = [], torch.Tensor.float

    def end(self):
        taken.append(self)
        if len(taken) == 3:
            raise RuntimeError("out of memory")
        return whole(self)

    monkeypatch.setattr(torch.Tensor, "float", end)
    with pytest.raises(RuntimeError, match="out of memory"), module.widened(model):
        pass
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_induction_is_the_attention_to_what_followed():
    teacher, tokens = tiny_teacher(), ids(2, 24)
    found = measure(teacher, tokens, Wanted(False, 2), window=WINDOW, sinks=1, method="induction")
    teacher.set_attn_implementation("eager")
    weights = teacher(tokens.repeat(1, 2), output_attentions=True).attentions
    for layer, attention in enumerate(weights):
        naive = torch.stack([attention[:, :, t, t - 23] for t in range(24, 48)]).mean((0, 1)).view(2, 2).amax(1)
        assert found.scores[layer] == pytest.approx(naive.tolist(), abs=1e-5)
    with pytest.raises(UsageError, match="--keep-score"):
        measure(teacher, tokens, Wanted(False, 2), window=WINDOW, sinks=1, method="guess")


def anatomies(family="llama", **overrides):
    from linearize.surgery.anatomy import read_anatomy

    return read_anatomy(tiny_teacher(family, **overrides))


def test_forms_of_auto():
    ten = anatomies(num_hidden_layers=10)
    assert parse_auto("auto:3", ten) == Wanted(True, 3)
    assert parse_auto("auto:20%", ten) == Wanted(True, 2)
    assert parse_auto("heads:auto:7", ten) == Wanted(False, 7)
    assert parse_auto("heads:auto:10%", ten) == Wanted(False, 2)
    assert parse_auto("heads:auto:0.1%", ten) == Wanted(False, 1)
    for other in (None, "", "every:3", "0,1", "heads:0.1", [1, 2]):
        assert parse_auto(other, ten) is None
    for wrong in ("auto:0", "auto:11", "auto:1.5", "heads:auto:21", "heads:auto:0%", "auto:101%"):
        with pytest.raises(UsageError, match="--keep-softmax"):
            parse_auto(wrong, ten)
    with pytest.raises(UsageError, match="own window"):
        parse_auto("auto:1", anatomies("mistral"))
    with pytest.raises(UsageError, match="measures first"):
        kept_heads("auto:1", ten)
    with pytest.raises(UsageError, match="not understood"):
        kept_heads("auto", ten)
    assert parse_auto("heads:auto:10", ten, 256) == Wanted(False, 10, True)
    with pytest.raises(
        UsageError, match="10 key groups to choose from with --keep-window, which leaves each layer one"
    ):
        parse_auto("heads:auto:11", ten, 256)
    with pytest.raises(UsageError, match="--keep-window bounds heads, and --keep-softmax auto:1 keeps whole layers"):
        parse_auto("auto:1", ten, 256)
    every = kept_heads(as_many(Wanted(False, 10, True), ten), ten)
    assert len(every) == 10 and all(len(heads) == 2 for heads in every.values())
    assert len(as_many(Wanted(True, 3), ten)) == 3
    assert sum(len(heads) for heads in kept_heads(as_many(Wanted(False, 7), ten), ten).values()) == 14


def test_plan_counts_what_auto_leaves():
    config = tiny_teacher(num_hidden_layers=10).config
    whole = plan(config, "linear").kv_bytes_per_token_teacher
    assert plan(config, "linear", keep_softmax="heads:auto:10%").kv_bytes_per_token == whole // 10
    half = plan(config, "linear", keep_softmax="auto:5")
    assert half.kv_bytes_per_token == whole // 2 and half.placeholder == "auto:5"
    assert "auto:5: 50.0% of the KV bytes, measured at the conversion" in format_plan(half)
    least = plan(config, "linear", keep_softmax="heads:auto:0.1%")  # a key group is the least there is
    assert "heads:auto:0.1%: 5.0% of the KV bytes" in format_plan(least)
    assert plan(config, "linear", keep_softmax="every:2").placeholder is None


@torch.no_grad()
def test_statistics_are_the_naive_ones():
    teacher, tokens = tiny_teacher(), ids(2, 30)
    student = convert(teacher, "retention", window=WINDOW, sinks=1)
    attentions = attentions_of(student)
    sums = {layer: StatisticsOf(attention.anatomy, WINDOW, 1) for layer, attention in attentions.items()}
    watch(teacher, attentions, tokens, lambda layer, seen: sums[layer].add(seen))
    teacher.set_attn_implementation("eager")
    weights = teacher(tokens, output_attentions=True).attentions
    for layer, p in enumerate(weights):
        found = sums[layer].found()
        entropy = distance = mass = beyond = 0.0
        for i in range(30):
            row = p[:, :, i, : i + 1].double()
            entropy = entropy - (row * row.log()).sum(-1)
            for j in range(i + 1):
                distance = distance + row[..., j] * (i - j)
                if i - j >= WINDOW and j >= 1:
                    mass = mass + row[..., j]
                    beyond = beyond + row[..., j] * (i - j - WINDOW + 1)
        for name, value in (("entropy", entropy), ("distance", distance), ("far_mass", mass)):
            assert getattr(found, name).tolist() == pytest.approx((value.mean(0) / 30).tolist(), rel=1e-3)
        assert found.far_distance.tolist() == pytest.approx((beyond.mean(0) / mass.mean(0)).tolist(), rel=1e-3)


@pytest.mark.parametrize("name", ["retention", "gla", "mamba2", "gated_delta"])
@pytest.mark.parametrize("gains", [True, False])
def test_scales_are_the_least_squares(name, gains):
    """At the fitted scales no change of them brings the output nearer to the teacher's."""
    teacher, tokens = tiny_teacher(), ids(3, 40)
    student = shake(convert(teacher, name, window=WINDOW, mixer_options={"gains": gains}))
    watch(
        teacher,
        attentions_of(student),
        tokens,
        lambda layer, seen: start_from_batch(attentions_of(student)[layer], seen),
    )
    found = {}

    def error(layer, seen):
        mixer = attentions_of(student)[layer].mixer
        heads = teacher.model.layers[layer].self_attn
        k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (seen.k, seen.v))
        target = torch.nn.functional.scaled_dot_product_attention(
            seen.q.transpose(1, 2), k, v, is_causal=True, scale=heads.scaling
        )
        with torch.enable_grad():
            out = mixer(seen.q, seen.k, seen.v, seen.x)
            loss = (out - target.transpose(1, 2)).square().sum()
            scales = [mixer.linear_scale] if gains else [mixer.linear_scale, mixer.window_scale]
            slopes = torch.autograd.grad(loss, scales)
        found[layer] = float(torch.cat(slopes).abs().max() / target.square().sum())

    watch(teacher, attentions_of(student), tokens, error)
    assert len(found) == 2 and max(found.values()) < 1e-4


@pytest.mark.parametrize("window", [WINDOW, 0])
@pytest.mark.parametrize("name", MIXER_NAMES)
def test_calibration_comes_nearer(name, window):
    teacher = tiny_teacher()
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    options = CalibrateOptions(sequences=12, length=48, batch_size=5, passes=3)
    rows = ids(12)
    plain = convert(teacher, name, window=window)
    student = convert(teacher, name, window=window, calibrate_on=rows, calibrate_options=options)
    assert not student.training and all(p.requires_grad for p in student.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    report = student.calibration
    assert len(report.trace) == 6 and report.tokens == 480
    for layer in report.layers:
        assert layer.calibrated.relative_error < layer.uncalibrated.relative_error
        assert (layer.window_alone is None) == (window == 0)
        assert len(layer.half_lives) == 4 and len(layer.attention["entropy"]) == 4
    tokens = ids(4, seed=9)
    with torch.no_grad():
        target = teacher(tokens).logits.log_softmax(-1)
        near, far = (
            float((target.exp() * (target - model(tokens).logits.log_softmax(-1))).sum(-1).mean())
            for model in (student, plain)
        )
    if window:  # without one, a random teacher's layers come nearer and its logits need not
        assert near < far
    json.dumps(report.to_dict(), allow_nan=False)


def test_kept_heads_are_not_calibrated_away():
    teacher = tiny_teacher()
    options = CalibrateOptions(sequences=6, length=48, passes=1)
    for keep in ("heads:0.1,1.2", [0]):
        student = convert(
            teacher, "linear", window=WINDOW, keep_softmax=keep, calibrate_on=ids(), calibrate_options=options
        )
        assert all(torch.isfinite(parameter).all() for parameter in student.parameters())
        assert len(student.calibration.layers) == len(student.mixer_layers())


@pytest.mark.parametrize("to, own", [("linear", 5e-3), ("gated_delta", 2e-2)])
def test_alignment_has_the_mixers_own_rate(to, own):
    """None given, it is the mixer's; the report says which it was."""
    teacher, tokens = tiny_teacher(), ids()
    reports = []
    for rate in (None, own, 1e-4):
        options = CalibrateOptions(sequences=6, length=48, passes=2, learning_rate=rate)
        student = convert(teacher, to, window=WINDOW, calibrate_on=tokens, calibrate_options=options)
        reports.append(student.calibration)
    unasked, asked, other = reports
    assert unasked.options.learning_rate == own and unasked.trace == asked.trace != other.trace


def test_what_calibration_refuses():
    teacher = tiny_teacher()
    for wrong, flag in (
        ({"sequences": 65}, "sequences"),
        ({"sequences": 2}, "sequences"),
        ({"length": 4}, "length"),
        ({"passes": -1}, "passes"),
    ):
        with pytest.raises(UsageError, match=f"--calibrate-{flag}"):
            CalibrateOptions(**wrong)
    with pytest.raises(UserError, match="too few"):
        calibrate(convert(teacher, "linear"), teacher, ids(2))
    with pytest.raises(UsageError, match="tokenizer"):
        convert(teacher, "linear", calibrate_on="no.jsonl")
    with pytest.raises(UsageError, match="tokenizer"):
        convert(teacher, "linear", keep_softmax="auto:1")
    with pytest.raises(UsageError, match="every layer stays softmax"):
        convert(teacher, "linear", keep_softmax=[0, 1], calibrate_on=ids())
    with pytest.raises(UsageError, match="whole numbers"):
        sequences(torch.zeros(3, 4), None, count=1, length=4)


def test_ids_of_another_vocabulary(tmp_path):
    for rows, token in ((ids() + 100, r"\d+"), (ids() - 200, r"-\d+")):
        for options in ({}, {"keep_softmax": "auto:1"}):
            with pytest.raises(UsageError, match=f"--calibrate: .* token {token}, .* is 0 to 127; give"):
                convert(tiny_teacher(), "linear", calibrate_on=rows, **options)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "zebras " * 400}) + "\n")
    with pytest.raises(UserError, match="belongs to another model"):
        convert(tiny_teacher(vocab_size=20), "linear", calibrate_on=str(tmp_path / "text.jsonl"), tokenizer=letters())


def test_learned_positions_bound_what_is_measured():
    teacher = teacher_of("gpt2")  # with 128
    few = CalibrateOptions(sequences=3, length=128, passes=0)
    convert(teacher, "linear", calibrate_on=ids(3, 140), calibrate_options=few)
    with pytest.raises(UsageError, match=r"--calibrate-length 140 takes 140 positions, .* learned 128 .*at most 128$"):
        convert(teacher, "linear", calibrate_on=ids(3, 140))
    for method in ("gradient", "induction"):
        options = {"keep_softmax": "auto:1", "calibrate_options": few, "keep_score": method}
        assert convert(teacher, "linear", calibrate_on=ids(3, 64), **options).keep_scores.length == 64
        with pytest.raises(UsageError, match=r"--keep-softmax auto:1, .*shown twice, takes 130 positions"):
            convert(teacher, "linear", calibrate_on=ids(3, 65), **options)


def test_a_folder_needs_its_tokenizer_for_text_alone(tmp_path):
    tiny_teacher().save_pretrained(tmp_path)
    assert torch.equal(convert(tmp_path, "linear")(ids()).logits, convert(tiny_teacher(), "linear")(ids()).logits)
    few = CalibrateOptions(sequences=3, length=24, passes=0)
    for keep in (None, "auto:1"):
        assert convert(str(tmp_path), keep_softmax=keep, calibrate_on=ids(3, 24), calibrate_options=few).calibration
    for options in ({"keep_softmax": "auto:1"}, {"calibrate_on": "no.jsonl"}):
        with pytest.raises(UserError, match="has no tokenizer"):
            convert(tmp_path, "linear", **options)


def test_a_wrapped_model_is_told_how_to_be_unwrapped():
    peft, teacher = pytest.importorskip("peft"), tiny_teacher()
    with_adapter = peft.get_peft_model(tiny_teacher(), peft.LoraConfig(target_modules=["q_proj"]))
    for wrapped, advice in (
        (with_adapter, r"PeftModel .*merge its adapter first: model\.merge_and_unload\(\)"),
        (torch.compile(teacher), r"OptimizedModule .*model\._orig_mod"),
        (torch.compile(with_adapter), r"OptimizedModule .*model\._orig_mod"),
        (torch.nn.DataParallel(teacher), r"DataParallel .*model\.module"),
        (teacher.config, "LlamaConfig .*a loaded transformers model, a Hub id or a folder"),
        (None, "NoneType .*a Hub id or a folder"),
    ):
        with pytest.raises(UsageError, match=advice):
            convert(wrapped, "linear")
        if wrapped is not teacher.config:
            with pytest.raises(UsageError, match=advice):
                plan(wrapped, "linear")
    assert convert(with_adapter.merge_and_unload(), "linear").mixer_layers()


def test_convert_writes_what_it_measured(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from linearize.calibrate import text
    from linearize.cli import main
    from linearize.convert import folder

    asked: list[str | None] = []  # the accelerator is taken unasked for what measures, and for nothing else
    monkeypatch.setattr(folder, "chosen_device", lambda device: asked.append(device) or "cpu")
    monkeypatch.setattr(text, "PASSAGES", {"cpu": 2})
    teacher = tmp_path / "teacher"
    tiny_teacher().save_pretrained(teacher)
    letters().save_pretrained(teacher)
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": f"the {i} cats sat on {i * 7} mats. " * 20}) + "\n" for i in range(40)))
    out = tmp_path / "student"
    command = ["convert", str(teacher), "--to", "gla", "--keep-softmax", "heads:auto:25%", "-o", str(out), "--json"]
    extra = [
        "--calibrate",
        str(data),
        "--calibrate-sequences",
        "6",
        "--calibrate-length",
        "64",
        "--calibrate-passes",
        "1",
    ]
    plain = CliRunner().invoke(main, ["convert", str(teacher), "--to", "gla", "-o", str(tmp_path / "plain")])
    assert plain.exit_code == 0 and not asked, plain.output
    result = CliRunner().invoke(main, command + extra)
    assert result.exit_code == 0 and asked == [None], result.output
    scores = json.loads((out / "keep_scores.json").read_text())
    assert len(scores["chosen"]) == 1 and len(scores["scores"]) == 2 and scores["text"] == str(data)
    made = json.loads(result.stdout)
    assert made["kv_bytes_per_token"] * 4 == made["kv_bytes_per_token_teacher"]
    record = json.loads((out / "linearize.json").read_text())
    assert record["calibrated_on"] == str(data) and record["tokens"] == 4 * 64
    assert {path.name for path in out.glob("*.png")} == {"keep_scores.png", "calibration.png"}
    assert len(json.loads((out / "calibration.json").read_text())["layers"]) == 2
    again = CliRunner().invoke(main, [*command[:-3], "-o", str(tmp_path / "b"), "--calibrate", "nowhere.jsonl"])
    assert (
        again.exit_code != 0
        and "--calibrate: there is no file nowhere.jsonl" in again.output
        and not (tmp_path / "b").exists()
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--calibrate-sequences", "8"], "--calibrate-sequences is for --calibrate DATASET"),
        (["--keep-score", "induction"], "--keep-score is for --keep-softmax auto"),
        (["--keep-softmax", "heads:auto:100%", "--calibrate", "text.txt"], "nothing to calibrate"),
        (["--keep-softmax", "0,1", "--calibrate", "text.txt", "--dry-run"], "nothing to calibrate"),
    ],
)
def test_flags_that_would_do_nothing(flags, said, tmp_path, monkeypatch) -> None:
    from click.testing import CliRunner

    from linearize.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 50)
    tiny_teacher(num_hidden_layers=2).save_pretrained("teacher")
    letters().save_pretrained("teacher")
    done = CliRunner().invoke(main, ["convert", "teacher", "--to", "linear", "-o", "out", *flags])
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert not (tmp_path / "out").exists()


def test_bounded_heads_leave_every_layer_a_mixer() -> None:
    """Of two key groups a layer one is kept at most, however high the other scores."""
    teacher = tiny_teacher()
    for method in ("gradient", "induction"):
        found = measure(teacher, ids(2, 24), Wanted(False, 2, True), window=WINDOW, sinks=1, method=method)
        assert [layer for layer, _ in found.chosen] == [0, 1]
    student = convert(
        teacher, "linear", window=WINDOW, keep_softmax="heads:auto:2", keep_window=12, calibrate_on=ids(8, 24)
    )
    assert [attention.softmax_window for _, attention in student.mixer_layers()] == [12, 12]
    assert all(layer["softmax_window"] == 12 for layer in student.config.layers)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"keep_window": 12}, "--keep-window is for heads that stay softmax"),
        ({"keep_window": 1, "keep_softmax": "heads:0.1"}, "--keep-window must be at least 2, got 1"),
        ({"keep_window": 12, "keep_softmax": "0"}, "layer 0 is kept whole, as the teacher's own module"),
        ({"keep_window": 12, "keep_softmax": "heads:1.0,1.1,1.2,1.3"}, "layer 1 is kept whole"),
    ],
)
def test_windows_of_kept_heads_that_cannot_be(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        convert(tiny_teacher(), "linear", **options)
