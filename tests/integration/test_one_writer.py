"""One process writes a place: the second is told so, a killed one is followed, and nothing of anybody else is lost."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogtune.cli.main import guarded, main
from cogtune.errors import DiskFullError, OutputFolderError, RunError
from cogtune.features.contents import clear
from cogtune.features.reader import FeatureReader
from cogtune.system import files
from cogtune.train import saver
from cogtune.train.loop import Loop
from cogtune.train.run import train
from tests.support.adapters import write_adapter
from tests.support.data_folders import dialogue, write_folder, write_image, write_label
from tests.support.lock_holder import holder, kill
from tests.support.training import make_config, write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "pictures", 8)


def contents(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def adapter(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def start(base: Path, data: Path, output: Path, *more: object, file_limit: int | None = None) -> subprocess.Popen[str]:
    """`cogtune train` as a process of its own; ``file_limit``: no file may become longer."""
    words = ["train", "--model", base, "--data", data, "--output", output, "--train.save_steps", 1, "--data.workers", 0,
             "--data.cache_features", "off", "--data.validation_share", 0, "--log.steps", 1, "--model.dtype", "float32",
             *more]  # fmt: skip
    limit = None if file_limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    return subprocess.Popen(
        [sys.executable, "-m", "cogtune", *map(str, words)], cwd=ROOT, text=True, preexec_fn=limit,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_of_two_runs_in_one_folder_one_trains_and_the_other_is_told(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """Case 06: they mixed their records and deleted each other's checkpoints."""
    both = [start(tiny_checkpoint, data, tmp_path / "out", "--train.max_steps", 30) for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    told = said[codes.index(2)]
    assert "error[output-in-use]" in told
    assert f"process {both[codes.index(0)].pid} of " in told
    assert "--train.restart true" in told
    lines = list(map(json.loads, (tmp_path / "out" / "metrics.jsonl").open()))
    assert [line["step"] for line in lines if line["kind"] == "train"] == [*range(1, 31)]
    assert [line["kind"] for line in lines].count("start") == 1
    assert not list((tmp_path / "out").glob(".*"))


def test_a_killed_run_is_taken_over_and_says_so(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with holder(output) as before:
        with pytest.raises(OutputFolderError, match="in use"):
            train(make_config(tiny_checkpoint, data, output))
        kill(before)
    train(make_config(tiny_checkpoint, data, output))
    assert f"taking over from process {before.pid} of" in capsys.readouterr().out
    with holder(output):  # a finished run is only looked at
        train(make_config(tiny_checkpoint, data, output))
    assert "this run is finished" in capsys.readouterr().out


def test_looking_takes_no_lock(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    with holder(tmp_path / "out"):
        train(make_config(tiny_checkpoint, data, tmp_path / "out"), dry_run=True)
    train(make_config(tiny_checkpoint, data, tmp_path / "new"), dry_run=True)
    assert not (tmp_path / "new").exists()


def test_a_restart_passes_by_a_sibling_that_another_run_begins(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_checkpoint, data, tmp_path / "out", train__restart="true")
    assert train(config).output == tmp_path / "out"
    with holder(tmp_path / "out-2"):
        assert train(config).output == tmp_path / "out-3"


def test_a_refused_run_leaves_no_folder_behind(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(tiny_checkpoint, data, tmp_path / "new" / "out", train__resume=tmp_path / "nowhere")
    with pytest.raises(Exception, match="nowhere"):
        train(config)
    assert not (tmp_path / "new").exists()


LOSSES: dict[str, str] = {
    "removed": "gone: it was removed",
    "another's": "was taken over by",
    "read-only": "read-only file system",
    "failing": "input/output error",
}


@pytest.mark.parametrize("how", LOSSES)
def test_output_that_is_lost_while_training_ends_with_the_last_good_state_named(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    output, step, write = tmp_path / "out", Loop._advance, files.write_file

    def lose(loop: Loop, *given: Any) -> None:
        step(loop, *given)
        if loop.progress.step != 4:
            return
        if how == "removed":
            output.rename(tmp_path / "moved")
        elif how == "another's":
            lock = output / ".cogtune.lock"
            lock.write_text(lock.read_text().replace('"number": ', '"number": 1'))
        else:
            number = 30 if how == "read-only" else 5

            def fail(path: Path, content: bytes) -> None:
                if path.is_relative_to(output):
                    raise OSError(number, os.strerror(number), str(path))
                write(path, content)

            monkeypatch.setattr(files, "write_file", fail)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_advance", lose)
        with pytest.raises(RunError) as caught:
            train(make_config(tiny_checkpoint, data, output, train__save_steps=3))
    assert caught.value.code == "output-lost"
    assert LOSSES[how] in caught.value.message
    last = (
        "its checkpoints are lost with it" if how == "removed" else f"the last good state is {output / 'checkpoint-3'}"
    )
    assert last in caught.value.message
    if how == "removed":
        assert not output.exists(), "half a run would look like a whole one"
        (tmp_path / "moved").rename(output)
    monkeypatch.setattr(files, "write_file", write)
    (output / ".cogtune.lock").unlink(missing_ok=True)
    train(make_config(tiny_checkpoint, data, output, train__save_steps=3))
    train(make_config(tiny_checkpoint, data, tmp_path / "whole", train__save_steps=3))
    assert adapter(output) == adapter(tmp_path / "whole")


@pytest.mark.parametrize("what", ["metrics.jsonl", "run.log"])
def test_a_line_that_cannot_be_written_ends_the_run_with_a_name(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """/dev/full takes no byte, as a full disk."""
    output, step = tmp_path / "out", Loop._advance

    def fill(loop: Loop, *given: Any) -> None:
        step(loop, *given)
        if loop.progress.step == 4:
            open_here = {os.readlink(path): int(path.name) for path in Path("/proc/self/fd").iterdir() if path.exists()}
            os.dup2(os.open("/dev/full", os.O_WRONLY), open_here[str(output / what)])

    monkeypatch.setattr(Loop, "_advance", fill)
    with pytest.raises(DiskFullError) as caught:
        train(make_config(tiny_checkpoint, data, output, train__save_steps=3))
    assert what in caught.value.message
    assert f"the last good state is {output / 'checkpoint-3'}" in caught.value.message


def test_a_limit_on_the_size_of_files_is_said(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    with start(tiny_checkpoint, data, tmp_path / "out", "--train.max_steps", 3, file_limit=30_000) as process:
        said = process.communicate(timeout=240)[0]
    assert process.returncode == 1
    assert "error[output-lost]" in said
    assert "file too large" in said
    assert "Traceback" not in said
    assert "ulimit -f" in said


def test_what_a_user_keeps_in_the_output_folder_stays(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(make_config(tiny_checkpoint, data, output, train__save_steps=3, train__max_steps=3))
    mine = {
        "adapter/README.md": "about", "adapter/notes/a.txt": "a", ".big.partial": "of a browser", ".a.replaced": "b",
        "checkpoint-1/weights.bin": "of another program", "checkpoint-007/x": "x",
    }  # fmt: skip
    for name, text in mine.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(text)
    for name in (".checkpoint-9.partial", ".run.json.vm.1.2.partial"):
        (output / name).touch()  # what a killed run leaves
    train(
        make_config(tiny_checkpoint, data, output, train__save_steps=1, train__max_steps=6, train__keep_checkpoints=1)
    )
    assert {name: (output / name).read_text() for name in mine} == mine
    assert not (output / ".checkpoint-9.partial").exists()
    assert not (output / ".run.json.vm.1.2.partial").exists()


def test_a_checkpoint_is_not_written_over_a_folder_of_another_program(
    tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    train(make_config(tiny_checkpoint, data, output, train__save_steps=3, train__max_steps=3))
    (output / "checkpoint-6").mkdir()
    (output / "checkpoint-6" / "weights.bin").write_text("mine")
    with pytest.raises(RunError, match="something other than a checkpoint is there"):
        train(make_config(tiny_checkpoint, data, output, train__save_steps=3, train__max_steps=6))
    assert (output / "checkpoint-6" / "weights.bin").read_text() == "mine"


def test_clearing_the_cache_does_not_disturb_a_run_that_trains_from_it(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, read, cleared = tmp_path / "cache", FeatureReader.__call__, []
    values = {"data__cache_dir": cache, "data__cache_features": "on"}

    def clearing(reader: FeatureReader, image: Any) -> Any:
        if not cleared:
            cleared.append(clear(cache))
        return read(reader, image)

    monkeypatch.setattr(FeatureReader, "__call__", clearing)
    train(make_config(tiny_checkpoint, data, tmp_path / "out", **values))
    assert (cleared[0].removed, cleared[0].kept) == (0, 4)
    assert clear(cache).removed == 4


def test_runs_that_fill_at_once_keep_the_budget_together(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Each measured before the others had written, and all took the same room: 2.7 times the budget."""
    cache, draw = tmp_path / "cache", random.Random(0)
    for name in "abc":
        (tmp_path / name / "images").mkdir(parents=True)
        for number in range(40):
            pixels = draw.randbytes(192)
            Image.frombytes("RGB", (8, 8), pixels).save(tmp_path / name / "images" / f"{number}.png")
            write_label(tmp_path / name / "labels" / f"{number}.json", dialogue("What?", "That."))
    words = [sys.executable, "-m", "cogtune", "data", "cache", "--model", tiny_checkpoint, "--data.workers", 1]
    words += ["--data.cache_dir", cache, "--model.dtype", "float32"]

    def fill(name: str, budget: int) -> subprocess.Popen[str]:
        more = ["--data", tmp_path / name, "--data.cache_budget", f"{budget}B"]
        return subprocess.Popen([*map(str, [*words, *more])], cwd=ROOT, text=True, stderr=subprocess.PIPE)

    assert fill("a", 10**9).wait(timeout=120) == 0
    taken = sum(path.stat().st_size for path in cache.glob("*/??/*"))
    clear(cache)
    budget, most = taken + taken // 2, 0
    three = [fill(name, budget) for name in "abc"]
    while any(process.poll() is None for process in three):
        sizes = []
        for path in cache.glob("*/??/[!.]*"):
            with suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        most = max(most, sum(sizes))
        time.sleep(0.01)
    said = [process.communicate()[1] for process in three]
    codes = [process.returncode for process in three]
    assert most <= budget
    assert 0 in codes, said
    assert all(code == 0 or "error[cache-budget]" in text for code, text in zip(codes, said, strict=True)), said
    assert not list((cache / "leases").glob("*"))


def test_a_cache_that_may_only_be_read_serves_data_that_was_copied(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/concepts/feature-cache.md says so; the copies' times are new."""
    cache, write = tmp_path / "cache", files.write_file
    values = {"data__cache_dir": cache, "data__cache_features": "on"}
    train(make_config(tiny_checkpoint, data, tmp_path / "out", **values))
    shutil.copytree(data, tmp_path / "copied", copy_function=shutil.copyfile)

    def forbid(path: Path, content: bytes) -> None:
        if path.is_relative_to(cache):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content)

    monkeypatch.setattr(files, "write_file", forbid)
    train(make_config(tiny_checkpoint, tmp_path / "copied", tmp_path / "again", **values))
    assert adapter(tmp_path / "again") == adapter(tmp_path / "out")


def test_predict_into_a_file_that_is_being_written(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "data", {"a": dialogue("a?", "A"), "b": dialogue("b?", "B")})
    output = tmp_path / "answers.jsonl"
    words = ["predict", "--model", tiny_checkpoint, "--data", folder, "--output", output, "--max-new-tokens", 4,
             "--device", "cpu"]  # fmt: skip
    with holder(output, "beside") as other:
        assert main([str(word) for word in words]) == 2
        assert f"error[output-in-use]: {output}: in use by process {other.pid}" in capsys.readouterr().err
        assert not output.exists()
        kill(other)
    assert main([str(word) for word in words]) == 0
    assert len(output.read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "answers.jsonl.meta.json", "data"]


def test_predict_does_not_overwrite_a_file_that_happens_to_have_the_sidecars_name(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "data", {"a": dialogue("a?", "A")})
    mine = tmp_path / "answers.jsonl.meta.json"
    mine.write_text('{"mine": 1}')
    words = ["predict", "--model", tiny_checkpoint, "--data", folder, "--output", tmp_path / "answers.jsonl"]
    assert main([*map(str, words), "--device", "cpu"]) == 2
    assert "answers.jsonl.meta.json: cannot be read" in capsys.readouterr().err
    assert mine.read_text() == '{"mine": 1}'


def test_merge_into_a_folder_that_is_being_written(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = write_adapter(tiny_checkpoint, tmp_path / "adapter", targets=["language_expert_dense"])
    words = ["merge", "--model", tiny_checkpoint, "--adapter", chosen, "--output", tmp_path / "new" / "merged"]
    with holder(tmp_path / "new" / "merged", "beside") as other:
        assert main([str(word) for word in words]) == 2
        assert f"in use by process {other.pid}" in capsys.readouterr().err
        assert not (tmp_path / "new" / "merged").exists()
    assert main([str(word) for word in words]) == 0
    assert os.listdir(tmp_path / "new") == ["merged"]
    assert not list((tmp_path / "new" / "merged").glob(".*"))


@pytest.mark.parametrize("kind", ["folder", "lines"])
def test_convert_goes_on_after_a_kill(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Case 09: the same command was refused for good. Killed at each of its writes."""
    source = tmp_path / "source"
    (source / "p").mkdir(parents=True)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with (source / "x.jsonl").open("w") as lines:
        for number in range(4):
            write_image(source / "p" / f"{number}.png")
            lines.write(json.dumps({"image": f"p/{number}.png", "conversations": turns}) + "\n")
    target = tmp_path / "out" / ("y.jsonl" if kind == "lines" else "y")
    words = ["data", "convert", str(source / "x.jsonl"), str(target)]
    code = """
import os, shutil, signal, sys
from pathlib import Path
import cogtune.data.convert as convert
from cogtune.cli.main import guarded, main
point, left = int(sys.argv[1]), 0
def dying(original):
    def wrapped(*given, **options):
        global left
        for work in (lambda: None, lambda: original(*given, **options)):
            result = work()
            left += 1
            if left == point:
                os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped
convert._place = dying(convert._place)
Path.replace, Path.rename, Path.unlink = dying(Path.replace), dying(Path.rename), dying(Path.unlink)
print(main(sys.argv[2:]), left)
"""
    run = [sys.executable, "-c", code]
    whole = tmp_path / "whole"
    done = subprocess.run([*run, "0", *words[:3], str(whole / target.name)], capture_output=True, text=True, cwd=ROOT)
    points = int(done.stdout.split()[-1])
    assert points > 10
    expected = contents(whole)
    for point in range(1, points + 1, 2 if kind == "lines" else 5):
        killed = subprocess.run([*run, str(point), *words], capture_output=True, cwd=ROOT)
        assert killed.returncode == -9
        if not target.exists():  # else it was whole already
            assert main(words) == 0, capsys.readouterr().err
        assert {name: text for name, text in contents(target.parent).items() if files.MARK not in name} == expected
        shutil.rmtree(target.parent)


def test_convert_on_a_full_disk_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "data", {"a": dialogue("a?", "A"), "b": dialogue("b?", "B")})

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(source))

    monkeypatch.setattr(shutil, "copyfile", full)
    for target in ("new/c", "new/c.jsonl"):
        assert main(["data", "convert", str(folder), str(tmp_path / target)]) == 1
        said = capsys.readouterr().err
        assert f"error[disk-full]: {tmp_path / target}: no space left" in said
        assert "run the same command again" in said
        assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    assert main(["data", "convert", str(folder), str(tmp_path / "new" / "c.jsonl")]) == 0


def test_two_conversions_into_one_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "data", {"a": dialogue("a?", "A")})
    for name in ("c", "c.jsonl"):
        with holder(tmp_path / name, "beside") as other:
            assert main(["data", "convert", str(folder), str(tmp_path / name)]) == 2
            assert f"in use by process {other.pid}" in capsys.readouterr().err
        assert not (tmp_path / name).exists()


def test_a_place_that_cannot_be_written_is_no_bug(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case 07. Below /proc not even root may make anything."""
    chosen = write_adapter(tiny_checkpoint, tmp_path / "adapter", targets=["language_expert_dense"])
    place = "/proc/self/task"
    model, source = ["--model", tiny_checkpoint], ["--data", data]
    commands: list[list[object]] = [
        ["train", *model, *source, "--output", f"{place}/out"],
        ["predict", *model, *source, "--output", f"{place}/p.jsonl", "--device", "cpu"],
        ["merge", *model, "--adapter", chosen, "--output", f"{place}/merged"],
        ["data", "convert", data, f"{place}/c"],
        ["data", "convert", data, f"{place}/c.jsonl"],
        ["data", "preview", data, *model, "--html", f"{place}/x.html"],
        ["plan", "--card", "24GiB", "--write", f"{place}/x.yaml"],
        ["init", data, *model, "--output", f"{place}/x.yaml"],
        ["init", data, *model, "--output", f"{place}/new/x.yaml"],
        ["bench", "make-checkpoint", f"{place}/m", "--preset", "tiny", "--device", "cpu"],
    ]
    for command in commands:
        assert main([str(word) for word in command]) == 2, command
        said = capsys.readouterr().err
        assert f"error[output-unwritable]: {place}" in said, command
        assert "hint: " in said
        assert "Traceback" not in said


def test_a_file_that_may_not_be_read_is_no_bug(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data is refused by name; the last net names what nothing else has. Root may read everything, so the error is made
    by hand."""
    folder = write_folder(tmp_path / "data", {"a": dialogue("a?", "A")})

    def refuse(*given: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder / "images"))

    monkeypatch.setattr(saver, "save_adapter", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    assert main(["data", "check", str(folder)]) == 2
    told = capsys.readouterr()
    assert "cannot be read (Permission denied)" in told.out
    assert "Traceback" not in told.err
    assert guarded(lambda: refuse() or 0) == 1
    said = capsys.readouterr().err
    assert f"error[file-access]: {folder / 'images'}: permission denied" in said
    assert "Traceback" not in said


def test_only_its_own_files_are_replaced_without_a_word(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "data", {"a": dialogue("a?", "A")})
    commands: list[tuple[list[object], str]] = [
        (["plan", "--card", "24GiB", "--write"], "plan.yaml"),
        (["data", "preview", folder, "--model", tiny_checkpoint, "--html"], "page.html"),
    ]
    for command, name in commands:
        for _ in range(2):
            assert main([*map(str, command), str(tmp_path / name)]) == 0
        (tmp_path / name).write_text("<title>mine</title>")
        assert main([*map(str, command), str(tmp_path / name)]) == 2
        assert "did not write it" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "<title>mine</title>"
