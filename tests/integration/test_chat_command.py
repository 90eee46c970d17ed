"""`cogtune chat` and `peft_infer.py` as they are typed, with piped input."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

import peft_infer
from cogtune.checkpoint.random import make_tiny
from cogtune.cli.main import main
from cogtune.generate.last_run import write_last_run
from tests.support.adapters import write_adapter
from tests.support.data_folders import write_image

SHORT = ["--greedy", "--max-new-tokens", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_checkpoint, tmp_path_factory.mktemp("run") / "adapter", size=0.3)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return write_image(tmp_path / "picture.PNG")


class Typed:
    """Runs a command with given input lines; exit code, answers (stdout) and notes (stderr)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *arguments: object, lines: str = "") -> tuple[int, str, str]:
        self.monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        self.capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return code, out, err


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    return Typed(monkeypatch, capsys)


def test_piped_questions_give_answers_on_stdout_and_the_rest_on_stderr(
    typed: Typed, tiny_checkpoint: Path, picture: Path
) -> None:
    lines = f"hello\n/image /no/such.png\n/image {picture}\nwhat is it?\n/clear\nhello\n/quit\nnot asked\n"
    code, out, err = typed("chat", "--model", tiny_checkpoint, *SHORT, lines=lines)
    assert code == 0
    answers = out.split("\n")
    assert len(answers) == 4
    assert answers[0] == answers[2] != answers[1]
    assert answers[3] == ""
    assert "/no/such.png: no such picture" in err
    assert "picture.PNG (24 x 16)" in err


def test_one_question_by_flags_is_the_same_as_by_lines(
    typed: Typed, tiny_checkpoint: Path, adapter: Path, picture: Path
) -> None:
    chosen = ["chat", "--model", tiny_checkpoint, "--adapter", adapter, *SHORT]
    _, by_lines, _ = typed(*chosen, lines=f"/image {picture}\nwhat is it?\n")
    code, by_flags, _ = typed(*chosen, "--image", picture, "--query", "what is it?")
    assert (code, by_flags) == (0, by_lines)
    _, plain, _ = typed("chat", "--model", tiny_checkpoint, *SHORT, "--image", picture, "--query", "what is it?")
    assert plain != by_flags


def test_keys_and_files_reach_a_chat(typed: Typed, tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    picture = tmp_path / "turned.jpg"
    image = Image.new("RGB", (24, 16))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(picture, exif=exif)
    asked = ["--image", picture, "--query", "what is it?"]
    code, by_flags, err = typed(
        "chat", "--model", tiny_checkpoint, "--adapter", adapter, *SHORT, *asked, "--data.exif", "apply"
    )
    assert (code, "turned.jpg (16 x 24)" in err) == (0, True)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {tiny_checkpoint}}}\ndata: {{exif: apply, path: elsewhere}}\ntrain: {{lr: 1}}\n"
        f"generate: {{adapter: {adapter.parent}, greedy: true, max_new_tokens: 8, device: cpu}}\n"
    )
    assert typed("chat", file, *asked)[:2] == (0, by_flags)
    code, plain, err = typed("chat", file, *asked, "--adapter", "null")
    assert code == 0
    assert plain != by_flags
    assert "names no adapter" in err


def test_sampling_is_the_checkpoints_default_and_follows_the_seed(typed: Typed, tiny_checkpoint: Path) -> None:
    chosen = ["chat", "--model", tiny_checkpoint, "--max-new-tokens", "12", "--query", "hello"]
    one, two, other = (typed(*chosen, "--seed", seed)[1] for seed in (1, 1, 2))
    assert one == two != other


def test_wrong_input_is_exit_2_with_a_remedy(
    typed: Typed, tiny_checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    other = make_tiny(tmp_path / "other", hidden_size=32, num_attention_heads=2, num_multi_query_heads=1)
    cases = {
        "error[image-missing]: /no/such.png": ["--model", tiny_checkpoint, "--image", "/no/such.png"],
        "error[checkpoint-missing]: /no/base": ["--model", "/no/base"],
        "error[config-missing]: no model given": [],
        "error[adapter-base]": ["--model", other, "--adapter", adapter],
        "error[config-contradiction]: generate.greedy takes the likeliest": [
            "--model",
            tiny_checkpoint,
            "--greedy",
            "--top-k",
            "3",
        ],
        "error[config-unknown-key]: unknown flag `--no-such-flag`": ["--no-such-flag"],
    }
    for message, arguments in cases.items():
        code, out, err = typed("chat", *arguments, lines="hello\n")
        assert code == 2, err
        assert message in err
        assert out == ""
        assert "Traceback" not in err


def test_ctrl_c_at_the_prompt_is_130(typed: Typed, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cogtune.cli.chat._read_line", pressed)
    assert typed("chat", "--model", tiny_checkpoint, *SHORT)[0] == 130


def test_peft_infer_talks_to_the_last_training(
    typed: Typed, tiny_checkpoint: Path, adapter: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    code, _, err = typed(*peft_infer.arguments([]))
    assert code == 2
    assert "no finished training is remembered" in err
    assert write_last_run(tiny_checkpoint, adapter, adapter.parent)
    lines = f"/image {picture}\nwhat is it?\n"
    code, out, err = typed(*peft_infer.arguments(SHORT), lines=lines)
    assert code == 0
    assert str(adapter.parent) in err
    named = ["--model_path", str(tiny_checkpoint), "--peft_model_path", str(adapter), "--torch_type", "torch.float32"]
    asked = ["--image", str(picture), "--query", "what is it?"]
    assert typed(*peft_infer.arguments([*named, *asked, *SHORT]))[1] == out
