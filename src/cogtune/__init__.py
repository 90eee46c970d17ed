"""Fine-tune CogVLM2 with LoRA and run the result.

    >>> import cogtune
    >>> config = cogtune.load_config(None, {"model": "cogvlm2", "data": "my-data", "output": "output", "lora.rank": 8})
    >>> print(cogtune.plan(config, card="24GiB"))
    >>> result = cogtune.train(config)
    >>> print(cogtune.evaluate("my-test-data", adapter=result.adapter, against="base").verdict)
    >>> generator = cogtune.load_generator(adapter=result.adapter)
    >>> print(generator.answer("photo.jpg", "What is this?"))
    >>> cogtune.merge(adapter=result.adapter, output="merged")

Functions: `load_config` reads a run's configuration, `plan` predicts its memory and time, `train` fine-tunes,
`evaluate` measures answers, `load_generator` loads a model that answers, `merge` writes a full model,
`export_adapter` a folder to give away; `load_rows` and `collate_rows` give a run's rows to a training loop of your own.
Classes as in transformers: `CogVLM2ForCausalLM` (``from_pretrained`` also takes an adapter's folder),
`CogVLM2Processor`, `CogVLM2Config`; and `RunConfig`, a whole configuration. ``help`` on each says more;
docs/guides/python.md shows them at work.

Everything is imported on first use. After ``import cogtune``, transformers' Auto classes know CogVLM2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cogtune.system.import_hooks import import_after

if TYPE_CHECKING:
    from cogtune.adapters.merge import merge
    from cogtune.configuration.load import load_config
    from cogtune.configuration.model import CogVLM2Config
    from cogtune.configuration.run_config import RunConfig
    from cogtune.data.training_rows import collate_rows, load_rows
    from cogtune.evaluate.run import evaluate
    from cogtune.export.package import export_adapter
    from cogtune.generate.loading import load_generator
    from cogtune.model.modeling import CogVLM2ForCausalLM
    from cogtune.plan.ask import plan
    from cogtune.processing.processor import CogVLM2Processor
    from cogtune.train.run import train

__version__ = "0.1.0"
__all__ = [
    "CogVLM2Config",
    "CogVLM2ForCausalLM",
    "CogVLM2Processor",
    "RunConfig",
    "__version__",
    "collate_rows",
    "evaluate",
    "export_adapter",
    "load_config",
    "load_generator",
    "load_rows",
    "merge",
    "plan",
    "train",
]

_HOMES = {
    "CogVLM2Config": "cogtune.configuration.model",
    "CogVLM2ForCausalLM": "cogtune.model.modeling",
    "CogVLM2Processor": "cogtune.processing.processor",
    "RunConfig": "cogtune.configuration.run_config",
    "collate_rows": "cogtune.data.training_rows",
    "export_adapter": "cogtune.export.package",
    "load_config": "cogtune.configuration.load",
    "load_generator": "cogtune.generate.loading",
    "load_rows": "cogtune.data.training_rows",
    "merge": "cogtune.adapters.merge",
}
_CALLABLE_PACKAGES = ("evaluate", "plan", "train")
"""Functions with the name of the package that they are in; see `cogtune.system.callable_package`."""

_AUTO = "transformers.models.auto"
import_after("transformers", {
    f"{_AUTO}.configuration_auto": "cogtune.configuration.model",
    f"{_AUTO}.modeling_auto": "cogtune.model.modeling",
    f"{_AUTO}.processing_auto": "cogtune.processing.processor",
})  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    if name in _CALLABLE_PACKAGES:
        return importlib.import_module(f"cogtune.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cogtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The functions alone: `help` walks this list, and the classes inherit thousands of lines from transformers."""
    return sorted(name for name in __all__ if not name.startswith(("Cog", "Run")))
