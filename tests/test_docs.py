"""docs/: every command and snippet runs, page by page in its order, on a tiny teacher; links and verbs exist."""

from __future__ import annotations

import gzip
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from test_cli import rows, teacher_at
from test_source import write_gguf

from linearize.cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"(<!-- not run: [^\n]* -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
FEW = {"--max-length": "80", "--batch-size": "4"}
EVAL = "--context 80 --sequences 2 --recall-passages 1 --recall-length 40 --retrieval-contexts 80 --retrieval-items 1"
# What makes a command small enough for a test, by its verb.
SMALL = {
    "eval": f"{EVAL} --agreement-prompts 1 --device cpu",
    "bench kernels": "--device cpu --tokens 64 --heads 2 --head-dim 16 --ops linear",
    "bench model": "--device cpu --contexts 1,40 --batch 1 --new-tokens 4",
    "distill": "--max-length 80 --batch-size 4 --device cpu",
    "finetune": "--max-length 80 --batch-size 4 --device cpu",
    "run": "--set stages.*.max_length=80 --set stages.*.batch_size=2 --set convert.calibrate_options.sequences=4 "
    "--set convert.calibrate_options.length=100 --device cpu",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return teacher_at(tmp_path_factory.mktemp("docs") / "tiny")


@pytest.fixture
def place(teacher, tmp_path, monkeypatch) -> Path:
    """A folder with the files that the pages name, where the student is there already."""
    monkeypatch.chdir(tmp_path)
    text = [{"text": f"Document {i} says that the sum of {i} and {3 * i} is {4 * i}. " * 4} for i in range(40)]
    for name in ("corpus.jsonl", "heldout.jsonl"):
        raw = rows(tmp_path / name, *text).read_bytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
    said = [[("user", f"{i}+1?"), ("assistant", f"It is {i + 1}.")] for i in range(30)]
    rows(tmp_path / "chats.jsonl", *({"messages": [{"role": a, "content": b} for a, b in turns]} for turns in said))
    (tmp_path / "models").mkdir()
    write_gguf(tmp_path / "models" / "tiny.gguf")
    return tmp_path


def words_of(command: str, teacher: Path) -> tuple[list[str], str | None]:
    """The words after `linearize`, made small, and where stdout goes."""
    command, _, target = command.partition(" > ")
    words = shlex.split(command.replace(MODEL, str(teacher)))
    assert words[0] == "linearize", command
    verb = " ".join(words[1:3]) if words[1] == "bench" else words[1]
    if "--tokens" in words and verb != "bench kernels":
        words[words.index("--tokens") + 1] = "4096" if verb == "run" else "1500"
    small = SMALL.get(verb, "").split()
    if "--calibrate" in words:
        small += ["--calibrate-sequences", "4", "--calibrate-length", "100"]
    return words[1:] + small, target or None


def commands_of(block: str) -> list[str]:
    return [line.split("  #")[0].strip() for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, teacher, place):
    names: dict[str, object] = {}
    blocks = BLOCK.findall(page.read_text())
    if page.stem == "serving":
        CliRunner().invoke(main, ["convert", str(teacher), "--to", "based", "-o", "student"])
    for skipped, language, text in blocks:
        if skipped:
            continue
        if language == "python":
            few = text.replace("tokens=1_000_000", "tokens=1500, max_length=80, batch_size=4, device='cpu'")
            exec(compile(few.replace(MODEL, str(teacher)), str(page), "exec"), names)
            continue
        assert language == "bash"
        for command in commands_of(text):
            words, target = words_of(command, teacher)
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 0, (command, result.output[-2000:])
            if target:
                Path(target).write_text(result.stdout)


def flags_of(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)}


def options_of(words: list[str]) -> tuple[click.Command, set[str]]:
    """The command that the words call, and its flags."""
    command: click.Command = main
    for word in words:
        if isinstance(command, click.Group) and word in command.commands:
            command = command.commands[word]
        else:
            break
    flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    return command, flags


def test_what_is_not_run_is_spelled_as_the_verbs_know_it():
    found = 0
    for page in PAGES:
        for skipped, _, text in BLOCK.findall(page.read_text()):
            for command in commands_of(text) if skipped else []:
                words = shlex.split(command.split(" -m linearize.cli ")[1])
                assert flags_of(words) <= options_of(words)[1], command
                found += 1
    assert found == 2


def test_links_lead_somewhere_and_every_page_is_linked():
    linked = set()
    for page in [*PAGES, ROOT / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            place = (page.parent / target).resolve()
            assert place.exists(), (page, target)
            linked.add(place)
    assert set(PAGES) <= linked


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found.append((*path, name))
        if isinstance(command, click.Group):
            found += every_command(command, (*path, name))
    return found


@pytest.mark.parametrize("verb", every_command(main), ids=" ".join)
def test_help_has_examples_that_the_verb_understands(verb):
    text = CliRunner().invoke(main, [*verb, "--help"], prog_name="linearize", terminal_width=200).output
    examples = re.findall(rf"^  linearize {' '.join(verb)}.*$", text, re.MULTILINE)
    assert examples, text
    for example in examples:
        words = shlex.split(example.split("  #")[0].split(" > ")[0])[1:]
        command, known = options_of(words)
        assert flags_of(words) <= known, example
        for option in command.params:
            if isinstance(option, click.Option) and option.required:
                assert set(option.opts) & set(words), (example, option.opts)


def test_ls_has_a_line_for_each_and_what_to_do_next():
    text = CliRunner().invoke(main, ["ls"]).output
    entries = re.findall(r"^  (\S+) +(\S.*)$", text, re.MULTILINE)
    from linearize import mixers
    from linearize.recipes import shipped
    from linearize.surgery.families import FAMILIES

    assert {name for name, _ in entries} >= {*mixers(), *shipped(), *FAMILIES}
    assert all(line.strip() for _, line in entries)
    assert "next: linearize plan MODEL --to" in text
