"""What forward refuses, what it leaves out, and that checkpointing, compiling and casting change nothing."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cogtune import CogVLM2ForCausalLM
from cogtune.adapters.attach import attach
from cogtune.checkpoint.random import random_model, tiny_config
from cogtune.configuration.run_config import LoraSection
from cogtune.model.compile import compile_layers, compiled_graphs, prepare_compiling, uncollected
from cogtune.model.routing import GPU_COLUMNS, Routing

BOS, IMAGE = 256, 258


def _model(**changes: Any) -> CogVLM2ForCausalLM:
    return random_model(tiny_config(**changes), seed=2)


def _batch(images: int = 2) -> dict[str, torch.Tensor]:
    rows = [[BOS, *[IMAGE] * 6, 65, 66, 67, 68], [BOS, *[IMAGE] * 6, 75, 76, IMAGE, IMAGE]]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    types = ((ids == IMAGE) & (mask == 1)).long()
    labels = torch.where((mask == 1) & (torch.arange(11) > 7), ids, -100)
    pixels = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def _loss_and_gradients(model: CogVLM2ForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    loss = model(**batch).loss
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return loss.detach(), flat


def test_features_equal_pixels_and_both_are_refused() -> None:
    model, batch = _model(), _batch()
    wanted = model(**batch).loss
    pixels = batch.pop("pixel_values")
    features = model.model.encode_images(pixels).detach()
    torch.testing.assert_close(model(**batch, image_features=features).loss, wanted)
    with pytest.raises(ValueError, match="two forms"):
        model(**batch, pixel_values=pixels, image_features=features)


def test_images_are_counted_against_their_tokens() -> None:
    model, batch = _model(), _batch()
    with pytest.raises(ValueError, match=r"1 images need 6 image tokens .*marks 12"):
        model(**(batch | {"pixel_values": batch["pixel_values"][:1]}))
    batch.pop("pixel_values")
    with pytest.raises(ValueError, match="0 images need 0"):
        model(**batch)
    ids = torch.tensor([[BOS, *[IMAGE] * 4, 65, IMAGE, IMAGE, 66]])
    with pytest.raises(ValueError, match="not whole images"):
        model(ids, (ids == IMAGE).long(), pixel_values=torch.randn(1, 3, 8, 8))


def test_routing_from_a_collator_is_the_same() -> None:
    model, batch = _model(), _batch()
    names = ("token_type_ids", "attention_mask", "labels")
    routing = Routing.build(**{name: batch[name] for name in names})
    assert model(**batch, routing=routing).loss == model(**batch).loss


def test_sum_over_a_given_count() -> None:
    model, batch = _model(), _batch()
    count = int((batch["labels"] != -100).sum())
    torch.testing.assert_close(model(**batch, num_items_in_batch=10).loss * 10, model(**batch).loss * count)


@pytest.mark.parametrize("count", [7, None])
def test_no_label_is_zero_not_nan_and_has_a_gradient(count: int | None) -> None:
    model = _model().train()
    ids = torch.tensor([[BOS]])
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=count).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_every_trained_part_takes_part_in_a_batch_without_images() -> None:
    """Both experts in every layer, the adapter and the live tower get a (zero) gradient from a text-only row, so that
    no rank waits for another's collective."""
    model = _model().train()
    ids = torch.tensor([[BOS, 65, 66]])
    model(ids, labels=torch.tensor([[-100, 65, 66]])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_a_frozen_tower_runs_without_gradient() -> None:
    model, batch = _model().train(), _batch()
    vision = model.model.vision
    for part in (vision.patch_embedding, vision.transformer, vision.conv):
        part.requires_grad_(False)
    assert not model.model.encode_images(batch["pixel_values"]).requires_grad
    vision.transformer.layers[1].mlp.fc1.weight.requires_grad_(True)
    assert model.model.encode_images(batch["pixel_values"]).requires_grad


def test_the_last_layer_leaves_out_dead_work() -> None:
    """Only tokens a label is predicted from reach the last layer's projections and the head."""
    model, batch = _model(), _batch()
    seen: dict[str, int] = {}
    layer = model.model.layers[-1]
    for name, module in (
        ("vision dense", layer.self_attn.vision_expert_dense),
        ("language dense", layer.self_attn.language_expert_dense),
        ("vision mlp", layer.mlp.vision_mlp),
        ("language mlp", layer.mlp.language_mlp),
        ("head", model.lm_head),
    ):
        module.register_forward_hook(lambda _m, args, _o, name=name: seen.update({name: args[0].shape[0]}))
    model(**batch)
    labelled = int((batch["labels"] != -100).sum())
    assert seen == {
        "vision dense": 0,
        "language dense": labelled,
        "vision mlp": 0,
        "language mlp": labelled,
        "head": labelled,
    }


def test_layers_compile_without_a_break_and_agree() -> None:
    """No host sync, no data-dependent branch: each layer is one graph, reused for other sizes of slices and rows."""
    model, batch = _model(), _batch()
    wanted = [_loss_and_gradients(model, batch)]
    text = {"input_ids": torch.tensor([[BOS, 65, 66, 67]]), "labels": torch.tensor([[-100, 65, 66, 67]])}
    wanted.append(_loss_and_gradients(model, text))
    prepare_compiling(torch.device("cpu"))
    compile_layers(model, "eager", fullgraph=True)  # tracing is what is tested here, not code generation
    for inputs, (loss, gradients) in zip((batch, text), wanted, strict=True):
        found_loss, found = _loss_and_gradients(model, inputs)
        torch.testing.assert_close(found_loss, loss)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)


def test_rows_that_fill_their_columns_are_no_kind_of_their_own() -> None:
    """On a GPU one row in 64 does; a run would stop in the middle to compile its layers once more."""
    model, graphs = _model(), compiled_graphs()
    prepare_compiling(torch.device("cpu"))
    compile_layers(model, "eager")
    for length in (100, 77, 128):
        ids = torch.full((2, length), 65)
        labels = torch.where(torch.arange(length) < length - 20, -100, ids)
        routing = Routing.build(torch.zeros_like(ids), labels=labels, column_multiple=GPU_COLUMNS)
        model(ids, labels=labels, routing=routing).loss.backward()
        assert routing.num_columns == 128
        if length == 100:
            graphs = compiled_graphs()
    assert compiled_graphs() == graphs


def test_the_first_layer_is_the_compilers_kind_of_the_others_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its input has a gradient too, which nothing reads and which changes no other one."""
    seen: list[bool] = []

    def traced(compute: Any, **_: Any) -> Any:
        def called(layer: torch.nn.Module, hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
            if arguments:  # a decoder layer
                seen.append(hidden.requires_grad)
            found: torch.Tensor = compute(layer, hidden, *arguments)
            return found

        return called

    monkeypatch.setattr(torch, "compile", traced)
    prepare_compiling(torch.device("cpu"))
    gradients = []
    for asked in (False, True):
        torch.manual_seed(0)
        adapted = attach(_model(num_hidden_layers=3), LoraSection(dropout=0))
        compile_layers(adapted.get_base_model(), first_as_others=asked)
        adapted(**_batch()).loss.backward()
        with torch.no_grad():
            adapted(**_batch())
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert seen == [False, True, True, *[False] * 3, True, True, True, *[False] * 3]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_pauses_for_a_block_and_is_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(ZeroDivisionError), uncollected():
            _ = 1 / 0
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_to_the_compiler_a_layers_numbers_are_constants() -> None:
    """As inputs they would be tensors on the CPU, each with kernels of its own to compile and to start."""
    inputs: list[object] = []

    def backend(graph: torch.fx.GraphModule, examples: list[object]) -> object:
        inputs.extend(examples)
        return graph.forward

    model = attach(_model(num_hidden_layers=1), LoraSection(targets=["experts"]))
    prepare_compiling(torch.device("cpu"))
    compile_layers(model.get_base_model(), backend)
    model(**_batch())
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    assert tensors
    assert not [value for value in tensors if value.dim() == 0]


def test_compiled_layers_train_under_ddp_whatever_its_buckets(tmp_path: Path) -> None:
    """Buckets smaller than a layer: the compiler must not cut layers at their borders."""
    model = _model(num_hidden_layers=1)
    model.model.vision.requires_grad_(False)
    prepare_compiling(torch.device("cpu"))
    compile_layers(model, "eager")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.002)
        ids = torch.tensor([[BOS, 65, 66, 67]])
        wrapped(input_ids=ids, labels=ids).loss.backward()
    finally:
        dist.destroy_process_group()
    assert model.model.layers[0].mlp.language_mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("name", ["inputs_embeds", "output_attentions", "output_hidden_states"])
def test_unsupported_arguments_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        _model()(torch.tensor([[BOS, 65]]), **{name: True})


def test_trees_and_labels_do_not_go_with_a_cache() -> None:
    ids = torch.tensor([[BOS, 65]])
    with pytest.raises(ValueError, match="cache"):
        _model()(ids, labels=ids, use_cache=True)
    cache = _model()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="must be text"):
        _model()(ids, torch.ones_like(ids), past_key_values=cache)


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_no_later_cast_changes_the_rotary_tables(loaded: torch.dtype) -> None:
    model = _model()
    table = model.model.rotary_frequencies
    if loaded == torch.bfloat16:
        state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        model = CogVLM2ForCausalLM(tiny_config()).to(torch.bfloat16)
        model.load_state_dict(state)
        table = model.model.rotary_frequencies
        assert table.dtype == torch.bfloat16
    positions = torch.arange(0, 2000, 7)[None]
    wanted = model.model.rotary(positions, torch.float32)
    for other in (torch.float32, torch.bfloat16, torch.float16):
        model.to(other)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.model.rotary(positions, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_float32_rope_is_an_option() -> None:
    state = _model().state_dict()
    exact, stored = _model(rope_precision="float32"), CogVLM2ForCausalLM(tiny_config()).to(torch.bfloat16)
    stored.load_state_dict({name: tensor.bfloat16() for name, tensor in state.items()})
    positions = torch.tensor([[5, 300, 1000]])
    fine, coarse = exact.model.rotary(positions, torch.float32)[0], stored.model.rotary(positions, torch.float32)[0]
    assert fine.dtype == torch.float32
    assert (fine - coarse).abs().max() > 0.05  # bfloat16 positions collide above 256
    frequencies = 500000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(fine[0, 0], (positions[0, :, None] * frequencies).cos(), rtol=0, atol=1e-4)


def test_autocast_keeps_the_residual_streams_dtype() -> None:
    model, batch = _model().to(torch.bfloat16), _batch()
    dtypes = set()
    for layer in [*model.model.layers, *model.model.vision.transformer.layers]:
        layer.register_forward_hook(lambda _m, _a, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch)
    assert dtypes == {torch.bfloat16}


def test_only_preparing_changes_the_compiler_of_the_process() -> None:
    compiler = torch._dynamo.config
    with compiler.patch(optimize_ddp=True, specialize_float=False, recompile_limit=8):
        with pytest.raises(RuntimeError, match="prepare_compiling has to come before"):
            compile_layers(_model(num_hidden_layers=1), "eager")
        assert (compiler.optimize_ddp, compiler.specialize_float, compiler.recompile_limit) == (True, False, 8)
        prepare_compiling(torch.device("cpu"))
        compile_layers(_model(num_hidden_layers=1), "eager")
        assert (compiler.optimize_ddp, compiler.specialize_float, compiler.recompile_limit) == (False, True, 64)


@pytest.mark.parametrize(("dtype", "rounds"), [(torch.float32, False), (torch.bfloat16, True)])
def test_the_towers_float32_convolutions_are_not_rounded(dtype, rounds):
    """cuDNN may otherwise take TF32, for some batch sizes; a GPU test compares the outputs."""
    model = random_model(tiny_config(), seed=0).to(dtype)
    seen = []
    for module in (model.model.vision.patch_embedding.proj, model.model.vision.conv):
        module.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    model.model.encode_images(torch.randn(1, 3, 8, 8))
    assert seen == [rounds, rounds]
    assert torch.backends.cudnn.allow_tf32
