"""Students of every mixer and recipe beside their teacher: each as `linearize run` trains it and `eval` judges it.

    python benchmarks/quality.py --teacher MODEL --train text.jsonl.gz --heldout prose.jsonl.gz,tales.jsonl.gz \
        --students mixers,hybrids --tokens 10000000 --jobs 4 --out benchmarks/results/quality-smollm2.json

A student is a line of STUDENTS, or of a JSON file of such lines: a recipe and what is set in it. `--rates` trains
each once for every factor, which multiplies the learning rates of all its stages; `--rates search` takes 1 and 3, and
then 10 or 1/3, which lies beyond the one with the lower KL. Rows of others that OUT holds stay; `--fill` trains only
what it does not hold.
With `--jobs` several train at once on one device; their seconds are then longer than alone. A row is written when
its perplexity, KL and recall are known, and again when the slower figures are. `--quick` leaves those out, and the
figures with a branch off.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from linearize.bench.record import header
from linearize.device import chosen_device
from linearize.recipes.recipe import load

MIXERS = ("linear", "based", "retention", "gla", "mamba2", "gated_delta")
Settings = dict[str, Any]
START = "start"  # the default recipe's conversion, and none of its stages
# group -> recipe and settings of each student
STUDENTS: dict[str, list[tuple[str, Settings]]] = {
    "starts": [(START, {"convert.to": mixer}) for mixer in MIXERS],
    "mixers": [("default", {"convert.to": mixer}) for mixer in MIXERS],
    "no-window": [("default", {"convert.to": mixer, "convert.window": 0, "convert.sinks": 0}) for mixer in MIXERS],
    # The windows alone, trained alike: all of the tokens on logits, as transfer has nothing to teach them.
    "control": [
        (
            "default",
            {
                "stages.logits.linear_branch": False,
                "stages.logits.share": 1e6,
                "stages.transfer.share": 1e4,
            },
        )
    ],
    "hybrids": [
        ("default", {"convert.keep_softmax": keep}) for keep in ("heads:auto:9", "heads:auto:5", "auto:6", "every:5")
    ],
    # No unbounded softmax: the heads that recall see the last 512 or 2048 tokens.
    "bounded": [
        ("default", {"convert.keep_softmax": "heads:auto:9", "convert.keep_window": keys}) for keys in (512, 2048)
    ],
    # The published ones, and ours at each one's window and KV bytes: 64 keys and none, neither, 8 of 30 layers whole.
    "recipes": [
        *((name, {}) for name in ("mohawk", "mamba-in-llama", "halo", "radlads", "lolcats", "liger")),
        ("default", {}),
        ("default", {"convert.to": "gla", "convert.window": 0, "convert.sinks": 0}),
        (
            "default",
            {"convert.to": "gla", "convert.window": 0, "convert.sinks": 0, "convert.keep_softmax": "auto:8"},
        ),
    ],
}
# Stages that are worth the minute that a program takes: many steps, of kinds and lengths that compile.
COMPILED, COMPILED_TOKENS, COMPILED_LENGTH = ("transfer", "logits"), 1_000_000, 2048


def run(words: list[str], log: Path) -> tuple[int, str]:
    """Exit code and stdout of `linearize WORDS`; stderr goes to `log`."""
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "linearize.cli", *words], stdout=subprocess.PIPE, stderr=file, text=True
        )
    return done.returncode, done.stdout


def told(settings: Settings, options: argparse.Namespace) -> list[str]:
    """KEY=VALUE of a student's settings, and then of those for every student."""
    return [*(f"{key}={value}" for key, value in settings.items()), *options.set]


def at_rate(recipe: str, settings: Settings, factor: float, options: argparse.Namespace) -> Settings:
    """`settings`, and the learning rate of each stage times `factor`."""
    if factor == 1 or recipe == START:
        return settings
    stages = load(recipe, told(settings, options), dataset=options.train, tokens=options.tokens).stages
    rates = {f"stages.{stage.name}.learning_rate": stage.options.learning_rate * factor for stage in stages}
    return {**settings, **{name: float(f"{rate:.3g}") for name, rate in rates.items()}}


def with_compiled(recipe: str, settings: Settings, options: argparse.Namespace) -> Settings:
    """`settings`, and compilation of the stages that gain from it."""
    if recipe == START:
        return settings
    stages = load(recipe, told(settings, options), dataset=options.train, tokens=options.tokens).stages
    gain = {
        f"stages.{stage.name}.compile": True
        for stage in stages
        if stage.kind in COMPILED
        and (stage.options.tokens or 0) >= COMPILED_TOKENS
        and stage.options.max_length <= COMPILED_LENGTH
    }
    return {**gain, **settings}


def trained(recipe: str, settings: Settings, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """A student's folder and what `linearize run --json` said of it. Raises RuntimeError with the error's last line."""
    parts = (f"{key.removeprefix('stages.').removeprefix('convert.')}_{value}" for key, value in settings.items())
    name = re.sub(r"[^\w.-]+", "", "-".join([recipe, *parts]))
    out, log = options.work / name, options.work / f"{name}.log"
    done = out.with_name(f"{name}.run.json")
    if not done.exists():  # else trained in a run before this one, which was stopped in its evaluation
        gguf = ["--gguf-file", options.gguf_file] if options.gguf_file else []
        model = [options.teacher, *gguf, "--device", options.device]
        began = time.monotonic()
        if recipe == START:
            code, text = start(settings, model, out, options, log)
        else:
            sets = [word for given in told(settings, options) for word in ("--set", given)]
            training = ["--dataset", options.train, "--tokens", str(options.tokens), "--resume", "--json"]
            code, text = run(["run", recipe, *model, "-o", str(out), *training, *sets], log)
        if code:
            raise RuntimeError(log.read_text().strip().splitlines()[-1])
        done.write_text(json.dumps(json.loads(text) | {"seconds": time.monotonic() - began}))
    return out, json.loads(done.read_text())


def start(settings: Settings, model: list[str], out: Path, options: argparse.Namespace, log: Path) -> tuple[int, str]:
    """The conversion that the default recipe begins with; its exit code, and what `run` would tell of it."""
    convert = load("default", told(settings, options), dataset=options.train).convert
    words = ["--to", convert["to"], "--window", str(convert["window"]), "--sinks", str(convert["sinks"])]
    for name, value in convert.get("mixer_options", {}).items():
        words += ["--feature-map", str(value)] if name == "feature_map" else ["--mixer-option", f"{name}={value}"]
    for name, value in convert.get("calibrate_options", {}).items():
        words += [f"--calibrate-{name}", str(value)]
    code, _ = run(["convert", *model, "-o", str(out), "--overwrite", *words, "--calibrate", options.train], log)
    seen = 0 if code else json.loads((out / "calibration.json").read_text())["tokens"]
    return code, json.dumps({"recipe": {"convert": convert}, "tokens": seen, "stages": []})


_judge: dict[str, Any] = {}  # of a judging process: the teacher, and what is known of it


def judge(out: Path, options: argparse.Namespace, whole: bool) -> dict[str, Any]:
    """Figures of the student in the folder `out`: the losses, or the rest of them."""
    from linearize.evaluate import evaluate
    from linearize.source import ModelSource, load_model, load_tokenizer

    if not _judge:
        source = ModelSource(options.teacher, gguf_file=options.gguf_file)
        _judge["teacher"] = load_model(source, device=options.device)
        _judge["figures"] = {}
    source = ModelSource(str(out))
    student = load_model(source, device=options.device)
    slow = {
        "retrieval_contexts": options.retrieval,
        "agreement_prompts": options.agreement,
        "tasks": options.tasks or "",
        "branches": (),
    }
    return evaluate(
        student,
        _judge["teacher"],
        tokenizer=load_tokenizer(source),
        dataset=options.heldout.split(","),
        sequences=options.sequences,
        batch_size=options.batch_size,
        device=options.device,
        teacher_figures=_judge["figures"],
        **(slow if whole else {"branches": () if options.quick else True}),
    )


def losses_row(recipe: str, settings: Settings, made: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    convert = made["recipe"]["convert"]
    return {
        "recipe": recipe,
        "mixer": convert["to"],
        "window": convert.get("window", 64),
        "keep_softmax": convert.get("keep_softmax"),
        "keep_window": convert.get("keep_window"),
        "tokens": made["tokens"],
        "ppl_ratio": found["perplexity"]["ratio"],
        "kl": found["kl"],
        "recall": found["recall"]["student"],
        "recall_teacher": found["recall"]["teacher"],
        "retrieval": None,
        "kv_share": found.get("kv_share"),
        "state_bytes": found.get("state_bytes"),
        "seconds": round(made["seconds"], 1),
        "stages": [{key: stage[key] for key in ("name", "tokens", "seconds", "loss")} for stage in made["stages"]],
        "settings": settings,
        **{name: brief(found[name]) for name in ("linear_off", "window_off", "window_alone") if found.get(name)},
        "by_position": found["by_position"],
    }


def brief(found: dict[str, Any]) -> dict[str, float]:
    return {"ppl_ratio": found["perplexity"]["ratio"], "kl": found["kl"], "recall": found["recall"]["student"]}


def key(row: dict[str, Any]) -> str:
    return json.dumps([row["recipe"], lasting(row["settings"]), row.get("tokens")], sort_keys=True)


def lasting(settings: Settings) -> Settings:
    """Without what changes the time alone."""
    return {name: value for name, value in settings.items() if not name.endswith((".compile", ".cuda_graph"))}


def held(rows: list[dict[str, Any]], recipe: str, settings: Settings, tokens: int) -> dict[str, Any] | None:
    """The row of this student, trained on as many tokens but for what fills no step, and evaluated."""
    for row in rows:
        same = row["recipe"] == recipe and lasting(row["settings"]) == lasting(settings)
        if same and "kl" in row and (recipe == START or abs(row["tokens"] / tokens - 1) < 0.02):
            return row
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--train", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--tasks", help="local task files")
    parser.add_argument("--students", default="mixers", help=f"some of {','.join(STUDENTS)}, or a JSON file")
    parser.add_argument("--only", default="", help="students whose settings or recipe contain this text")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE for every student")
    parser.add_argument("--rates", default="1", help="factors of all learning rates, comma-separated, or search")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--retrieval", default="512,1024,2048")
    parser.add_argument("--agreement", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="the stages that gain from it")
    parser.add_argument("--fill", action="store_true", help="leave out the students that OUT holds")
    parser.add_argument("--device", default="")
    parser.add_argument("--batch-size", type=int, default=8, help="of the evaluation")
    parser.add_argument("--quick", action="store_true", help="perplexity, KL and recall alone")
    parser.add_argument("--jobs", type=int, default=1, help="students that train at once")
    parser.add_argument("--judges", type=int, default=1, help="processes that evaluate what was trained")
    parser.add_argument("--work", type=Path, default=Path("quality.work"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.device = chosen_device(options.device or None)

    options.work.mkdir(parents=True, exist_ok=True)
    given = [",".join(Path(p).name for p in part.split(",")) if "/" in part else part for part in sys.argv[1:]]
    results = header(["python", "benchmarks/quality.py", *given], options.device) | {"rows": []}
    old = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    origin = {name: results[name] for name in ("commit", "command", "time")} | {"jobs": options.jobs}
    chosen = [
        entry
        for group in options.students.split(",")
        for entry in (STUDENTS[group] if group in STUDENTS else json.loads(Path(group).read_text()))
    ]
    chosen = [(recipe, settings) for recipe, settings in chosen if options.only in f"{recipe} {settings}"]
    if options.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    lock = threading.Lock()

    def keep(row: dict[str, Any]) -> None:
        nonlocal old
        with lock:
            names = ("recipe", "settings", "kl", "ppl_ratio", "recall", "error", "retrieval", "tasks")
            print(json.dumps({name: row[name] for name in names if row.get(name)}), flush=True)
            old = [*(other for other in old if key(other) != key(row)), row | origin]
            results["rows"] = old
            options.out.parent.mkdir(parents=True, exist_ok=True)
            partial = options.out.with_suffix(".part")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(options.out)

    def student(recipe: str, settings: Settings) -> None:
        if options.rates != "search":
            for factor in options.rates.split(","):
                at(recipe, settings, float(factor))
            return
        published, higher = at(recipe, settings, 1), at(recipe, settings, 3)
        at(recipe, settings, 10 if higher < published else 1 / 3)

    def at(recipe: str, settings: Settings, factor: float) -> float:
        """The KL of the student that is trained at `factor` times its learning rates; its row is kept."""
        settings = at_rate(recipe, settings, factor, options)
        whole = settings | dict(text.split("=", 1) for text in options.set)
        if options.fill and (row := held(old, recipe, whole, options.tokens)):
            return float(row["kl"])
        if options.compile:
            settings = with_compiled(recipe, settings, options)
            whole = settings | whole
        try:
            with gate:
                out, made = trained(recipe, settings, options)
            row = losses_row(recipe, whole, made, judges.submit(judge, out, options, False).result()) | {"rate": factor}
            keep(row)
            if not options.quick:
                found = judges.submit(judge, out, options, True).result()
                keep(row | {name: found[name] for name in ("retrieval", "agreement", "tasks") if found.get(name)})
            return float(row["kl"])
        except Exception as error:  # one student's error is no other's
            keep({"recipe": recipe, "settings": whole, "tokens": None, "error": f"{type(error).__name__}: {error}"})
            return float("inf")

    gate = threading.Semaphore(options.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.judges, spawn) as judges, ThreadPoolExecutor(max(len(chosen), 1)) as pool:
        for done in as_completed([pool.submit(student, *entry) for entry in chosen]):
            done.result()


if __name__ == "__main__":
    main()
