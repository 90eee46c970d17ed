"""vLLM's answers are those of cogtune's own `generate()`, token by token, in float32 on a CPU.

A merged checkpoint of a tiny random model with an adapter on every expert, so that a row routed to the wrong expert, a
wrong position or a wrong picture changes the answer.
"""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

import cogtune
from cogtune import CogVLM2ForCausalLM, CogVLM2Processor
from cogtune.adapters.attach import attach, save_adapter
from cogtune.checkpoint.load import load_model
from cogtune.checkpoint.random import make_tiny
from cogtune.configuration.run_config import LoraSection

TOKENS = 24
SIZES = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4}  # heads of 32, which vLLM's kernels take
LENGTH = 256


def picture(number: int) -> Image.Image:
    image = Image.new("RGB", (40 + number, 30), (40 * number, 90, 200 - 30 * number))
    ImageDraw.Draw(image).ellipse((3, 3, 12 + 4 * number, 20), fill=(255, 40 * number, 0))
    return image


QUESTIONS: list[tuple[str, int | None]] = [
    ("What is this?", 1),
    ("And how many of them are there, all in all?", 3),
    ("Say hello.", None),
    ("Which colour?", 1),
]
"""Questions and the numbers of their pictures; one of them twice, one without."""


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = make_tiny(folder / "base", seed=3, **SIZES)
    wrapped = attach(load_model(base), LoraSection(rank=4, alpha=8.0, targets=("experts",)))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_adapter(wrapped, folder / "adapter")
    cogtune.merge(folder / "adapter", folder / "merged", base, layout="transformers")
    return folder / "merged"


@pytest.fixture(scope="session")
def inputs(merged: Path) -> list[dict[str, Any]]:
    processor = CogVLM2Processor.from_pretrained(merged)
    return [processor(None if number is None else picture(number), text) for text, number in QUESTIONS]


@pytest.fixture(scope="session")
def expected(merged: Path, inputs: list[dict[str, Any]]) -> list[list[int]]:
    model = CogVLM2ForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    found = []
    for row in inputs:
        length = row["input_ids"].shape[1]
        ids = model.generate(**row, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found.append(ids[0, length:].tolist())
    assert len({tuple(answer) for answer in found}) == len(found)
    return found


@pytest.mark.parametrize("batched", [None, 16], ids=["whole", "in chunks of 16 tokens"])
def test_answers_are_those_of_generate(
    merged: Path, inputs: list[dict[str, Any]], expected: list[list[int]], batched: int | None
) -> None:
    """In one batch. Chunks end within pictures and questions."""
    from vllm import LLM, SamplingParams

    chunks = {} if batched is None else {"max_num_batched_tokens": batched, "enable_chunked_prefill": True}
    llm = LLM(model=str(merged), dtype="float32", enforce_eager=True, max_model_len=LENGTH, max_num_seqs=8, **chunks)
    prompts = []
    for row, (_, number) in zip(inputs, QUESTIONS, strict=True):
        prompt: dict[str, Any] = {"prompt_token_ids": row["input_ids"][0].tolist()}
        if number is not None:
            prompt["multi_modal_data"] = {"image": picture(number)}
        prompts.append(prompt)
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS))
    assert [list(answer.outputs[0].token_ids) for answer in answers] == expected


@pytest.fixture(scope="session")
def server(merged: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", str(merged), "--served-model-name", "tuned", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", str(LENGTH), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words], env=os.environ)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "the server ended"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def message(text: str, number: int | None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    if number is not None:
        stream = io.BytesIO()
        picture(number).save(stream, "PNG")
        address = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": address}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_the_openai_server_gives_the_same(server: str, inputs: list[dict[str, Any]], expected: list[list[int]]) -> None:
    """Through the folder's own chat template; the prompt's length says that it is the same prompt."""
    from openai import OpenAI

    client = OpenAI(base_url=server, api_key="none")
    for (text, number), row, answer in zip(QUESTIONS, inputs, expected, strict=True):
        said = client.chat.completions.create(
            model="tuned", messages=[message(text, number)], temperature=0, max_tokens=TOKENS,
            extra_body={"min_tokens": TOKENS, "return_token_ids": True},
        )  # fmt: skip
        assert said.usage is not None
        assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (row["input_ids"].shape[1], TOKENS)
        assert said.choices[0].token_ids == answer  # a random model's text is no valid UTF-8


@pytest.mark.parametrize(
    ("tensor", "pipeline", "lora", "said"),
    [(2, 1, None, "one card a process"), (1, 2, None, "one card a process"), (1, 1, object(), "cogtune merge")],
)
def test_what_it_cannot_do_is_refused(tensor: int, pipeline: int, lora: object, said: str) -> None:
    from cogtune_vllm.model import require_supported

    parallel = SimpleNamespace(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    with pytest.raises(ValueError, match=said):
        require_supported(SimpleNamespace(parallel_config=parallel, lora_config=lora))
