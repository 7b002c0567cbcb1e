"""Output folders are whole or not there, and say where they come from."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from linearize import provenance
from linearize.errors import UsageError, UserError
from linearize.output import check_new, new_folder, resumed_folder


def fill(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_folder_appears_only_when_whole(tmp_path):
    out = tmp_path / "deep" / "student"
    with new_folder(out) as partial:
        assert partial.parent == out.parent and partial.name.startswith(".student.partial-")
        fill(partial, "new")
        assert not out.exists()
    assert entries(out) == ["config.json"]
    assert entries(out.parent) == ["student"]


def test_a_failure_leaves_nothing(tmp_path):
    out = tmp_path / "deep" / "er" / "student"
    with pytest.raises(KeyboardInterrupt), new_folder(out) as partial:
        fill(partial, "half")
        raise KeyboardInterrupt
    assert entries(tmp_path) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_was_interrupted_is_given_again(tmp_path, kind):
    out = tmp_path / "deep" / "student"
    with pytest.raises(kind), resumed_folder(out, "a") as (partial, work):
        assert work.parent == partial and partial.parent == out.parent
        fill(partial, "half")
        raise kind
    assert not out.exists()
    with resumed_folder(out, "a") as (again, work):
        assert again == partial and (again / "config.json").read_text() == "half"
        (work / "on the way").write_text("")
        fill(again, "whole")
    assert entries(out) == ["config.json"] and (out / "config.json").read_text() == "whole"
    assert entries(out.parent) == ["student"]


def test_what_failed_is_not_given_again(tmp_path):
    out = tmp_path / "deep" / "student"
    for error in (ZeroDivisionError("x"), OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises((ZeroDivisionError, UserError)), resumed_folder(out, "a") as (partial, _):
            fill(partial, "half")
            raise error
        assert entries(tmp_path) == []


def test_leftovers_of_another_kind_are_removed_unless_they_are_written(tmp_path):
    out = tmp_path / "student"
    for key in ("a", "b"):
        with pytest.raises(KeyboardInterrupt), resumed_folder(out, key):
            raise KeyboardInterrupt
        assert entries(tmp_path) == [f".student.unfinished-{key}"]
    other = tmp_path / "student.unfinished-x"
    other.mkdir()
    with resumed_folder(out, "b") as (partial, _):
        with pytest.raises(UserError, match="another process is writing"), resumed_folder(out, "b"):
            pytest.fail("the body ran")
        with pytest.raises(KeyboardInterrupt), resumed_folder(out, "c"):
            assert partial.is_dir()
            raise KeyboardInterrupt
        fill(partial, "whole")
    assert (out / "config.json").read_text() == "whole" and other.is_dir()


def test_existing_folder_is_refused_before_the_body(tmp_path):
    out = tmp_path / "student"
    out.mkdir()
    fill(out, "old")
    with pytest.raises(UsageError, match="--overwrite"), new_folder(out):
        pytest.fail("the body ran")
    assert (out / "config.json").read_text() == "old"


def test_overwrite_replaces_only_when_whole(tmp_path):
    out = tmp_path / "student"
    out.mkdir()
    fill(out, "old")
    (out / "linearize.json").write_text("{}")
    with pytest.raises(RuntimeError), new_folder(out, overwrite=True):
        raise RuntimeError("half way")
    assert (out / "config.json").read_text() == "old"
    with new_folder(out, overwrite=True) as partial:
        fill(partial, "new")
        assert (out / "config.json").read_text() == "old"
    assert entries(out) == ["config.json"] and (out / "config.json").read_text() == "new"
    assert entries(tmp_path) == ["student"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "student"
    with pytest.raises(UsageError, match="exists"), new_folder(out) as partial:
        fill(partial, "mine")
        out.mkdir()
        fill(out, "theirs")
    assert (out / "config.json").read_text() == "theirs"
    assert (tmp_path / "student-2" / "config.json").read_text() == "mine"
    with pytest.raises(UsageError, match=r"exists.* lies in .*other-3"), resumed_folder(tmp_path / "other", "a") as new:
        fill(new[0], "mine")
        (tmp_path / "other").mkdir()
        (tmp_path / "other-2").mkdir()
    assert entries(tmp_path) == ["other", "other-2", "other-3", "student", "student-2"]
    assert entries(tmp_path / "other-3") == ["config.json"]


def test_overwrite_spares_what_is_no_model(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("cat")
    with pytest.raises(UsageError, match="holds no model"):
        check_new(photos, overwrite=True)
    (photos / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no model"):
        check_new(photos, overwrite=True)
    (photos / "config.json").write_text('{"model_type": "linearize"}')
    assert check_new(photos, overwrite=True) == photos
    fill(photos, "{}")
    (photos / "linearize.json").write_text("{}")
    assert check_new(photos, overwrite=True) == photos
    (photos / "pictures").mkdir()
    assert check_new(photos, overwrite=True) == photos
    (photos / "album").mkdir()
    with pytest.raises(UsageError, match=r"holds folders that linearize did not make \(album\)"):
        check_new(photos, overwrite=True)
    (photos / "album").rmdir()
    monkeypatch.chdir(photos)
    with pytest.raises(UsageError, match="you stand in"):
        check_new(photos, overwrite=True)
    with pytest.raises(UsageError, match="not a folder"):
        check_new(photos / "cat.jpg", overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        check_new(photos / "cat.jpg" / "out")


def test_overwrite_takes_what_lies_in_a_folder_of_ours(tmp_path):
    for name in ("pictures", "speed", "bench", "additional_chat_templates"):
        (tmp_path / "student" / name).mkdir(parents=True)
    (tmp_path / "student" / "linearize.json").write_text("{}")
    assert check_new(tmp_path / "student", overwrite=True)


def test_overwrite_spares_an_adapter_of_someone_else(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no model that linearize made"):
        check_new(tmp_path / "lora", overwrite=True)


@pytest.mark.parametrize("read", [".", "teacher", "../link", "text.jsonl"])
def test_overwrite_spares_what_is_read(tmp_path, read):
    out = tmp_path / "student"
    (out / "teacher").mkdir(parents=True)
    (tmp_path / "link").symlink_to(out / "teacher")
    (out / "text.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="which this reads"):
        check_new(out, overwrite=True, reads=["owner/name", "~nobody-of-this-name/model", out / read])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file data/0"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2838656 vs 2838608"),
    ],
)
def test_full_disk_is_said(tmp_path, error):
    with pytest.raises(UserError, match=r"is full.*MiB are free") as caught, new_folder(tmp_path / "out"):
        raise error
    assert caught.value.exit_code == 1
    assert entries(tmp_path) == []


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out"):
        raise ZeroDivisionError


def checkpoint(folder: Path, value: float) -> Path:
    folder.mkdir()
    fill(folder, "{}")
    save_file({"weight": torch.full((64, 64), value)}, folder / "model.safetensors")
    return folder


def test_parent_hash_sees_every_tensor(tmp_path):
    """A stage may train a few numbers among millions."""
    hashes = set()
    for change in (None, "few", "last"):  # the few lie between the blocks that are read of any file
        tensors = {"before": torch.zeros(1 << 20), "few": torch.zeros(3), "last": torch.zeros(1 << 20)}
        if change is not None:
            tensors[change] += 1
        folder = tmp_path / str(change)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        hashes.add(provenance.parent_hash(folder))
    assert len(hashes) == 3
    for header in (b"[]", b'{"x": 1}', b'{"x": {"data_offsets": [-5, 99999999999999999999999]}}', b"{"):
        broken = tmp_path / "None" / "model.safetensors"
        broken.write_bytes(len(header).to_bytes(8, "little") + header + b"data")
        assert provenance.parent_hash(broken.parent)


def test_parent_hash_tells_values_apart(tmp_path):
    one, same, other = (checkpoint(tmp_path / str(i), v) for i, v in enumerate((1.0, 1.0, 2.0)))
    assert provenance.parent_hash(one) == provenance.parent_hash(same)
    assert provenance.parent_hash(one) != provenance.parent_hash(other)  # same shapes, other weights
    fill(same, '{"changed": 1}')
    assert provenance.parent_hash(one) != provenance.parent_hash(same)


def test_record_carries_the_whole_history(tmp_path):
    teacher, swapped, distilled = (checkpoint(tmp_path / name, 1.0) for name in ("t", "s", "d"))
    provenance.write(
        swapped, provenance.record(command=["linearize", "convert", "a b"], stage="convert", parent=teacher)
    )
    provenance.write(distilled, provenance.record(command="x", stage="transfer", parent=swapped, tokens=7))
    last = provenance.record(command="y", stage="logits", parent=distilled)
    assert [entry["stage"] for entry in last["history"]] == ["convert", "transfer"]
    assert last["history"][0]["command"] == "linearize convert 'a b'"
    assert last["history"][1]["tokens"] == 7 and "history" not in last["history"][1]
    assert last["parent_hash"] == provenance.parent_hash(distilled)
    assert last["versions"]["torch"] == torch.__version__
    assert provenance.read(teacher) is None
    assert json.loads((swapped / "linearize.json").read_text()) == provenance.read(swapped)
    (swapped / "linearize.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        provenance.read(swapped)
