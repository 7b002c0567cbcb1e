"""The model card: what it says of a student, and what it does not guess."""

from __future__ import annotations

import json
import re

import huggingface_hub.constants
import pytest
from families import config_of
from hub_server import REPO, record_of
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import linearize
from linearize.demo import teacher_folder
from linearize.hub import facts, front_matter
from linearize.hub.teacher import Teacher, inherited, teacher_of
from linearize.surgery.anatomy import meta_model
from linearize.surgery.student import student_config

pytest_plugins = ["hub_server"]  # its fixtures


def test_card_of_a_trained_student(out):
    card = linearize.push(out, REPO, dry_run=True).card
    fields = ModelCard(card).data.to_dict()
    [index] = fields.pop("model-index")
    [measured] = index["results"]
    assert index["name"] == "student" and measured["metrics"][0]["type"] == "perplexity"
    assert measured["dataset"] == {"name": "heldout.jsonl.gz", "type": "text"}
    assert fields == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": "en",
        "tags": ["linearize", "linear-attention", "gla"],
    }
    judged = json.loads((out / "evaluation.json").read_text())
    ratio = f"{judged['perplexity']['ratio']:.4g}"
    assert f"| **this model** | {judged['perplexity']['student']:.4g} | {ratio} | {judged['kl']:.4g} |" in card
    assert "| linear branch off |" in card and "| window off |" in card
    record = json.loads((out / "linearize.json").read_text())
    took = f"{record['seconds']['transfer']:.0f} s | {record['hardware']}"
    assert re.search(rf"\| transfer \| train.jsonl.gz \| 512 \| 2 \| 0.01 \| [\d.]+ \| {took} \|", card)
    assert "of heldout.jsonl.gz in sequences of 128" in card
    assert "| mixer `gla` | layers 0-7 |" in card and "| window, keys of exact softmax | 64 |" in card
    assert "| stays softmax | nothing beside the window |" in card
    assert "Not measured: retrieval, agreement of greedy text, tasks, speed." in card
    assert "trust_remote_code=True" in card and "import linearize" in card
    assert f"linearize {linearize.__version__}" in card
    assert str(out) not in card and str(teacher_folder()) not in card  # nothing of the machine that made it


def test_card_of_a_conversion_alone(plain):
    card = linearize.push(plain, REPO, dry_run=True).card
    assert "Not measured: this folder has no evaluation" in card
    assert "Converted, and not trained since" in card
    assert "Not measured: perplexity, KL from the teacher, recall, retrieval" in card
    weights = load_file(plain / "model.safetensors")
    total = sum(tensor.numel() for tensor in weights.values())
    new = sum(tensor.numel() for name, tensor in weights.items() if ".mixer." in name)
    assert f"{total:,}, of them new {new:,}; bfloat16" in card


def test_card_of_a_hybrid(made):
    pushed = linearize.push(made / "hybrid", REPO, dry_run=True)
    assert "query heads 5.2, 7.6 (layer.head), which see the last 128 keys: 2 of 32 key groups" in pushed.card
    assert "| sinks, first tokens always visible | 4 |" in pushed.card and "feature_map elu" in pushed.card
    assert ModelCard(pushed.card).data.tags == ["linearize", "linear-attention", "linear"]


@pytest.mark.parametrize(
    ("name", "groups"), [("llama", 2), ("gpt2", 4), ("bloom", 4), ("falcon", 2), ("falcon+one", 1), ("falcon+each", 4)]
)
def test_key_groups_of_whole_layers(name, groups):
    """They are those of a layer beside them: each family's config names them otherwise, or not at all."""
    config = json.loads(student_config(meta_model(config_of(name)), "linear", keep_softmax=[1]).to_json_string())
    kept = facts._kept(config, [1])
    assert (kept.layers, kept.groups, kept.groups_in_all) == ([1], groups, 2 * groups)


def test_card_names_a_teacher_on_the_hub(plain, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    record_of(plain, teacher={"model": "org/base", "revision": "v1"}, parent_hash=None)
    pushed = linearize.push(plain, REPO, dry_run=True)
    data = ModelCard(pushed.card).data
    assert data.base_model == "org/base" and data.to_dict()["base_model_relation"] == "finetune"
    assert data.license is None and data.language is None  # not known, so not said
    assert "[org/base](https://huggingface.co/org/base), revision v1" in pushed.card
    assert any("licence of org/base" in note for note in pushed.notes)


def test_teacher_is_not_guessed():
    config = {"parent_config": {"_name_or_path": ""}}
    assert teacher_of([], config) == Teacher()
    relative = {"teacher": {"model": "models/mine"}, "parent_hash": "abc"}
    found = teacher_of([relative], config)
    assert found.hub_id is None and found.name == "mine"
    commit = "0123456789" * 4
    cached = {"teacher": {"model": f"/c/models--org--base-1/snapshots/{commit}"}, "parent_hash": "abc"}
    found = teacher_of([cached], config)
    assert (found.hub_id, found.revision) == ("org/base-1", commit)
    named = teacher_of([], {"parent_config": {"_name_or_path": "org/base"}})
    assert named.hub_id == "org/base" and not named.sure


def test_licence_and_language_are_the_teachers():
    card = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [x]\n---\ntext"
    found = inherited(card, Teacher(name="org/base", hub_id="org/base"))
    link = "https://huggingface.co/org/base/blob/main/LICENSE"
    assert found == {"license": "other", "license_name": "own", "license_link": link, "language": ["en", "de"]}
    assert "license_link" not in inherited(card, Teacher(name="base"))
    assert inherited("no head", Teacher()) == {} and inherited("---\n[\n---\n", Teacher()) == {}


def test_card_has_what_benchmarks_and_recipes_left(out):
    header = {"hardware": "a <machine>", "dtype": "bfloat16", "versions": {"torch": "2.0"}}
    row = {"model": "student", "batch": 1, "context": 64, "prefill_tokens_per_second": 1234.0, "decode_ms": 2.5}
    row |= {"decode_tokens_per_second": 400.0, "decode_peak_gib": None, "state_bytes": 2048, "kv_bytes": 0}
    ahead = [{"batch": 1, "decode": 64.0, "cache": None}]
    results = {**header, "rows": [row], "overtakes": ahead, "student": str(out), "teacher": "y"}
    (out / "speed").mkdir()
    (out / "speed" / "model.json").write_text(json.dumps(results))
    (out / "speed" / "model.png").write_bytes(b"png")
    row = {"op": "gla", "provider": "linearize", "tokens": 64, "forward_ms": 0.5, "forward_backward_ms": None}
    row |= {"forward_peak_gib": 0.25, "forward_backward_peak_gib": None}
    kernels = {**header, "rows": [row], "decode": [], "cold_start": [], "heads": 4}
    (out / "kernels.json").write_text(json.dumps(kernels))
    (out / "keep_scores.json").write_text(json.dumps({"method": "gradient"}))
    (out / "keep_scores.png").write_bytes(b"png")
    record = json.loads((out / "linearize.json").read_text())
    (out / "linearize.json").write_text(json.dumps({**record, "recipe": {"name": "mine|own", "source": "linearize"}}))
    pushed = linearize.push(out, REPO, dry_run=True)
    assert "| this model | 1 | 64 | 1234 | 2.5 | 400 | - | 2.0 KiB | 0 bytes |" in pushed.card
    assert (
        "Measured on a &lt;machine>, bfloat16, torch 2.0. Where this model is ahead: batch 1: decoding" in pushed.card
    )
    assert "| gla, linearize | 64 | 0.5 | - | 0.25 | - |" in pushed.card
    assert "](keep_scores.png)" in pushed.card and "](speed/model.png)" in pushed.card
    assert "Recipe `mine|own` (source: linearize)" in pushed.card and "speed." not in pushed.card
    assert {"speed/model.json", "speed/model.png", "kernels.json", "keep_scores.png"} <= set(pushed.files)
    (out / "speed" / "model.json").write_text(json.dumps({**results, "student": "runs/other"}))
    pushed = linearize.push(out, REPO, dry_run=True)
    assert pushed.left_out["speed/model.json"] == "the timing of another student, other"
    (out / "speed" / "model.json").write_text(json.dumps({**results, "student": "gla (window 64, sinks 1)"}))
    assert "speed/model.json" in linearize.push(out, REPO, dry_run=True).files  # a config's shapes, random weights


def test_figures_that_are_none_are_dashes(out):
    row = {"model": "student", "batch": 1, "context": 64, "decode_ms": None, "decode_tokens_per_second": None}
    row["error"] = "decoding by generate: a token's time is lost in the noise; raise --new-tokens above 2"
    results = {"hardware": "x", "dtype": "y", "versions": {}, "student": str(out), "teacher": "y"}
    results |= {"rows": [row], "overtakes": [{"batch": 1}]}
    (out / "model.json").write_text(json.dumps(results))
    card = linearize.push(out, REPO, dry_run=True).card
    assert "| this model | 1 | 64 | - | - | - | - | - | - |" in card and "is ahead" not in card
    assert "lost in the timer's noise" in card


def test_card_says_what_brought_nothing(out):
    """A reader who judges the model is told where something simpler is as near to the teacher."""
    path = out / "evaluation.json"
    judged = json.loads(path.read_text())
    judged |= {"kl": 0.2, "recall_length": 64, "recall": {"student": 3.0, "teacher": 1.0}}
    judged |= {"linear_off": {**judged["linear_off"], "kl": 0.1}, "window_alone": None}
    path.write_text(json.dumps(judged))
    card = linearize.push(out, REPO, dry_run=True).card
    assert "the linear branch brings nothing" in card and "a KL of 0.1 nats" in card
    assert "training brought nothing" not in card
    assert "The window of 64 tokens reaches the first copy" in card and "Measured on passages" not in card
    path.write_text(json.dumps({**judged, "recall_length": 65, "kl": 0.05}))
    card = linearize.push(out, REPO, dry_run=True).card
    assert "the linear branch brings nothing" not in card
    assert "Measured on passages of 65 tokens: a loss of 3 nats a token on the second copy, the teacher's 1." in card


def test_own_result_among_several_students(out):
    judged = json.loads((out / "evaluation.json").read_text())
    other = {**judged, "perplexity": {"student": 777.25}}
    (out / "evaluation.json").unlink()
    both = {"students": {str(out): judged, "elsewhere/other": other}, "teacher": None}
    (out / "eval-both.json").write_text(json.dumps(both))
    (out / "eval-other.json").write_text(json.dumps({"students": {"elsewhere/other": other}}))
    pushed = linearize.push(out, REPO, dry_run=True)
    assert f"{judged['perplexity']['student']:.4g}" in pushed.card and "777.2" not in pushed.card
    assert "eval-both.json" in pushed.files and "eval-other.json" in pushed.left_out


def test_folder_that_python_saved(plain, tmp_path):
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["parent_config"]["_name_or_path"] = "org/base"  # as a teacher loaded from the Hub leaves it
    path.write_text(json.dumps(config))
    pushed = linearize.push(tmp_path / "saved", REPO, dry_run=True)
    assert "Not recorded: the folder has no `linearize.json`." in pushed.card and "| mixer `gla` |" in pushed.card
    assert any("no tokenizer" in note for note in pushed.notes)
    assert ModelCard(pushed.card).data.base_model == "org/base"
    assert any("is from config.json" in note for note in pushed.notes)


def test_front_matter():
    assert front_matter.split("no head") == ({}, "no head")
    assert front_matter.split("---\na: 1\n---\nbody") == ({"a": 1}, "body")
    assert front_matter.split("---\n\n---\nbody") == ({}, "body")
    fields = ModelCardData(language="ü", tags=["c"])
    assert front_matter.split(front_matter.join(fields, "x")) == ({"language": "ü", "tags": ["c"]}, "\nx")
    for broken in ("---\na: [\n---\n", "---\n- a\n---\n"):
        with pytest.raises(ValueError, match="front matter"):
            front_matter.split(broken)
