"""A run is a folder, and no failure at any moment leaves half a file in it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.core.errors import StorageError
from potstill.core.run import RunFolder, environment, read_json, read_lines, replacing, write_json, write_text


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A file that was written once and must survive what follows."""
    file = tmp_path / "kept.txt"
    write_text(file, "old")
    return file


def in_another_process(body: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run some lines that see the run folder's functions and `path`, their first argument."""
    head = "import os, resource, signal, sys\nfrom pathlib import Path\nfrom potstill.core.run import *\n"
    script = f"{head}path = Path(sys.argv[1])\n{body}"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_an_arm_is_a_run_folder_inside_a_run_folder(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).arm("teacher").metrics == tmp_path / "teacher" / "metrics.jsonl"


def test_no_two_files_of_a_run_have_the_same_name() -> None:
    named = [name for name, thing in vars(RunFolder).items() if isinstance(thing, property)]
    assert len({getattr(RunFolder(Path("run")), name) for name in named}) == len(named) > 0


def test_a_written_file_holds_the_text_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "note.txt", "caf\u00e9")
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "caf\u00e9"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "note.txt", "new")
    assert (tmp_path / "a" / "b" / "note.txt").read_text() == "new"


def test_json_comes_back_as_it_was_written_in_its_order(tmp_path: Path) -> None:
    content = {"z": [1, None], "a": {"b": 0.1}}
    write_json(tmp_path / "content.json", content)
    assert list(read_json(tmp_path / "content.json").items()) == list(content.items())


@pytest.mark.parametrize("text", ['{"a": ', "", "[1]"])
def test_a_torn_json_file_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    file = tmp_path / "scores.json"
    file.write_text(text)
    with pytest.raises(StorageError, match=r"scores\.json .*Delete it and run"):
        read_json(file)


def test_bytes_that_are_no_text_are_a_torn_file(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StorageError, match="torn"):
        read_json(tmp_path / "scores.json")


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    journal = tmp_path / "metrics.jsonl"
    journal.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}')
    assert [line["step"] for line in read_lines(journal)] == [1, 2]


def test_a_journal_that_was_never_begun_has_no_lines(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "metrics.jsonl")) == []


def test_an_exception_while_writing_leaves_the_old_content_and_no_draft(kept: Path) -> None:
    with pytest.raises(KeyError), replacing(kept) as draft:
        draft.write_text("half")
        raise KeyError("something else")
    assert kept.read_text() == "old"
    assert os.listdir(kept.parent) == ["kept.txt"]


def test_the_old_content_stays_until_the_new_one_is_whole(kept: Path) -> None:
    with replacing(kept) as draft:
        draft.write_text("new")
        assert kept.read_text() == "old"
    assert kept.read_text() == "new"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    for name in ("before", "after"):
        with replacing(folder) as draft:
            (draft / "weights").mkdir(parents=True)
            (draft / "weights" / name).write_text(name)
    assert os.listdir(folder / "weights") == ["after"]
    assert os.listdir(tmp_path) == ["student"]


def test_a_folder_half_written_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    with replacing(folder) as draft:
        draft.mkdir()
        (draft / "weights").write_text("old")
    with pytest.raises(KeyError), replacing(folder) as draft:
        draft.mkdir()
        (draft / "weights").write_text("half")
        raise KeyError("something else")
    assert (folder / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["student"]


def test_a_draft_that_an_earlier_call_left_does_not_mix_with_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    left = tmp_path / f".student.draft-{os.getpid()}"
    left.mkdir()
    (left / "stale").write_text("")
    with replacing(folder) as draft:
        draft.mkdir()
    assert os.listdir(folder) == []


def test_a_kill_while_writing_leaves_the_old_content(kept: Path) -> None:
    body = "with replacing(path) as draft:\n    draft.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    killed = in_another_process(body, kept)
    assert killed.returncode == -signal.SIGKILL
    assert kept.read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_to_be_full(kept: Path, code: int) -> None:
    with pytest.raises(StorageError, match=r"The disk is full while saving .*kept\.txt; .* intact"), replacing(kept):
        raise OSError(code, os.strerror(code))
    assert kept.read_text() == "old"


def test_a_file_the_system_refuses_to_grow_is_a_storage_error_and_the_old_one_stays(kept: Path) -> None:
    # EFBIG from the real system, not from a fake: the process may write no file beyond 4 KiB.
    body = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    write_text(path, 'x' * 100_000)\nexcept StorageError as error:\n    print(error)\n"
    )
    refused = in_another_process(body, kept)
    assert f"Cannot save {kept}: {os.strerror(errno.EFBIG)}. What was saved before is intact." in refused.stdout
    assert kept.read_text() == "old"
    assert os.listdir(kept.parent) == ["kept.txt"]


def test_a_parent_that_is_a_file_is_a_storage_error(kept: Path) -> None:
    with pytest.raises(StorageError, match="Cannot save"):
        write_text(kept / "inside.txt", "new")
    assert kept.read_text() == "old"


def test_the_environment_names_the_command_and_every_version() -> None:
    found = environment("potstill run kd")
    assert found["command"] == "potstill run kd"
    assert {"potstill", "torch"} <= found["packages"].keys()
    assert found["packages"]["torch"] != "absent"


def test_the_environment_can_be_written_as_json() -> None:
    assert json.loads(json.dumps(environment(""))) == environment("")


def test_a_package_that_is_not_installed_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    from potstill.core import run

    def missing(name: str) -> str:
        raise run.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(run.metadata, "version", missing)
    assert set(environment("")["packages"].values()) == {"absent"}
