"""Train the small teacher that ships in `linearize/demo/teacher`: corpora in, a model and its card out.

    python scripts/train_demo_teacher.py prepare --corpora DIR --out WORK    # CPU: split, tokenizer, tokens
    python scripts/train_demo_teacher.py train --work WORK --out TEACHER     # a CUDA GPU, for --minutes
    python scripts/train_demo_teacher.py card --teacher TEACHER              # README.md from training.json

DIR holds `NAME.jsonl.gz` for each NAME in `demo_teacher_data.CORPORA`, one `{"text": ...}` a line. `prepare`
also writes the two text samples that the demo uses. Needs torch, transformers and numpy.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import demo_teacher_data as data
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from demo_teacher_eval import PASSAGE, PASSAGES, copy_losses, held_out_loss, passages
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPEAT_SHARE = 0.35
REPEAT_LENGTHS = 32, 448
ADJACENT_SHARE = 1 / 3
# Rows of unrelated tokens that repeat with a period: text that recurs can be known by heart, these can only be copied.
# With the text repeats alone (a fifth of the rows, 650M tokens) the second copy was 0.17 nats below the first.
PERIODIC_SHARE = 0.15
PERIODS = 16, 320

LossFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(kw_only=True)
class Recipe:
    """The flags of `train` that shape the result; `lr` is the peak of the schedule."""

    minutes: float = 4.0
    batch: int = 64
    length: int = data.CONTEXT
    lr: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    seed: int = 0


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=data.VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=data.CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def draw_rows(tokens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """[batch, length] random windows of the token stream; REPEAT_SHARE of them say a passage twice, PERIODIC_SHARE
    are tokens drawn one by one that repeat with a period.

    A passage's second copy is put in right after the first or further on; after it the text goes on from where it
    was broken off.
    """
    device = tokens.device

    def uniform() -> torch.Tensor:
        return torch.rand(batch, 1, device=device)

    shortest, longest = REPEAT_LENGTHS
    longest = min(longest, length // 2)
    size = (shortest + (longest - shortest) * uniform()).long()
    first = (uniform() * (length - 2 * size + 1)).long()
    gap = (uniform() * (length - 2 * size - first + 1)).long()
    second = first + size + torch.where(uniform() < ADJACENT_SHARE, 0, gap)
    at = torch.arange(length, device=device)
    back = torch.where(at < second, 0, torch.where(at < second + size, second - first, size))
    kind = uniform()
    start = torch.randint(0, len(tokens) - length, (batch, 1), device=device)
    rows = tokens[start + at - back * (kind < REPEAT_SHARE)]
    period = (PERIODS[0] + (min(PERIODS[1], length // 2) - PERIODS[0]) * uniform()).long()
    drawn = tokens[torch.randint(0, len(tokens), (batch, length), device=device)].gather(1, at % period)
    return torch.where(kind >= 1 - PERIODIC_SHARE, drawn, rows)


def add_dropout(model: LlamaForCausalLM, p: float) -> None:
    """Dropout on the embeddings and on what each block adds to the residual stream: Llama has none there."""

    def drop(module: torch.nn.Module, _: Any, out: torch.Tensor) -> torch.Tensor:
        return F.dropout(out, p, training=module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def next_token_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def learning_rate(progress: float, peak: float, warmup: float = 0.02, floor: float = 0.01) -> float:
    """Linear warmup, then cosine to floor * peak; `progress` is the fraction of the time that has gone."""
    if progress < warmup:
        return peak * max(progress / warmup, floor)
    done = min((progress - warmup) / (1 - warmup), 1.0)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def compiled_loss(model: LlamaForCausalLM, forward_backward: Callable[[LossFn], torch.Tensor]) -> LossFn:
    """Compile each layer in place and the loss, try them, and give the loss; eager if the compiler fails.

    Layer by layer, because one graph then serves all layers and the causal mask stays implicit.
    """
    for layer in model.model.layers:
        layer.compile()
    loss_fn: LossFn = torch.compile(next_token_loss)
    try:
        for _ in range(2):
            forward_backward(loss_fn).item()
    except Exception as error:
        print(f"torch.compile failed, going on without: {type(error).__name__}: {error}", flush=True)
        for layer in model.model.layers:
            layer._compiled_call_impl = None
        return next_token_loss
    return loss_fn


def plain_copy(model: LlamaForCausalLM, *, rounded: bool = False) -> LlamaForCausalLM:
    """An eager fp32 copy without hooks, to evaluate; `rounded`: the weights go through bf16, as they ship."""
    plain = LlamaForCausalLM(model.config).to(model.device).eval()
    plain.load_state_dict(model.state_dict())
    return plain.bfloat16().float() if rounded else plain


@dataclass
class Run:
    """What a training loop leaves behind."""

    steps: int
    seconds: float
    trace: list[dict[str, float]]


def fit(
    model: LlamaForCausalLM,
    step_fn: Callable[[], torch.Tensor],
    probe: Callable[[], dict[str, float]],
    recipe: Recipe,
) -> Run:
    """Train for `recipe.minutes` of wall time, probes not counted.

    The schedule follows the clock: however fast the machine, the last step is taken at the lowest rate.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        betas=(0.9, 0.95),
        fused=model.device.type == "cuda",
    )
    optimizer.zero_grad()
    budget, probing, next_probe, steps = recipe.minutes * 60, 0.0, 0.0, 0
    recent: list[float] = []
    trace: list[dict[str, float]] = []
    started = time.monotonic()
    while (elapsed := time.monotonic() - started - probing) < budget:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed / budget, recipe.lr)
        loss = step_fn()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        steps += 1
        if steps == 1 or steps % 50 == 0:
            row = {"step": steps, "seconds": round(elapsed, 1), "loss": round(sum(recent) / len(recent), 4)}
            recent.clear()
            if elapsed >= next_probe:
                began = time.monotonic()
                row |= probe()
                probing += time.monotonic() - began
                next_probe += budget / 12
                trace.append(row)
            print(json.dumps(row), flush=True)
    return Run(steps, time.monotonic() - started - probing, trace)


def train(args: argparse.Namespace) -> None:
    began = time.monotonic()
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    device = torch.device(args.device)
    torch.manual_seed(recipe.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work)
    tokens = torch.from_numpy(np.load(args.work / "tokens.npy").astype(np.int64)).to(device)
    held_out = torch.from_numpy(np.load(args.work / "heldout.npy").astype(np.int64)).to(device)
    facts = json.loads((args.work / "data.json").read_text())
    model = LlamaForCausalLM(teacher_config(tokenizer)).to(device).train()
    add_dropout(model, recipe.dropout)

    def forward_backward(loss_fn: LossFn) -> torch.Tensor:
        rows = draw_rows(tokens, recipe.batch, recipe.length + 1)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
            hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            loss = loss_fn(hidden, model.lm_head.weight, rows[:, 1:])
        loss.backward()
        return loss.detach()

    compiling = device.type == "cuda" if args.compile is None else args.compile
    loss_fn = compiled_loss(model, forward_backward) if compiling else next_token_loss
    compiled = loss_fn is not next_token_loss
    print(f"ready after {time.monotonic() - began:.0f} s, compiled: {compiled}", flush=True)

    def probe() -> dict[str, float]:
        now = plain_copy(model)
        first, second = copy_losses(now, passages(held_out, tokenizer.eos_token_id))
        loss = held_out_loss(now, held_out, recipe.length)
        return {
            "held_out_loss": round(loss, 4),
            "first_copy": round(first, 4),
            "second_copy": round(second, 4),
        }

    run = fit(
        model,
        lambda: forward_backward(loss_fn),
        probe,
        recipe,
    )
    teacher = plain_copy(model, rounded=True)
    record = {
        **figures(teacher, held_out, facts, recipe.length, tokenizer.eos_token_id),
        "held_out_loss_before_rounding": held_out_loss(plain_copy(model), held_out, recipe.length),
        "steps": run.steps,
        "tokens_seen": run.steps * recipe.batch * recipe.length,
        "training_seconds": round(run.seconds, 1),
        "total_seconds": round(time.monotonic() - began, 1),
        "compiled": compiled,
        "command": "python scripts/train_demo_teacher.py train --work WORK --out TEACHER "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(recipe).items()),
        "recipe": vars(recipe),
        "repeats": {
            "share_of_rows": REPEAT_SHARE,
            "tokens": REPEAT_LENGTHS,
            "adjacent_share": ADJACENT_SHARE,
            "periodic_share": PERIODIC_SHARE,
            "periods": PERIODS,
        },
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "data": facts,
        "trace": run.trace,
    }
    save(teacher, tokenizer, args.work, args.out, record)
    print(json.dumps({name: value for name, value in record.items() if name not in ("trace", "data")}))


def figures(
    model: LlamaForCausalLM, held_out: torch.Tensor, facts: dict[str, Any], length: int, end: int
) -> dict[str, Any]:
    """Parameters, held-out losses (nats a token) and the two copies' losses, as training.json has them."""
    corpora, at = {}, 0
    for source, fact in facts["corpora"].items():
        part = held_out[at : at + fact["held_out_tokens"]]
        at += len(part)
        loss = held_out_loss(model, part, length)
        bits = loss * len(part) / fact["held_out_bytes"] / math.log(2)
        corpora[source] = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}
    loss = held_out_loss(model, held_out, length)
    first, second = copy_losses(model, passages(held_out, end))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": {"loss": loss, "perplexity": math.exp(loss), "tokens": len(held_out), "corpora": corpora},
        "repeated_passage": {"passages": PASSAGES, "tokens": PASSAGE, "first": first, "second": second},
    }


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, work: Path, out: Path, record: dict[str, Any]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model = model.to("cpu", torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    # Written for its owner alone; an installed package must be readable to all.
    (out / "model.safetensors").chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / name, out / name)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def card_text(record: dict[str, Any]) -> str:
    """The model card of what a training.json records."""
    held_out, copies, facts = record["held_out"], record["repeated_passage"], record["data"]
    rows = []
    for source, fact in facts["corpora"].items():
        measured = held_out["corpora"][source]
        rows.append(
            f"| {fact['title']} | {fact['training_documents']} | {fact['training_characters'] / 1e6:.2f} M "
            f"| {fact['held_out_documents']} | {measured['perplexity']:.1f} "
            f"| {measured['bits_per_byte']:.2f} |"
        )
    template = Path(__file__).with_name("demo_teacher_card.md").read_text()
    return template.format(
        parameters=record["parameters"] / 1e6,
        corpora="\n".join(rows),
        training_tokens=facts["training_tokens"] / 1e6,
        held_out_share=data.HELD_OUT_SHARE,
        max_overlap=data.HELD_OUT_MAX_OVERLAP,
        repeat_share=record["repeats"]["share_of_rows"],
        adjacent_share=record["repeats"]["adjacent_share"],
        repeat_shortest=record["repeats"]["tokens"][0],
        repeat_longest=record["repeats"]["tokens"][1],
        periodic_share=record["repeats"]["periodic_share"],
        period_shortest=record["repeats"]["periods"][0],
        period_longest=record["repeats"]["periods"][1],
        held_out_tokens=held_out["tokens"],
        loss=held_out["loss"],
        perplexity=held_out["perplexity"],
        passage=copies["tokens"],
        passages=copies["passages"],
        first=copies["first"],
        second=copies["second"],
        steps=record["steps"],
        tokens_seen=record["tokens_seen"] / 1e6,
        epochs=record["tokens_seen"] / facts["training_tokens"],
        seconds=record["training_seconds"],
        hardware=record["hardware"],
        command=record["command"],
        **{name: record["recipe"][name] for name in ("length", "batch", "lr", "weight_decay", "dropout")},
        **record["versions"],
    )


def arguments() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    verbs = parser.add_subparsers(required=True)

    verb = verbs.add_parser("prepare", help="split the corpora, make the tokenizer, write tokens and samples")
    verb.add_argument("--corpora", type=Path, required=True)
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--text-out", type=Path, default=Path("linearize/demo/text"))
    verb.set_defaults(run=lambda args: print(json.dumps(data.prepare(args.corpora, args.out, args.text_out))))

    verb = verbs.add_parser("train", help="train on the prepared tokens, evaluate on the held-out ones")
    verb.add_argument("--work", type=Path, required=True)
    verb.add_argument("--out", type=Path, required=True)
    for field in fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        verb.add_argument(flag, type=type(field.default), default=field.default)
    verb.add_argument("--device", default="cuda")
    verb.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA only")
    verb.set_defaults(run=train)

    verb = verbs.add_parser("card", help="write README.md from training.json")
    verb.add_argument("--teacher", type=Path, required=True)
    verb.set_defaults(run=write_card)
    return parser


def write_card(args: argparse.Namespace) -> None:
    record = json.loads((args.teacher / "training.json").read_text())
    (args.teacher / "README.md").write_text(card_text(record))


if __name__ == "__main__":
    options = arguments().parse_args(sys.argv[1:])
    options.run(options)
