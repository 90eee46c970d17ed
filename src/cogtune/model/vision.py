"""The vision tower: EVA2-CLIP-E without its last block, a 2x2 convolution, and the GLU adapter.

The first generation has no convolution: each patch is a grid cell.

Shapes: N images, P patches + cls, W tower width, Q grid cells (2304 at full size, after the convolution), D hidden.

The tower's norms act on each sublayer's output, before the residual; there is no norm before the first block and none
after the last. What the tower computes up to the convolution never changes while it is frozen: that is the
cacheable output, `VisionModel.features`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeGuard

import torch
from torch import nn
from torch.nn import functional

from cogtune.configuration.model import CogVLM2Config, CogVLM2VisionConfig
from cogtune.configuration.shapes import TOWER_PARTS
from cogtune.model.activation_offloading import OffloadingLayer
from cogtune.model.attention import attend
from cogtune.model.kernels import HAS_TRITON, kernel_available
from cogtune.model.quantized.fp8 import Fp8Linear

if HAS_TRITON:
    from cogtune.model.kernels import add_norm


def _convolutions_in(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context in which convolutions of ``dtype`` are computed in it.

    By default torch lets cuDNN round float32 operands to TF32's 10 bits, and cuDNN does for some batch sizes and not
    for others: the tower's output then differs by 2.6e-4 between a picture alone and beside another (docs/log.md).
    """
    cudnn = torch.backends.cudnn
    if dtype != torch.float32:
        return nullcontext()
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    found: AbstractContextManager[None] = cudnn.flags(**kept, allow_tf32=False)
    return found


class PatchEmbedding(nn.Module):
    """Patch projection with the class token in front and learned position embeddings."""

    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.cls_embedding = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map pixels [N, 3, side, side] to patches [N, P, W]."""
        patches = self.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_embedding.expand(pixels.shape[0], 1, -1), patches], dim=1)
        # Call the module, do not read its weight: hooks that load an offloaded weight run in the call.
        places = torch.arange(self.position_embedding.num_embeddings, device=x.device)
        return x + self.position_embedding(places)[None]


class VisionAttention(nn.Module):
    """Full attention over all patches; the fused projection is laid out as (q | k | v, heads, width)."""

    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_NPW: torch.Tensor) -> torch.Tensor:
        images, patches, _ = x_NPW.shape
        qkv = _apply(self.query_key_value, x_NPW).view(images, patches, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        context = attend(q, k, v)
        return _apply(self.dense, context.transpose(1, 2).flatten(2))


def _apply(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return layer(x). The tower's inputs come from kernels of its own, so an fp8 layer rounds them by one as well."""
    if isinstance(layer, Fp8Linear) and not (torch.is_grad_enabled() and x.requires_grad):
        return layer.of_rows(x)
    result: torch.Tensor = layer(x)
    return result


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x))), with the exact GELU unless cuBLAS applies it (`_product_with_gelu`)."""

    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if _fits_epilogue(self.fc1, x):
            return self.fc2(_product_with_gelu(self.fc1, x))
        inner = _apply(self.fc1, x)
        if isinstance(self.fc2, Fp8Linear) and not inner.requires_grad:
            return self.fc2.of_gelu(inner)
        return self.fc2(functional.gelu(inner))


def _fits_epilogue(layer: nn.Module, x: torch.Tensor) -> TypeGuard[nn.Linear]:
    """Return whether cuBLAS can apply the GELU inside the product of ``layer`` with x.

    That is a plain linear layer in bfloat16, with its whole weight on x's GPU and without gradients.
    """
    if type(layer) is not nn.Linear or layer.bias is None or not (x.is_cuda and x.shape[0]):
        return False
    given = (x, layer.weight, layer.bias)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    whole = layer.weight.shape == (layer.out_features, x.shape[-1])  # under ZeRO-3 the weight may be a shard
    alike = all(tensor.device == x.device and tensor.dtype == x.dtype for tensor in given)
    return whole and alike and not trains and x.dtype == torch.bfloat16


def _product_with_gelu(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return the GELU of the layer's output for x [..., I], applied to the product's float32 sums.

    It is GELU's tanh form, off by up to 5e-4, which is less than what rounding the sums to bfloat16 first costs the
    exact GELU (docs/log.md). torch has no public function for it (decision 17).
    """
    found = torch._addmm_activation(layer.bias, x.reshape(-1, x.shape[-1]), layer.weight.t(), use_gelu=True)
    return found.view(*x.shape[:-1], layer.out_features)


def _add_norm(x: torch.Tensor, update: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """Return x + norm(update). Without gradients, on a GPU with Triton, one fused kernel reads each input once."""
    if not _fits_kernel(x, update, norm):
        return x + norm(update).to(x.dtype)
    assert isinstance(norm, nn.LayerNorm)
    rows = x.reshape(-1, x.shape[-1]).contiguous(), update.reshape(-1, x.shape[-1]).contiguous()
    return add_norm.add_norm_on_gpu(*rows, norm.weight, norm.bias, norm.eps).view(x.shape)


def _fits_kernel(x: torch.Tensor, update: torch.Tensor, norm: nn.Module) -> bool:
    if not (kernel_available(x) and x.shape[0]) or type(norm) is not nn.LayerNorm:
        return False
    width = x.shape[-1]
    whole = norm.weight.numel() == width  # under ZeRO-3 the weight may be a shard
    given = (x, update, norm.weight, norm.bias)
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return whole and not trains and width <= add_norm.WIDEST and x.dtype == update.dtype


class VisionLayer(OffloadingLayer):
    """x + LN(attention(x)), then x + LN(MLP(x)). Autocast computes norms in float32; they are cast back to x's
    dtype."""

    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_NPW: torch.Tensor) -> torch.Tensor:
        return self.compute(x_NPW)

    def compute(self, x_NPW: torch.Tensor) -> torch.Tensor:
        """Run the layer without activation checkpointing. This is the part that ``model.compile`` compiles."""
        x = _add_norm(x_NPW, self.attention(x_NPW), self.input_layernorm)
        return _add_norm(x, self.mlp(x), self.post_attention_layernorm)


class VisionTransformer(nn.Module):
    """The tower's blocks."""

    def __init__(self, config: CogVLM2VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([VisionLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, x_NPW: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_NPW = layer(x_NPW)
        return x_NPW


class GLUAdapter(nn.Module):
    """Gated MLP from tower width to decoder width. Its norm uses PyTorch's default eps of 1e-5, not the tower's."""

    def __init__(self, config: CogVLM2Config, vision: CogVLM2VisionConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.linear_proj = nn.Linear(vision.hidden_size, hidden, bias=False)
        self.norm1 = nn.LayerNorm(hidden)
        self.dense_h_to_4h = nn.Linear(hidden, inner, bias=False)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected = self.linear_proj(x)
        h = functional.gelu(self.norm1(projected).to(projected.dtype))
        return self.dense_4h_to_h(functional.silu(self.gate_proj(h)) * self.dense_h_to_4h(h))


class VisionModel(nn.Module):
    """Map pixels to the tokens that the decoder reads: boi, the grid row by row, eoi."""

    def __init__(self, config: CogVLM2Config) -> None:
        super().__init__()
        vision = config.vision_config
        assert isinstance(vision, CogVLM2VisionConfig)
        self.grid, self.width = config.grid, vision.hidden_size
        self.patch_embedding = PatchEmbedding(vision)
        self.transformer = VisionTransformer(vision)
        self.conv = (
            nn.Conv2d(vision.hidden_size, vision.hidden_size, kernel_size=2, stride=2) if config.downsamples else None
        )
        self.linear_proj = GLUAdapter(config, vision)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.sharded = False  # set by engines that all-gather weights: every part then runs in every forward pass

    @property
    def has_tower(self) -> bool:
        """Whether the tower is loaded. Without it the model accepts only the tower's cached output."""
        return hasattr(self, "transformer")

    def drop_tower(self) -> None:
        """Delete everything in front of the adapter."""
        for name in TOWER_PARTS:
            if hasattr(self, name):
                delattr(self, name)

    def tower_trains(self) -> bool:
        """Return whether any parameter in front of the adapter is trained; only then does the tower run with
        gradients."""
        parts = [getattr(self, name) for name in TOWER_PARTS] if self.has_tower else []
        return any(parameter.requires_grad for part in parts if part is not None for parameter in part.parameters())

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the tower's cacheable output [N, Q, W] from pixels [N, 3, side, side]."""
        if not self.has_tower:
            raise ValueError("this model was loaded without its vision tower: give image_features, not pixel_values")
        dtype = self.patch_embedding.proj.weight.dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tower_trains()), _convolutions_in(dtype):
            x = self.transformer(self.patch_embedding(pixel_values.to(dtype)))
            if self.conv is None:
                return x[:, 1:]
            images, patches, width = x.shape
            side = int((patches - 1) ** 0.5)
            x = x[:, 1:].transpose(1, 2).reshape(images, width, side, side)
            return self.conv(x).flatten(2).transpose(1, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Apply the adapter and add boi and eoi: [N, Q, W] -> [N, Q + 2, D]."""
        x = self.linear_proj(features.to(self.boi.dtype))
        images = x.shape[0]
        return torch.cat([self.boi.expand(images, -1, -1), x, self.eoi.expand(images, -1, -1)], dim=1)
