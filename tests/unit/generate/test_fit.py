"""What answers on a card that is too small for it, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cogtune import CogVLM2Config
from cogtune.adapters.provenance import Provenance, write_provenance
from cogtune.cli.main import main
from cogtune.configuration.load import load_answer_config
from cogtune.configuration.quantization import PLAIN, QuantSection
from cogtune.errors import ConfigError, OutOfMemoryError
from cogtune.generate import devices, loading, resolve
from cogtune.generate.fit import explained_loading, fit, fit_rows, needed, smaller_formats, supported
from cogtune.model.slots import SlotCache
from cogtune.plan.cards import find_card
from cogtune.plan.sizes import ModelSizes
from cogtune.processing.token_file import find_token_file
from cogtune.system.byte_sizes import GIB
from tests.support.adapters import write_adapter

SIZES = ModelSizes()
FOUR_BITS = QuantSection(experts="nf4", tower="nf4")


def fitted(memory: str, quant: QuantSection = PLAIN, given: frozenset[str] = frozenset()) -> tuple[QuantSection, str]:
    free = find_card(memory).usable
    found, lines = fit(SIZES, quant, "bfloat16", free=free, given=given, adapter=0, rows=1)
    if "warning" not in "".join(lines):
        assert needed(SIZES, found, "bfloat16", 0, 1) <= free
    return found, "".join(lines)


def test_a_model_that_fits_stays_as_it_is() -> None:
    assert fitted("80GiB") == (PLAIN, "")
    assert fitted("24GiB", FOUR_BITS) == (FOUR_BITS, "")


@pytest.mark.parametrize(
    ("memory", "changed"),
    [("24GiB", {"experts": "nf4"}), ("16GiB", {"experts": "nf4", "tower": "nf4"})],
)
def test_the_nearest_formats_that_fit_are_taken_and_said(memory: str, changed: dict[str, str]) -> None:
    quant, line = fitted(memory)
    assert quant == PLAIN.changed(**changed)
    assert ", ".join(f"quant.{name} {form}" for name, form in changed.items()) in line
    assert "are free" in line


def test_a_key_that_was_given_stays_and_a_lack_is_said_before_loading() -> None:
    given = frozenset({"quant.experts", "quant.tower", "quant.embedding", "quant.stream"})
    quant, line = fitted("24GiB", given=given)
    assert quant == PLAIN
    assert line.startswith("warning: ")
    assert "--quant.experts nf4 --quant.tower nf4" in line


def test_fp8_of_a_training_is_int8_on_a_card_without_it() -> None:
    old, new = find_card("RTX 3090"), find_card("h100")
    trained = QuantSection(experts="fp8")
    found, lines = supported(trained, old, frozenset())
    assert found.experts == "int8"
    assert "taking quant.experts int8" in lines[0]
    assert supported(trained, new, frozenset()) == (trained, [])
    assert supported(trained, None, frozenset()) == (trained, [])
    assert supported(trained, old, frozenset({"quant.experts"})) == (trained, [])  # said as an error later


def test_the_hint_names_what_is_not_used_yet() -> None:
    assert smaller_formats(PLAIN) == "try --quant.experts nf4 --quant.tower nf4"
    assert smaller_formats(QuantSection(experts="nf4")) == "try --quant.tower nf4"
    assert smaller_formats(FOUR_BITS) == "try --quant.embedding host"
    assert smaller_formats(FOUR_BITS.changed(embedding="host")) == "try --quant.stream auto"
    assert smaller_formats(FOUR_BITS.changed(embedding="host", stream=0)) == "try --quant.stream all"
    assert "card with more memory" in smaller_formats(FOUR_BITS.changed(embedding="host", stream="all"))
    least = needed(SIZES, FOUR_BITS.changed(embedding="host", stream="all"), "bfloat16", 0, 1, 2912)
    assert least < 3.5 * GIB


def test_layers_are_streamed_where_four_bits_do_not_fit() -> None:
    own = {"given": frozenset[str](), "adapter": 0, "rows": 1, "columns": 2912}
    found, (line,) = fit(ModelSizes(), PLAIN, "bfloat16", free=8 * GIB, **own)
    assert (found.experts, found.tower, found.embedding) == ("nf4", "nf4", "host")
    assert "quant.stream auto" in line
    assert 0 < found.stream < 32
    size = needed(ModelSizes(), found, "bfloat16", 0, 1, 2912)
    assert 7.5 * GIB < size <= 8 * GIB
    asked = FOUR_BITS.changed(stream="auto")
    assert fit(ModelSizes(), asked, "bfloat16", free=40 * GIB, **own) == (FOUR_BITS.changed(stream=32), [])
    kept, (line,) = fit(ModelSizes(), FOUR_BITS, "bfloat16", free=8 * GIB, **(own | {"given": {"quant.stream"}}))
    assert kept == FOUR_BITS
    assert "may not fit" in line


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 224.00 MiB"), MemoryError()]
)
def test_a_lack_of_memory_while_loading_is_an_error_with_the_flags_that_fit(error: Exception) -> None:
    on_gpu = explained_loading("base", torch.device("cuda:0"), PLAIN)
    with pytest.raises(OutOfMemoryError, match=r"on the GPU \(cuda:0\) while loading base") as refused, on_gpu:
        raise error
    assert refused.value.hint == "try --quant.experts nf4 --quant.tower nf4"
    with pytest.raises(RuntimeError, match="other"), explained_loading("base", torch.device("cuda:0"), PLAIN):
        raise RuntimeError("other")


@pytest.mark.parametrize("command", ["chat", "predict", "serve"])
def test_every_command_that_answers_says_so(
    command: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 224.00 MiB")

    monkeypatch.setattr(loading, "load_model", full)
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    data.write_text(json.dumps({"image": None, "conversations": turns}) + "\n")
    more = {
        "chat": ["--query", "hello"],
        "predict": ["--data", str(data), "--output", str(tmp_path / "answers.jsonl")],
        "serve": [],
    }[command]
    assert main([command, "--model", str(tiny_checkpoint), "--device", "cpu", *more]) == 1
    err = capsys.readouterr().err
    assert "error[out-of-memory]" in err
    assert "--quant.experts nf4 --quant.tower nf4" in err
    assert "Traceback" not in err


def test_a_run_s_formats_are_taken_and_then_the_nearest_that_fit(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run on a 16 GiB card had its tower's output from the feature cache; answering needs the tower as well."""
    pytest.importorskip("bitsandbytes")
    folder = write_adapter(tiny_checkpoint, tmp_path / "adapter")
    write_provenance(folder, Provenance({"quant.experts": "nf4", "model.dtype": "bfloat16"}))
    monkeypatch.setattr(resolve.ModelSizes, "from_folder", lambda folder: SIZES)
    monkeypatch.setattr(resolve, "free_memory", lambda device: 15 * GIB)
    resolved = resolve.resolve(load_answer_config(None, {"adapter": folder, "device": "cpu"}))
    assert resolved.config.quant == FOUR_BITS
    assert resolved.notes[0] == "as in training: quant.experts nf4, model.dtype bfloat16"
    assert "taking quant.tower nf4" in resolved.notes[1]
    fixed = {"quant.tower": "none", "quant.embedding": "device", "quant.stream": "off"}
    kept = resolve.resolve(load_answer_config(None, {"adapter": folder, "device": "cpu"} | fixed))
    assert kept.config.quant == QuantSection(experts="nf4")
    assert kept.notes[1].startswith("warning: ")


def test_fewer_answers_at_once_where_no_formats_hold_all() -> None:
    """On a card of 6 GB that nothing else uses, and on one where even one answer is too many."""
    own: dict[str, Any] = {"given": frozenset(), "adapter": 0, "columns": 2912}
    found, rows, lines = fit_rows(SIZES, PLAIN, "bfloat16", free=round(5.75 * GIB), rows=8, **own)
    assert (found.experts, found.stream, rows) == ("nf4", 0, 1)
    assert lines[-1] == "8 answers at once do not fit: 1 at a time"
    assert fit_rows(SIZES, PLAIN, "bfloat16", free=80 * GIB, rows=8, **own) == (PLAIN, 8, [])
    assert fit_rows(SIZES, FOUR_BITS, "bfloat16", free=8 * GIB, rows=8, **own)[1] in (2, 4)
    _, rows, lines = fit_rows(SIZES, PLAIN, "bfloat16", free=2 * GIB, rows=8, **own)
    assert rows == 8
    assert "warning" in lines[-1]


def test_slots_are_planned_by_their_tokens() -> None:
    """Against the cache itself: all slots, and half of them again while they double."""
    tokens = SlotCache.bytes_per_column(CogVLM2Config(), torch.bfloat16)
    one, eight = (needed(SIZES, PLAIN, "bfloat16", 0, rows, 4096) for rows in (1, 8))
    assert eight - one == (8 + 4 - 1) * 4096 * tokens
    assert needed(SIZES, PLAIN, "bfloat16", 0, 1, 8000) > one
    short = needed(SIZES, PLAIN, "bfloat16", 0, 1)
    assert abs(needed(SIZES, PLAIN, "bfloat16", 0, 1, 2305 + 401 + 512) - short) < 0.02 * short


def planned(command: list[str], monkeypatch: pytest.MonkeyPatch, free: int = 80 * GIB) -> list[tuple[int, int | None]]:
    """Run ``command`` until it loads; return for how many questions of how many tokens memory was planned."""
    asked = []

    def noted(*given: Any, rows: int, columns: int | None, **options: Any) -> Any:
        asked.append((rows, columns))
        return fit(*given, rows=rows, columns=columns, **options)

    def stop(*given: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(resolve, "fit", noted)
    monkeypatch.setattr(loading, "load_model", stop)
    for module in ("cogtune.generate.resolve", "cogtune.generate.fit"):
        monkeypatch.setattr(f"{module}.free_memory", lambda device: free)
    assert main(command) == 1
    return asked


def test_serve_plans_for_its_slots(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["serve", "--model", str(tiny_checkpoint), "--device", "cpu", "--slots", "5", "--columns", "300"]
    assert planned(command, monkeypatch) == [(5, 300)]


def test_predict_plans_for_its_longest_question(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    for words in (1, 50):
        turns = [{"role": "user", "content": "What? " * words}, {"role": "assistant", "content": "That."}]
        data = tmp_path / f"{words}.jsonl"
        data.write_text(json.dumps({"image": None, "conversations": turns}) + "\n")
        output = tmp_path / f"{words}.answers.jsonl"
        command = ["predict", "--model", str(tiny_checkpoint), "--device", "cpu", "--data", str(data), "--output"]
        asked = planned([*command, str(output), "--batch-size", "3", "--max-new-tokens", "7"], monkeypatch)
        assert [rows for rows, _ in asked] == [3, 3]
        assert asked[0][1] is None
        lengths.append(asked[1][1])
    encoder = find_token_file(str(tiny_checkpoint)).encoder()
    prompts = [len(encoder.prompt_ids("What? " * words)) for words in (1, 50)]
    assert lengths == [1 + prompt + 7 for prompt in prompts]


def test_several_devices_take_the_nearest_formats_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (torch.device("cuda:0"), torch.device("cuda:1"))
    config = CogVLM2Config()

    def spread(free: int, given: frozenset[str] = frozenset()) -> tuple[QuantSection, list[str]]:
        monkeypatch.setattr(devices, "free_memory", lambda device: free)
        return devices.spread(config, PLAIN, torch.bfloat16, cards, given)

    assert spread(40 * GIB) == (PLAIN, [])
    found, notes = spread(16 * GIB)
    assert found == QuantSection(experts="nf4")
    assert "quant.experts nf4" in notes[0]
    assert spread(2 * GIB) == (PLAIN, [])
    assert spread(16 * GIB, frozenset({"quant.experts"}))[0].experts == "none"


def test_offloaded_four_bits_answer_within_7_2_gib() -> None:
    """One answer of up to 512 tokens, and one or two slots of 2,900 tokens."""
    lean = FOUR_BITS.changed(stream=0, embedding="host")
    for rows, columns in ((1, None), (1, 2900), (2, 2900)):
        assert needed(SIZES, lean, "bfloat16", 0, rows, columns) < 7.2 * GIB
    assert needed(SIZES, FOUR_BITS, "bfloat16", 0, 1) > 10 * GIB


def test_offload_is_one_flag(tiny_checkpoint: Path) -> None:
    """The same answer as with everything on the device; a second word about the same is refused."""
    keys = {"device": "cpu", "max-new-tokens": 12}
    picture = Image.new("RGB", (9, 9), (200, 10, 10))
    plain = loading.load_generator(tiny_checkpoint, keys=keys).answer(picture, "What is it?")
    said: list[str] = []
    offloaded = loading.load_generator(tiny_checkpoint, keys=keys | {"offload": True}, progress=said.append)
    assert offloaded.answer(picture, "What is it?") == plain
    assert any("streamed from" in line for line in said)
    with pytest.raises(ConfigError, match=r"--offload is quant.stream 0, and quant.stream is 1"):
        loading.load_generator(tiny_checkpoint, keys=keys | {"offload": True, "quant.stream": 1})
