"""The same numbers on a GPU: golden fixtures, rotary tables, caches, trees, compiled layers, training."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtune import CogVLM2ForCausalLM
from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.model.compile import compile_layers, prepare_compiling
from cogtune.model.quantized.fp8 import Fp8Linear
from cogtune.model.rope import rotary_tables
from tests.support.golden import golden, golden_images, golden_model
from tests.support.trees import random_tree, samples, tree_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _exact_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _single() -> dict[str, torch.Tensor]:
    stored = golden()["single"]
    names = ("input_ids", "token_type_ids", "labels")
    batch = {name: torch.tensor([stored[name]]).cuda() for name in names}
    return batch | {"pixel_values": golden_images(1).cuda()}


def test_golden_fixtures_on_the_device() -> None:
    model, stored = golden_model().cuda(), golden()
    loss = model(**_single()).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(stored["single"]["loss"], abs=2e-5)
    parameters = dict(model.named_parameters())
    for name, expected in stored["grad_norms"].items():
        # float32 kernels of another library: measured within 1e-5
        assert float(parameters[name].grad.norm()) == pytest.approx(expected, rel=1e-4, abs=1e-9), name


def test_rotary_tables_equal_the_cpus_to_the_bit() -> None:
    table = torch.tensor(golden()["rope_bf16"]["candA"]).bfloat16()
    positions = torch.arange(0, 4096)[None]
    for here, there in zip(rotary_tables(table, positions), rotary_tables(table.cuda(), positions.cuda()), strict=True):
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation_equals_the_cpus(options: dict[str, Any]) -> None:
    model = random_model(tiny_config(), seed=1)
    rows = [[256, *[258] * 6, 70, 71], [258, 258, 256, 80, 81, 82, 83, 84, 85]]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    types = ((ids == 258) & (mask == 1)).long()
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    batch["pixel_values"] = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    plain = {key: value for key, value in options.items() if key != "cache_implementation"}
    wanted = model.generate(**batch, **settings, **plain)
    found = model.cuda().generate(**{k: v.cuda() for k, v in batch.items()}, **settings, **options)
    assert found.cpu().tolist() == wanted.tolist()


def test_a_tree_in_bfloat16_equals_its_samples() -> None:
    model = golden_model().cuda().bfloat16()
    root = random_tree(random.Random(3), bos=3, image_id=127, num_image_tokens=6, with_image=True)
    pixels = golden_images(1).cuda()
    batch = {name: tensor.cuda() for name, tensor in tree_batch([root], 127).items()}
    with torch.no_grad():
        tree = model(**batch, pixel_values=pixels, num_items_in_batch=1).loss
        rows = [{k: torch.tensor([v]).cuda() for k, v in row.items()} for row in samples(root)]
        alone = sum(model(**row, pixel_values=pixels, num_items_in_batch=1).loss for row in rows)
    assert float(tree) == pytest.approx(float(alone), rel=2e-2)  # bfloat16 keeps 8 bits, two layers


def test_compiled_layers_agree_forward_and_backward() -> None:
    def run(model: CogVLM2ForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
        loss = model(**_single()).loss
        loss.backward()
        return loss.detach(), model.model.vision.conv.weight.grad

    wanted = run(golden_model().cuda())
    model = golden_model().cuda()
    prepare_compiling(torch.device("cuda"))
    compile_layers(model, fullgraph=True)
    for found, expected in zip(run(model), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("targets", ["vision_expert_query_key_value", "experts"])
def test_compiled_bfloat16_layers_train_as_float32_ones(targets: str) -> None:
    """Heads as wide as the published model's, rows of different lengths, with and without a picture: every adapter's
    gradient, with the kernels and attention that full-size training takes."""
    from cogtune.adapters.attach import attach
    from cogtune.configuration.run_config import LoraSection

    ids = torch.randint(10, 200, (2, 60), generator=torch.Generator().manual_seed(3))
    ids[0, 1:7] = 258
    ids[1, 41:] = 256
    mask = torch.ones_like(ids)
    mask[1, 41:] = 0
    batch = {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": (ids == 258).long(),
        "labels": ids.masked_fill((ids == 258) | (mask == 0), -100),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    config = tiny_config(hidden_size=512, num_attention_heads=4, num_multi_query_heads=2, num_hidden_layers=3)

    def run(dtype: torch.dtype, compiled: bool) -> dict[str, torch.Tensor]:
        model = random_model(config, seed=1).cuda().to(dtype)
        torch.manual_seed(0)
        adapted = attach(model, LoraSection(targets=[targets], rank=4, dropout=0.0)).train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data, std=0.02)
        if compiled:
            torch._dynamo.reset()
            prepare_compiling(torch.device("cuda"))
            compile_layers(model, fullgraph=True)
        given = {name: tensor.cuda() for name, tensor in batch.items()}
        loss = adapted(**given).loss
        loss.backward()
        found = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
        return found | {"loss": loss.detach()}

    wanted, plain, found = run(torch.float32, False), run(torch.bfloat16, False), run(torch.bfloat16, True)
    assert wanted.keys() == found.keys()
    assert len(wanted) > 6

    def worst(tried: dict[str, torch.Tensor]) -> float:
        return max(float((tried[name].float() - w).norm() / w.norm().clamp(min=1e-12)) for name, w in wanted.items())

    # compiled kernels round less often than single operations do; a wrong order of heads or tokens is off by 1
    assert worst(found) < max(0.05, 1.5 * worst(plain))
    assert worst(plain) < 0.2


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs a card with fp8"
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keep_transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 401, 0])
def test_fp8_layers_agree_with_the_rounded_operands(rows: int, keep_transposed: bool, compiled: bool) -> None:
    weight, bias = torch.randn(96, 64).cuda(), torch.randn(96).cuda()
    layer = Fp8Linear.from_weight(weight, bias, keep_transposed=keep_transposed)
    run = torch.compile(layer, fullgraph=True, dynamic=True) if compiled else layer
    x = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(rows, 96, device="cuda", dtype=torch.bfloat16)
    out = run(x)
    out.backward(upstream)
    plain = Fp8Linear.from_weight(weight.cpu(), bias.cpu())
    y = x.detach().cpu().requires_grad_()
    expected = plain(y)
    expected.backward(upstream.cpu())
    # a value on the edge between two numbers of e4m3 may be rounded either way: 1/8 of one term of a long sum
    for found, wanted in ((out, expected), (x.grad, y.grad)):
        assert wanted is not None
        error = (found.detach().cpu().float() - wanted.detach().float()).norm()
        assert error <= 1e-2 * wanted.detach().float().norm()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_kernel_for_4_bits_makes_what_bitsandbytes_makes(kind: str, nested: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from cogtune.model.kernels.nf4 import dequantize_nf4
    from cogtune.model.quantized.nf4 import block_sizes

    packed, state = bnb.functional.quantize_4bit(
        torch.randn(192, 320, device="cuda", dtype=torch.bfloat16), quant_type=kind, compress_statistics=nested
    )
    outer = state.state2 if nested else None
    stored = (state.absmax, state.code, *((outer.absmax, outer.code, state.offset) if outer else (None, None, None)))
    found = dequantize_nf4(packed, stored, block_sizes(state), torch.bfloat16)
    assert torch.equal(found, bnb.functional.dequantize_4bit(packed, state))


def test_the_published_4_bit_folder_computes_the_same_on_the_device(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from cogtune.checkpoint.load import load_model
    from tests.support.batches import picture_batch
    from tests.support.packed import int4_folder

    int4_folder(tiny_checkpoint, tmp_path / "int4")
    batch = picture_batch()
    with torch.no_grad():
        wanted = load_model(tmp_path / "int4")(**batch).logits
        model = load_model(tmp_path / "int4", device="cuda")
        found = model(**{name: value.cuda() for name, value in batch.items()}).logits
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)  # float32 sums in another order


@pytest.mark.parametrize("scaled", [True, False])
def test_the_kernel_for_fp8_rounds_as_the_formula_does(scaled: bool) -> None:
    from cogtune.model.quantized.fp8 import quantize_rows

    x, columns = torch.randn(33, 6144).bfloat16(), torch.rand(6144) if scaled else None
    x[3] = 0
    wanted, scales = quantize_rows(x, columns)
    found, found_scales = quantize_rows(x.cuda(), None if columns is None else columns.cuda())
    torch.testing.assert_close(found_scales.cpu(), scales, rtol=1e-6, atol=0)
    # on an edge between two numbers of the format the last bit of a division decides
    assert (found.cpu().float() != wanted.float()).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_on_the_device_learns(tiny_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    from cogtune.configuration.load import load_config
    from cogtune.train.run import train
    from tests.support.data_folders import dialogue, write_folder

    data = write_folder(tmp_path / "data", {f"{i:04d}": dialogue("What is it?", f"Number {i % 4}.") for i in range(16)})
    config = load_config(
        None,
        {
            "model.path": str(tiny_checkpoint), "data.path": [str(data)], "train.output": str(tmp_path / "out"),
            "model.dtype": dtype, "train.epochs": "6", "train.batch_size": "4", "train.lr": "0.01",
            "data.validation_share": "0", "data.workers": "0",
        },
    )  # fmt: skip
    train(config)
    import json

    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line.get("kind", line.get("type")) == "train"]
    assert losses[-1] < losses[0]
    shutil.rmtree(tmp_path / "out")
