"""The words of a training's warnings, for the log, the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogtune.language import phrase, tr

_TEXTS: dict[tuple[str, str], tuple[str, str]] = {
    ("watch-loss-flat", "lr"): (
        phrase("the loss does not move ({first:.3f} at first, {last:.3f} now)"),
        phrase("the learning rate, at most {lr:.1e} so far, is very low: LoRA usually takes 1e-4 to 3e-4 (train.lr)"),
    ),
    ("watch-loss-flat", "gradient"): (
        phrase("the loss does not move ({first:.3f} at first, {last:.3f} now)"),
        phrase(
            "almost no gradient reaches the adapters (norm {norm:.1e}): check lora.targets, and what is trained in"
            " `cogtune data preview`"
        ),
    ),
    ("watch-loss-flat", "other"): (
        phrase("the loss does not move ({first:.3f} at first, {last:.3f} now)"),
        phrase(
            "look at what is trained with `cogtune data preview`: do the answers follow from picture and question? Then"
            " try a higher train.lr (so far at most {lr:.1e}) or more lora.targets"
        ),
    ),
    ("watch-loss-spike", "one"): (
        phrase("the loss of a step jumped to {loss:.3f}, where {usual:.3f} is usual"),
        phrase(
            "one odd record does that: `cogtune data check` finds many of them; if it comes again, lower train.lr or"
            " raise train.accumulation"
        ),
    ),
    ("watch-loss-spike", "stays"): (
        phrase("the loss has risen to {loss:.3f} and stays there; it was {usual:.3f}"),
        phrase("the learning rate is too high: start again with a third of train.lr, or with a longer warm-up"),
    ),
    ("watch-gradient-exploding", ""): (
        phrase("gradients explode: a norm of {norm:.1f}, where {usual:.2f} is usual"),
        phrase("lower train.lr (now {lr:.1e}), lengthen the warm-up, or keep train.max_grad_norm at its default, 1"),
    ),
    ("watch-adapter-unchanged", "all"): (
        phrase("the adapter has not changed at all"),
        phrase("no gradient reaches it or train.lr is far too low: check lora.targets, and that answers are trained"),
    ),
    ("watch-adapter-unchanged", "some"): (
        phrase("{zero:.0f} of the adapter's {count:.0f} matrices are still exactly zero"),
        phrase(
            "no gradient reaches their layers, for example vision experts without pictures: leave them out of"
            " lora.targets, or add such data"
        ),
    ),
    ("watch-adapter-unchanged", "gradient"): (
        phrase("the gradient is exactly zero, so the adapter does not change"),
        phrase("nothing that is trained reaches the loss: check lora.targets, and that answers are trained"),
    ),
    ("watch-overfitting", ""): (
        phrase(
            "validation loss rises ({best:.3f} at step {best_step:.0f}, {last:.3f} now) while training loss falls"
            " ({then:.3f}, {now:.3f})"
        ),
        phrase(
            "the model learns the training data by heart. The best checkpoint is kept; eval.patience stops early, and"
            " fewer train.epochs, a lower lora.rank or more data help"
        ),
    ),
    ("watch-picture-ignored", ""): (
        phrase(
            "the validation loss is no better with the right pictures ({own:.4f}) than with other records'"
            " ({other:.4f}; {rows:.0f} rows)"
        ),
        phrase(
            "the model does not look: are pictures and answers matched? `cogtune data preview` shows them, and `cogtune"
            " eval --control swap` measures it on all questions"
        ),
    ),
    ("watch-loader-starved", ""): (
        phrase("training waits for data {share:.0f} % of the time"),
        phrase("raise data.workers, store smaller pictures, or use data.cache_features: on"),
    ),
    ("watch-memory-creeping", "host"): (
        phrase("this process's host memory grows ({now:.1f} GiB now, {rate:.2f} GiB in 1,000 steps)"),
        phrase(
            "at this rate the {limit:.1f} GiB of this machine are full at step {full:.0f}. The last checkpoint is safe:"
            " start the same command again before that, and report it"
        ),
    ),
    ("watch-memory-creeping", "device"): (
        phrase("GPU memory grows ({now:.1f} GiB now, {rate:.2f} GiB in 1,000 steps)"),
        phrase(
            "at this rate the {limit:.1f} GiB of the card are full at step {full:.0f}. Longer and longer rows do that:"
            " set data.max_row_tokens, or recompute more layers (train.gradient_checkpointing)"
        ),
    ),
    ("watch-throughput", ""): (
        phrase("training has become slower: {now:.2f} samples/s, {usual:.2f} at the beginning"),
        phrase(
            "something else uses this machine, the card is hot (`nvidia-smi -q -d PERFORMANCE`), or the disk of the"
            " data is slow"
        ),
    ),
    ("watch-disk-filling", "little"): (
        phrase("{free:.2f} GiB are free where the run is written; a checkpoint takes {size:.2f} GiB"),
        phrase("free some space there, or lower train.keep_checkpoints; if it fills, the last checkpoint is intact"),
    ),
    ("watch-disk-filling", "falling"): (
        phrase("the disk fills: {free:.2f} GiB are free, and none will be at step {full:.0f}"),
        phrase("something writes there beside this run: free some space; if it fills, the last checkpoint is intact"),
    ),
}  # fmt: skip


def texts(code: str, cause: str, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return a warning's message and hint in the user's language; None for one that this version does not know."""
    found = _TEXTS.get((code, cause))
    if found is None:
        return None
    try:
        return tr(found[0], **values), tr(found[1], **values)
    except (KeyError, ValueError, TypeError):  # a file that something else wrote
        return None


def line(step: int, code: str, cause: str, values: Mapping[str, Any]) -> str | None:
    """Return a warning as the log shows it."""
    found = texts(code, cause, values)
    if found is None:
        return None
    message, hint = found
    return tr(
        "step {step}: {message} [{code}]; {hint} (docs/guides/train.md says more)",
        step=step,
        message=message,
        code=code,
        hint=hint,
    )
