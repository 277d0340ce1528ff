import errno
import json
import logging
import multiprocessing
import os
import time

import pytest

from mmnas_lab.stage import DONE, atomically, digest, file_digest, stage, write_json


def result(root, compute=None, settings=None, inputs=None, version=1, name="search"):
    settings = {"epochs": 3, "lr": 0.1} if settings is None else settings
    inputs = {"features": "abc"} if inputs is None else inputs
    return stage(root, name, "movies 0", version, settings, inputs, compute or Writer())


class Writer:
    """A computation that writes two files, and counts its calls."""

    def __init__(self, text="network"):
        self.calls, self.text = 0, text

    def __call__(self, folder):
        self.calls += 1
        (folder / "part").mkdir(exist_ok=True)
        (folder / "part/network.bin").write_text(self.text)
        (folder / "history.json").write_text("[1, 2]")


def test_a_finished_stage_is_reused(tmp_path):
    first, second = Writer(), Writer("other")
    made, found = result(tmp_path, first), result(tmp_path, second)
    assert (first.calls, second.calls) == (1, 0)
    assert (made.reused, found.reused) == (False, True)
    assert (made.key, made.folder, made.digests) == (found.key, found.folder, found.digests)
    assert found.seconds == made.seconds
    assert made.folder.parent == tmp_path / "search"
    assert made.folder.name == f"movies_0-{made.key[:8]}"
    assert set(made.digests) == {"settings.json", "history.json", "part/network.bin"}


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"epochs": 4, "lr": 0.1}},
        {"settings": {"epochs": 3, "lr": 0.1, "more": None}},
        {"settings": {"epochs": 3, "lr": 0.2}},
        {"inputs": {"features": "abd"}},
        {"inputs": {"features": "abc", "labels": "1"}},
        {"version": 2},
        {"name": "pretrain"},
    ],
)
def test_the_key_changes_with_everything_that_the_result_depends_on(tmp_path, change):
    assert result(tmp_path).key != result(tmp_path, **change).key


def test_the_key_does_not_depend_on_the_order_of_settings(tmp_path):
    assert result(tmp_path).key == result(tmp_path, settings={"lr": 0.1, "epochs": 3}).key
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


def test_a_failed_computation_leaves_no_mark_and_finds_its_folder_again(tmp_path):
    def fail(folder):
        (folder / "save.point").write_text("half")
        time.sleep(0.05)
        raise ValueError("the loss is nan")

    with pytest.raises(ValueError, match="the loss is nan"):
        result(tmp_path, fail)
    seen = []

    def go_on(folder):
        seen.append((folder / "save.point").read_text())
        assert not (folder / DONE).exists()
        (folder / "save.point").unlink()

    finished = result(tmp_path, go_on)
    assert seen == ["half"]
    assert not finished.reused
    assert finished.seconds >= 0.05, "the time of the first try belongs to the stage"
    assert "seconds.json" not in finished.digests


def truncate(folder):
    path = folder / "part/network.bin"
    os.truncate(path, path.stat().st_size - 1)


def change(folder):
    (folder / "part/network.bin").write_text("netw0rk")


def remove(folder):
    (folder / "history.json").unlink()


def cut_the_mark(folder):
    os.truncate(folder / DONE, 20)


def empty_the_mark(folder):
    (folder / DONE).write_text("[]")


@pytest.mark.parametrize("damage", [truncate, change, remove, cut_the_mark, empty_the_mark])
def test_a_damaged_result_is_noticed_said_and_computed_again(tmp_path, caplog, damage):
    made = result(tmp_path)
    damage(made.folder)
    again = Writer()
    with caplog.at_level(logging.WARNING):
        repaired = result(tmp_path, again)
    assert again.calls == 1
    assert "is damaged" in caplog.text
    assert "computed again" in caplog.text
    assert made.folder.name in caplog.text
    if damage in (truncate, change):
        assert "part/network.bin is truncated or changed" in caplog.text
    if damage is remove:
        assert "history.json is missing" in caplog.text
    assert (repaired.key, repaired.digests) == (made.key, made.digests)
    assert result(tmp_path, Writer()).reused


def test_a_short_hash_that_meets_other_settings_is_not_taken_for_them(tmp_path, caplog):
    made = result(tmp_path)
    mark = json.loads((made.folder / DONE).read_text())
    write_json(made.folder / DONE, {**mark, "key": made.key[:8] + "f" * 24})
    assert not result(tmp_path).reused
    assert "other settings" in caplog.text


def slow(folder):
    with (folder / "calls").open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(1.0)
    (folder / "value").write_text("7")


def want(root, answers):
    found = result(root, slow)
    answers.put((found.reused, found.key, (found.folder / "value").read_text()))


def test_two_processes_that_want_the_same_stage_compute_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=want, args=(tmp_path, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(reused for reused, _, _ in got) == [False, True]
    assert len({(key, value) for _, key, value in got}) == 1
    assert got[0][2] == "7"
    assert len((result(tmp_path).folder / "calls").read_text().splitlines()) == 1


def test_the_lock_ends_with_its_process(tmp_path):
    def die(folder):
        (folder / "half").write_text("half")
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=result, args=(tmp_path, die))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert not result(tmp_path).reused


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "genotype.json"
    write_json(path, {"old": 1})

    def write_half():
        with atomically(path) as file:
            file.write(b'{"ne')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["genotype.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "genotype.json"
    write_json(path, {"old": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["genotype.json"]


def test_a_digest_tells_size_and_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abd")
    assert file_digest(tmp_path / "a").startswith("3:")
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")
