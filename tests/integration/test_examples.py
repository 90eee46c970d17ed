"""The examples run, shortened, from data to a report."""

from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cogtune import CogVLM2ForCausalLM, CogVLM2Processor
from cogtune.processing.tokenizer import write_byte_tokenizer
from tests.docs.pages import ROOT

EXAMPLES = ROOT / "examples"


def run(words: list[str], **environment: str) -> str:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_reading_digits(tmp_path: Path) -> None:
    pytest.importorskip("jiwer")
    said = run(
        [str(EXAMPLES / "read_digits.py"), "--output", str(tmp_path), "--pictures", "40", "--epochs", "1", "--drawn"]
    )  # fmt: skip
    assert "points of CER" in said
    assert (tmp_path / "run" / "report.html").is_file()
    result = json.loads((tmp_path / "run" / "eval" / "eval.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in result["metrics"]] == ["cer", "exact"]


def test_rows_of_a_file_of_digits(tmp_path: Path) -> None:
    """MNIST's form: 784 pixels and the digit. Digit D is a block of D + 1 columns; the test has copies of its own."""
    pixels = np.zeros((20, 785), dtype=int)
    for place in range(20):
        digit = place // 2 if place % 10 else 0
        pixels[place, :784].reshape(28, 28)[4:24, 4 : 5 + digit] = 255
        pixels[place, 784] = digit
    np.savetxt(tmp_path / "digits.csv.gz", pixels, delimiter=",", fmt="%d")
    example = runpy.run_path(str(EXAMPLES / "read_digits.py"))
    for_training, for_test = example["mnist_rows"](tmp_path / "digits.csv.gz")
    rng = random.Random(0)
    for _ in range(20):
        picture, text = for_training(rng)
        black = (np.asarray(picture.convert("L")) == 0).any(axis=0).sum()
        assert 1 <= len(text) <= 3
        assert black == sum(int(digit) + 1 for digit in text)
    assert {for_test(rng)[1].strip("0") for _ in range(20)} == {""}, "each tenth digit of the file, and no other"


def test_the_notebook(tmp_path: Path) -> None:
    """Its code cells, one after the other, without a notebook's server."""
    cells = json.loads((EXAMPLES / "easy_vqa.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / "notebook.py"
    script.write_text(code, encoding="utf-8")
    said = run([str(script)], EXAMPLE_OUTPUT=str(tmp_path / "out"), EXAMPLE_PICTURES="40")
    assert "exact match" in said
    assert (tmp_path / "out" / "run" / "eval" / "report.html").is_file()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model of SmolLM2's kind: Llama with a tied head and a rope base of its own."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, tie_word_embeddings=True,
        bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def test_a_language_model_that_learns_to_see_and_then_a_task(tmp_path: Path, llama: Path) -> None:
    sizes = ["--posters", "16", "--name-steps", "2", "--steps", "3", "--batch", "4", "--workers", "0"]
    sizes += ["--task-posters", "20", "--epochs", "1"]
    said = run([str(EXAMPLES / "smollm2.py"), "--output", str(tmp_path), "--llama", str(llama), *sizes])
    assert "names: step 2/2" in said
    assert "descriptions: step 3/3" in said
    assert "known-words/images" in said
    assert "new-words/images" in said
    assert (tmp_path / "run" / "report.html").is_file()

    base = CogVLM2ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert (base.config.rope_theta, base.config.rope_precision) == (1e5, "float32")
    own = LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        for weight in own.parameters():
            weight.copy_(weight.bfloat16())  # as the base is saved
        ids = CogVLM2Processor.from_pretrained(tmp_path / "base")(None, "Why?")["input_ids"]
        # float32, another order of the same sums
        torch.testing.assert_close(base(ids).logits, own(ids).logits, rtol=0, atol=5e-5)
