"""The figures of `evaluate` are those of a naive computation, and generation goes on from a prompt."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_teacher
from families import config_of
from test_data import CHATML, END, letters
from torch import nn
from transformers import AutoModelForCausalLM

from linearize.errors import UsageError, UserError
from linearize.evaluate import evaluate, format_results, generate_text, generation, scoring
from linearize.evaluate.scoring import Scorer

TEXT = [{"text": f"the {i} cats sat on {i * 7} mats. why? " * 6} for i in range(20)]
SMALL = {"context": 32, "sequences": 6, "batch_size": 4, "recall_passages": 5, "recall_length": 16}


def other_teacher() -> nn.Module:
    """As `tiny_teacher`, with other weights."""
    model = tiny_teacher()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def tokens(count: int) -> torch.Tensor:
    tokenizer = letters()
    joined = [i for row in TEXT for i in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(joined[:count])


@torch.no_grad()
def naive_nll(model: nn.Module, ids: torch.Tensor, first: int = 1, last: int | None = None) -> float:
    log = model(input_ids=ids).logits.double().log_softmax(-1)[:, :-1]
    losses = -log.gather(-1, ids[:, 1:, None])[..., 0]
    return float(losses[:, first - 1 : None if last is None else last - 1].mean())


@pytest.mark.parametrize("block", [1 << 24, 128 * 7])  # the second: chunks of 7 tokens, cut anywhere
@pytest.mark.parametrize("whole_logits", [False, True])
def test_figures_are_the_naive_ones(monkeypatch, block, whole_logits):
    monkeypatch.setattr(scoring, "_BLOCK", block)
    if whole_logits:
        monkeypatch.setattr(scoring, "_same", lambda *args: False)
    student, teacher = tiny_teacher(), other_teacher()
    result = evaluate(student, teacher, tokenizer=letters(), dataset=TEXT, **SMALL)
    ids = tokens(6 * 32).reshape(6, 32)
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (teacher, student))
    assert result["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    for role, model in (("student", student), ("teacher", teacher)):
        assert result["perplexity"][role] == pytest.approx(math.exp(naive_nll(model, ids)), rel=1e-5)
        twice = tokens(5 * 16).reshape(5, 16).repeat(1, 2)
        assert result["recall"][role] == pytest.approx(naive_nll(model, twice, 16, 32), rel=1e-5)
        assert result["recall"]["first_copy"][role] == pytest.approx(naive_nll(model, twice, 1, 16), rel=1e-5)
    ratio = result["perplexity"]["student"] / result["perplexity"]["teacher"]
    assert result["perplexity"]["ratio"] == pytest.approx(ratio)
    assert (result["tokens"], result["sequences"], result["recall_passages"]) == (192, 6, 5)
    assert result["linear_off"] is None
    json.dumps(result, allow_nan=False)


def test_a_model_beside_itself():
    model = tiny_teacher()
    result = evaluate(model, model, tokenizer=letters(), dataset=TEXT, **SMALL)
    assert result["kl"] == 0.0 and result["perplexity"]["ratio"] == 1.0
    assert not Scorer.of(model).whole_logits


def test_several_data_sets_are_a_geometric_mean():
    student, teacher = tiny_teacher(), other_teacher()
    sets = {"a": TEXT[:10], "b": TEXT[10:]}
    result = evaluate(student, teacher, tokenizer=letters(), dataset=sets, **SMALL)
    one, two = result["datasets"]
    assert [one["name"], two["name"]] == ["a", "b"] and result["tokens"] == 384
    for key in ("student", "teacher", "ratio"):
        mean = math.sqrt(one["perplexity"][key] * two["perplexity"][key])
        assert result["perplexity"][key] == pytest.approx(mean)
    assert result["kl"] == pytest.approx((one["kl"] + two["kl"]) / 2)
    alone = evaluate(student, teacher, tokenizer=letters(), dataset=TEXT[10:], **SMALL)
    assert alone["kl"] == pytest.approx(two["kl"]) and alone["kl"] != pytest.approx(one["kl"])


def test_files_given_together_are_evaluated_each(tmp_path):
    for name, rows in (("a", TEXT[:10]), ("b", TEXT[10:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    for dataset in (spec, spec.split(",")):
        result = evaluate(tiny_teacher(), tokenizer=letters(), dataset=dataset, **SMALL)
        assert [entry["name"] for entry in result["datasets"]] == spec.split(",")


class Copying(nn.Module):
    """Sure of the token that followed this one the last time; undecided where it has not been seen, or always."""

    def __init__(self, undecided: bool = False) -> None:
        super().__init__()
        self.undecided = undecided
        self.config = SimpleNamespace(vocab_size=64)
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, use_cache=False):
        logits = torch.zeros(*input_ids.shape, 64)
        for b, row in enumerate(input_ids.tolist() if not self.undecided else []):
            followed: dict[int, int] = {}
            for t, token in enumerate(row):
                if t:
                    followed[row[t - 1]] = token
                if token in followed:
                    logits[b, t, followed[token]] = 50.0
        return SimpleNamespace(logits=logits)


def test_recall_knows_a_model_that_copies():
    once = [{"text": "abcdefghijklmno"}, {"text": "pqrstuvwxyz0123"}]  # no token twice in a passage, end token included
    options = {**SMALL, "context": 16, "sequences": 1, "recall_passages": 2}
    result = evaluate(Copying(), Copying(undecided=True), tokenizer=letters(), dataset=once, **options)
    # The first token of the second copy follows the end token, which is seen for the first time.
    assert result["recall"]["student"] == pytest.approx(math.log(64) / 16, abs=1e-6)
    assert result["recall"]["teacher"] == pytest.approx(math.log(64), abs=1e-6)
    assert result["recall"]["first_copy"]["student"] == pytest.approx(math.log(64), abs=1e-6)
    assert result["perplexity"]["teacher"] == pytest.approx(64, rel=1e-5)


def test_linear_branch_off():
    convert = pytest.importorskip("linearize.convert").convert
    mixer = pytest.importorskip("linearize.modeling.mixer")
    teacher = tiny_teacher()
    student = convert(teacher, "linear", window=8, sinks=1)
    student.train()
    result = evaluate(student, teacher, tokenizer=letters(), dataset=TEXT, **SMALL)
    off = result["linear_off"]
    with mixer.branch_off(student, "linear"):
        bare = evaluate(student, teacher, tokenizer=letters(), dataset=TEXT, branches=False, **SMALL)
    assert bare["linear_off"] is None
    for key in ("kl", "perplexity", "recall"):
        assert off[key] == bare[key] != result[key]
    assert result["datasets"][0]["linear_off"]["kl"] == off["kl"]
    assert student.training and not teacher.training  # both as they were
    table = format_results({"student": result})
    assert [line.split("  ")[0] for line in table.splitlines()[2:]] == [
        "teacher",
        "student",
        "student, linear branch off",
    ]
    windowless = convert(teacher, "linear", window=0)
    assert evaluate(windowless, teacher, tokenizer=letters(), dataset=TEXT, **SMALL)["linear_off"] is None


def test_less_text_than_asked_for_is_said():
    result = evaluate(tiny_teacher(), tokenizer=letters(), dataset=TEXT[:1], **{**SMALL, "sequences": 1000})
    length = len(letters()(TEXT[0]["text"])["input_ids"]) + 1
    assert result["sequences"] == length // 32 and result["tokens"] == length // 32 * 32
    assert result["perplexity"]["teacher"] is None and result["kl"] is None
    short = evaluate(tiny_teacher(), tokenizer=letters(), dataset=TEXT[:1], **{**SMALL, "recall_length": 10_000})
    assert short["recall"] == {"student": None, "teacher": None, "first_copy": {"student": None, "teacher": None}}
    assert "-" in format_results({"x": short})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dataset": [{"text": "short"}]}, UserError, r"holds 6 tokens.*--context 32"),
        ({"teacher": tiny_teacher(vocab_size=130)}, UserError, "vocabularies differ.*128.*130"),
        ({"context": 1}, UsageError, "--context"),
        ({"sequences": 0}, UsageError, "--sequences"),
        ({"batch_size": 0}, UsageError, "--batch-size"),
    ],
)
def test_refusals(options, kind, message):
    with pytest.raises(kind, match=message):
        evaluate(tiny_teacher(), **{"tokenizer": letters(), "dataset": TEXT, **SMALL, **options})


def learned(name: str, positions: int) -> nn.Module:
    """A model that has learned so many positions."""
    config = config_of(name)
    config.vocab_size, config.max_position_embeddings = 48, positions
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo"])  # the last is not converted, and evaluated all the same
def test_learned_positions_have_an_end(name):
    given = {"tokenizer": letters(), "dataset": TEXT, **SMALL, "context": 96, "recall_length": 48}
    model = learned(name, 96)
    assert evaluate(model, model, **given, agreement_prompts=2)["kl"] == 0.0
    assert evaluate(model, **{**given, "recall_length": 49, "recall_passages": 0})["context"] == 96
    for options, message in (
        ({"context": 97}, r"--context 97 takes 97 positions, and the model has learned 96 .*give at most 96$"),
        ({"recall_length": 49}, r"--recall-length 49, shown twice, takes 98 positions.*give at most 48$"),
    ):
        for pair in ((model, None), (tiny_teacher(vocab_size=48), model)):
            with pytest.raises(UsageError, match=message):
                evaluate(*pair, **{**given, **options})
    short = learned(name, 94)
    with pytest.raises(UsageError, match="--agreement-prompts 2 takes 95 positions"):
        evaluate(short, short, **{**given, "context": 94, "recall_length": 47}, agreement_prompts=2)


def test_positions_of_a_student_are_its_teachers():
    convert = pytest.importorskip("linearize.convert").convert
    options = {"tokenizer": letters(), "dataset": TEXT, **SMALL}
    for keep in (None, [0, 1]):
        student = convert(learned("gpt2", 32), "linear", keep_softmax=keep)
        assert evaluate(student, **options)["context"] == 32
        with pytest.raises(UsageError, match="--context 33"):
            evaluate(student, **{**options, "context": 33})
    for name in ("llama", "bloom"):  # past what a config names, or where it names nothing, there are positions
        assert evaluate(learned(name, 16), **options)["context"] == 32


def test_a_foreign_tokenizer_and_broken_weights_are_said():
    with pytest.raises(UserError, match="belongs to another model"):
        evaluate(tiny_teacher(vocab_size=20), tokenizer=letters(), dataset=TEXT, **SMALL)
    broken = tiny_teacher()
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="is nan"):
        evaluate(broken, tokenizer=letters(), dataset=TEXT, **SMALL)


def test_table_lines_up():
    model = tiny_teacher()
    result = evaluate(other_teacher(), model, tokenizer=letters(), dataset=TEXT, **SMALL)
    lines = format_results({"swapped": result, "distilled and more": result}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["teacher", "swapped", "distilled"]
    assert len({len(line) for line in lines}) == 1
    assert f"{result['kl']:.3f}" in lines[3]


# Generation


def test_greedy_text_is_the_models_own():
    model, tokenizer = tiny_teacher(vocab_size=48), letters()
    ids = torch.tensor([tokenizer("the cat")["input_ids"]])
    model.generation_config.eos_token_id = None
    expected = []
    with torch.no_grad():
        for _ in range(12):
            token = int(model(input_ids=ids).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            expected.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    stream = io.StringIO()
    found = generate_text(model, tokenizer, "the cat", max_new_tokens=12, stream=stream)
    assert found == tokenizer.decode(expected, skip_special_tokens=True)
    assert stream.getvalue().strip() == found.strip()


def test_sampling_follows_the_seed_and_leaves_no_trace():
    model, tokenizer = tiny_teacher(vocab_size=48), letters()
    state = torch.random.get_rng_state()
    draws = [generate_text(model, tokenizer, "a", temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_prompts(monkeypatch):
    model, seen = tiny_teacher(vocab_size=48), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: (seen.append(kw["input_ids"][0].tolist()), generate(**kw))[1])
    generate_text(model, letters(CHATML), "hi", chat=True, max_new_tokens=1)
    generate_text(model, letters(), "", max_new_tokens=1)
    assert letters().decode(seen[0]) == f"<sys>be brief{END}\n<user>\nhi{END}\n<assistant>\n"
    assert seen[1] == [letters().eos_token_id]
    with pytest.raises(UserError, match="no chat template"):
        generate_text(model, letters(), "hi", chat=True)
    with pytest.raises(UsageError, match="--max-new-tokens"):
        generate_text(model, letters(), "hi", max_new_tokens=0)
    with pytest.raises(UsageError, match="--temperature"):
        generate_text(model, letters(), "hi", temperature=-1)


def test_text_ends_with_the_learned_positions(monkeypatch):
    monkeypatch.setattr(generation, "end_tokens", lambda *args: None)
    model, tokenizer, prompt = learned("gpt2", 32), letters(), "the cat"
    model.generation_config.eos_token_id = None
    room = 32 - len(tokenizer(prompt)["input_ids"]) + 1  # the last token is not read
    generate_text(model, tokenizer, prompt, max_new_tokens=room)
    with pytest.raises(UsageError, match=rf"--max-new-tokens {room + 1} .* learned 32 .*give at most {room}$"):
        generate_text(model, tokenizer, prompt, max_new_tokens=room + 1)
    with pytest.raises(UsageError, match=r"PROMPT takes 33 positions.*shorten it"):
        generate_text(model, tokenizer, "a" * 33, max_new_tokens=1)
