"""The settings that decide a data set's answers; a predictions file is continued only with equal ones."""

from __future__ import annotations

from cogtune.checkpoint.fingerprint import adapter_fingerprint, model_fingerprint
from cogtune.generate.decoding import Decoding
from cogtune.generate.predict import PredictOptions
from cogtune.generate.predictions_file import AnswerSettings
from cogtune.generate.resolve import Resolved
from cogtune.processing.model_folder import tokenizer_digest


def answer_settings(
    resolved: Resolved, decoding: Decoding, options: PredictOptions, data: str, exif: str, bit_depth: str = "clip"
) -> AnswerSettings:
    """Return what decides the answers, under the names of the flags.

    Args:
        data: the fingerprint of what is asked.
        exif, bit_depth: how pictures with an EXIF orientation, or more than 8 bits a channel, were read.
    """
    config = resolved.config
    sampled: dict[str, int] = {"seed": options.seed} if decoding.sample else {}
    if decoding.sample and resolved.by_layers:
        sampled["batch-size"] = options.batch_size  # a model that is spread over devices samples per batch, not per row
    decides = {
        "model": model_fingerprint(resolved.model),
        "adapter": None if resolved.adapter is None else adapter_fingerprint(resolved.adapter),
        "data": data,
        "model.template": config.model.template,
        "model.dtype": resolved.dtype_name,
        "model.rope_precision": config.model.rope_precision,
        "own-history": options.own_history,
        "max-input-len": options.max_input_len,
        **{name.replace("_", "-"): value for name, value in decoding.to_dict().items()},
        **sampled,
    }
    decides |= {f"quant.{part}": form for part, form in config.quant.formats.items() if form != "none"}
    if config.model.tokenizer is not None:
        decides["model.tokenizer"] = tokenizer_digest(config.model.tokenizer)
    if exif != "ignore":
        decides["data.exif"] = exif
    if bit_depth != "clip":
        decides["data.bit_depth"] = bit_depth
    adapter = None if resolved.adapter is None else str(resolved.adapter)
    paths = [str(folder.path) for folder in config.data.path]
    shown = {"model": resolved.model, "adapter": adapter, "data": paths, "device": str(resolved.device)}
    return AnswerSettings(decides, shown)
