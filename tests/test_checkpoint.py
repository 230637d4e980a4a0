from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_async.checkpoint import (
    CONFIG,
    LEARNER,
    MANIFEST,
    RUN_STATE,
    CheckpointError,
    adopt,
    begin,
    checkpoints_in,
    commit,
    name_of,
    newest_whole,
    prune,
    read_manifest,
    read_run_state,
    remove_leftovers,
)


def write(root: Path, step: int, *, text: str = "weights") -> Path:
    partial = begin(root, step)
    (partial / LEARNER).mkdir()
    (partial / LEARNER / "shard").write_text(text)
    (partial / CONFIG).write_text("seed: 0\n")
    (partial / RUN_STATE).write_text(json.dumps({"step": step}))
    return commit(partial, step=step, policy_version=step - 1, num_ranks=2)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def newest_step(root: Path) -> int | None:
    found, _ = newest_whole(root)
    return None if found is None else found[1].step


def test_a_checkpoint_says_what_it_is_and_is_found(tmp_path):
    folder = write(tmp_path, 120, text="x" * 7)
    manifest = read_manifest(folder)
    assert folder == tmp_path / "step-000120"
    assert (manifest.step, manifest.policy_version, manifest.num_ranks) == (120, 119, 2)
    assert manifest.files == {
        "config.yaml": 8,
        "learner/shard": 7,
        "run.json": len('{"step": 120}'),
    }
    assert read_run_state(folder) == {"step": 120}
    assert newest_whole(tmp_path) == ((folder, manifest), ())
    assert names(tmp_path) == ["step-000120"]


def test_checkpoints_are_in_the_order_of_their_steps_also_beyond_six_digits(tmp_path):
    steps = (7, 2_000_000, 999_999, 1_000_000)
    for step in steps:
        write(tmp_path, step)
    assert [p.name for p in checkpoints_in(tmp_path)] == [name_of(s) for s in sorted(steps)]
    assert newest_step(tmp_path) == 2_000_000


def test_everything_is_synced_before_the_name_is_given_and_the_name_after(tmp_path, monkeypatch):
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    write(tmp_path, 3)
    before = events[: events.index("rename")]
    synced = {Path(name).name for name in before}
    assert {"shard", CONFIG, RUN_STATE, MANIFEST, LEARNER} <= synced
    assert Path(before[-1]).name.endswith(".partial"), "the folder itself, after all in it"
    assert events[events.index("rename") + 1 :] == [str(tmp_path)]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / LEARNER / "shard").write_text("weight"), "has 6 bytes instead of 7"),
        (lambda f: (f / LEARNER / "shard").unlink(), "learner/shard is absent"),
        (lambda f: shutil.rmtree(f / LEARNER), "learner/shard is absent"),
        (lambda f: (f / MANIFEST).unlink(), "manifest.json cannot be read (No such file"),
        (lambda f: (f / MANIFEST).write_text('{"format'), "manifest.json cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[1]"), "manifest.json is no JSON object"),
        (lambda f: (f / MANIFEST).write_text('{"format_version": 1}'), "its manifest cannot be"),
        (lambda f: (f / CONFIG).write_text("seed: 1\n"), "config.yaml was changed"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_found(tmp_path, damage, reason):
    whole, broken = write(tmp_path, 10), write(tmp_path, 20)
    damage(broken)
    with pytest.raises(CheckpointError) as refused:
        read_manifest(broken)
    assert str(refused.value).startswith(f"{broken}: not a whole checkpoint: ")
    assert reason in str(refused.value)
    found, passed_over = newest_whole(tmp_path)
    assert found is not None and found[0] == whole
    assert passed_over == (str(refused.value),)


def test_a_checkpoint_of_another_format_is_refused_as_such(tmp_path):
    folder = write(tmp_path, 10)
    values = json.loads((folder / MANIFEST).read_text()) | {"format_version": 2, "more": 1}
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1"):
        read_manifest(folder)


def test_the_same_step_is_not_written_over(tmp_path):
    write(tmp_path, 10, text="first")
    with pytest.raises(OSError):
        write(tmp_path, 10, text="second")
    assert (tmp_path / "step-000010" / LEARNER / "shard").read_text() == "first"


def test_without_checkpoints_there_is_none(tmp_path):
    assert newest_whole(tmp_path / "absent") == (None, ())
    (tmp_path / "step-12").mkdir()
    (tmp_path / "other").mkdir()
    assert newest_whole(tmp_path) == (None, ())
    remove_leftovers(tmp_path / "absent")


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_are_kept(tmp_path, keep, left):
    for step in range(1, 5):
        write(tmp_path, step)
    prune(tmp_path, keep=keep)
    assert names(tmp_path) == [name_of(step) for step in left]


def test_a_kill_during_removal_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1)
    write(tmp_path, 2)

    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", kill)
    with pytest.raises(Killed):
        prune(tmp_path, keep=1)
    monkeypatch.undo()
    assert [p.name for p in checkpoints_in(tmp_path)] == ["step-000002"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-000002"]


def test_leftovers_are_removed_and_nothing_else_is(tmp_path):
    write(tmp_path, 1)
    begin(tmp_path, 2)
    (tmp_path / ".step-000002.notes").mkdir()
    (tmp_path / ".hidden").write_text("")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", ".step-000002.notes", "step-000001"]


def test_two_writers_of_one_step_do_not_meet(tmp_path):
    assert begin(tmp_path, 5) != begin(tmp_path, 5)


@pytest.mark.parametrize("links", [True, False])
def test_an_adopted_checkpoint_outlives_its_source(tmp_path, monkeypatch, links):
    source = write(tmp_path / "a", 30)
    expected = read_manifest(source)
    if not links:

        def refuse(*args, **kwargs):
            raise OSError("other file system")

        monkeypatch.setattr(os, "link", refuse)
    adopted = adopt(source, tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert adopted == tmp_path / "b" / "step-000030"
    assert read_manifest(adopted) == expected
    assert (adopted / LEARNER / "shard").read_text() == "weights"


def test_a_damaged_checkpoint_is_not_adopted(tmp_path):
    source = write(tmp_path / "a", 30)
    (source / RUN_STATE).unlink()
    with pytest.raises(CheckpointError):
        adopt(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "damage", "abandon", "resume"]), st.integers(0, 9)),
        max_size=25,
    ),
    st.integers(1, 3),
)
def test_the_newest_whole_checkpoint_is_always_the_one_that_a_book_says(
    tmp_path_factory, events, keep
):
    """Whatever is written, lost or abandoned, in any order."""
    root = tmp_path_factory.mktemp("run")
    step, book = 0, {}
    for event, choice in events:
        if event == "write":
            step += 1 + choice
            write(root, step)
            prune(root, keep=keep)
            book[step] = True
            book = dict(sorted(book.items())[-keep:])
        elif event == "damage" and book:
            damaged = sorted(book)[choice % len(book)]
            (root / name_of(damaged) / LEARNER / "shard").unlink(missing_ok=True)
            book[damaged] = False
        elif event == "abandon":
            (begin(root, step + 1) / CONFIG).write_text("half")
        elif event == "resume":
            remove_leftovers(root)
        assert newest_step(root) == max((s for s, whole in book.items() if whole), default=None)
        assert [int(p.name[5:]) for p in checkpoints_in(root)] == sorted(book)
