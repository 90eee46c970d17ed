"""Base class of all CogVLM2 models: initialisation, strict loading, and the published file layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from cogtune.configuration.model import CogVLM2Config
from cogtune.errors import CheckpointError
from cogtune.language import tr
from cogtune.model.rope import RotaryEmbedding, inverse_frequencies

PUBLISHED_SHARD_SIZE = "5GB"
NAMES_SHOWN = 8


class CogVLM2PreTrainedModel(PreTrainedModel):
    """Base class. Loading is strict, because a silently missing tensor gives wrong answers later."""

    config_class = CogVLM2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "VisionLayer", "PatchEmbedding", "GLUAdapter"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module's tensors. transformers calls this for tensors that a checkpoint lacks and for new
        models."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, inverse_frequencies(module.head_dim, module.theta, module.inv_freq.device))
        else:
            self._init_own_parameters(module, std)

    def _init_own_parameters(self, module: nn.Module, std: float) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight":  # the RMS norms
                init.ones_(parameter)
            else:  # class token, begin- and end-of-image
                init.normal_(parameter, mean=0.0, std=std)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or hub id like the base class, but require every tensor to fit.

        Raises:
            CheckpointError: a tensor is missing, left over or of the wrong shape, or the stored rotary tables of the
                layers differ; the message names the tensors.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("ignore_mismatched_sizes", True)  # require_exact reports all mismatches at once
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        require_exact(str(pretrained_model_name_or_path), info)
        model.remember_rotary()
        return (model, info) if with_info else model

    def remember_rotary(self) -> None:
        """Store the current rotary frequencies, out of reach of later casts of the model.

        Raises:
            CheckpointError: the layers' stored copies differ.
        """
        copies = {n: m.inv_freq for n, m in self.named_modules() if isinstance(m, RotaryEmbedding)}
        tensors = list(copies.values())
        if not tensors or any(tensor.is_meta for tensor in tensors):
            return
        different = [name for name, tensor in copies.items() if not torch.equal(tensor.cpu(), tensors[0].cpu())]
        if different:
            raise CheckpointError(
                tr(
                    "{different}.inv_freq differs from {next}.inv_freq; all layers share one table",
                    different=different[0],
                    next=next(iter(copies)),
                ),
                hint=tr("the checkpoint is damaged or was edited; fetch it again"),
                code="checkpoint-rotary",
            )
        decoder: Any = getattr(self, self.base_model_prefix, self)
        decoder.rotary_frequencies = tensors[0].detach().clone()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the published tensor names in shards of the published size."""
        kwargs.setdefault("max_shard_size", PUBLISHED_SHARD_SIZE)
        return super().save_pretrained(save_directory, *args, **kwargs)


def require_exact(where: str, info: dict[str, Any]) -> None:
    """Raise CheckpointError if a loading report, in transformers' form, lists tensors that do not fit."""
    problems = []
    for kind, keys in (("missing", info["missing_keys"]), (tr("left over"), info["unexpected_keys"])):
        if keys:
            problems.append(f"{len(keys)} {kind}: {_some(sorted(keys))}")
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        described = [
            tr("{name} has shape {found}, expected {wanted}", name=name, found=list(found), wanted=list(wanted))
            for name, found, wanted in mismatched
        ]
        problems.append(
            tr("{mismatched} of the wrong shape: {some}", mismatched=len(mismatched), some=_some(described))
        )
    if info.get("error_msgs"):
        problems.append(_some([str(message) for message in info["error_msgs"]]))
    if problems:
        raise CheckpointError(
            tr("{where}: the tensors do not fit the model; ", where=where) + "; ".join(problems),
            hint=tr("check that config.json belongs to these shards and that every shard is complete"),
            code="checkpoint-tensors",
        )


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
