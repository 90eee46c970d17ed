"""A program that ends while an answer is being computed ends well; PyTorch used to abort it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from cogtune.checkpoint.load import load_model
from cogtune.generate.decoding import Decoding
from cogtune.generate.generator import Generator
from cogtune.generate.transformers_generator import TransformersGenerator
from cogtune.processing.processor import CogVLM2Processor

kind, base = {"Generator": Generator, "TransformersGenerator": TransformersGenerator}[sys.argv[1]], sys.argv[2]
generator = kind(load_model(base), CogVLM2Processor.from_pretrained(base))
answer = generator.stream(None, "Hello", decoding=Decoding(max_new_tokens=1500))
print(bool(next(answer)))
"""


@pytest.mark.parametrize("kind", ["Generator", "TransformersGenerator"])
def test_a_program_may_end_within_an_answer(tiny_checkpoint: Path, kind: str) -> None:
    command = [sys.executable, "-c", PROGRAM, kind, str(tiny_checkpoint)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "True"), ended.stderr[-2000:]
