"""The engine answers as ``generate()`` does, whatever else it is answering."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, partialmethod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from cogtune.errors import InputError, OutOfMemoryError, RunError
from cogtune.generate import prefill as prefilling
from cogtune.generate.choices import ClosedQuestion, score_choices
from cogtune.generate.decode_steps import DecodeSteps
from cogtune.generate.decoding import Decoding
from cogtune.generate.engine import InferenceEngine
from cogtune.generate.generator import Ask, Generator
from cogtune.generate.picture_cache import PictureCache, image_digest
from cogtune.generate.requests import Request
from cogtune.generate.text_graphs import Text, TextGraphs
from cogtune.model.extend import PlainLayer
from cogtune.processing.processor import CogVLM2Processor

DECODING = Decoding(max_new_tokens=24)


@pytest.fixture
def engine(parts: tuple[Any, CogVLM2Processor]) -> Iterator[InferenceEngine]:
    with InferenceEngine(*parts, slots=3, columns=400) as found:
        yield found


@pytest.fixture(scope="module")
def asks(asks: list[Ask]) -> list[Ask]:
    """Two more: the shortest, and one about the second picture."""
    return [*asks, (None, "x", []), (asks[2][0], "What is it?", [])]


@pytest.fixture(scope="module")
def wanted(parts: tuple[Any, CogVLM2Processor], asks: list[Ask]) -> list[str]:
    """By ``generate()``, one at a time."""
    generator = Generator(*parts)
    return [generator.answer_batch([ask], DECODING)[0] for ask in asks]


def _request(engine: InferenceEngine, ask: Ask, decoding: Decoding = DECODING, **options: Any) -> Request:
    picture, query, history = ask
    images = () if picture is None else (picture,)
    return Request(engine.processor.encode(query, history, images=len(images)), images, decoding, **options)


def test_answers_are_those_of_generate(engine: InferenceEngine, asks: list[Ask], wanted: list[str]) -> None:
    assert engine.answer([_request(engine, ask) for ask in asks]) == wanted
    assert engine.pictures.hits == 2  # red and blue come twice each: their keys and values are copied
    assert engine.free_slots == 3


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_and_goes_meanwhile(
    engine: InferenceEngine, asks: list[Ask], wanted: list[str], seed: int
) -> None:
    """Requests arrive at random moments, some are cancelled, lengths differ; each whole answer is as if alone."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(asks), (14,), generator=generator).tolist()
    running = []
    for place in order:
        limit = int(torch.randint(1, 25, (1,), generator=generator))
        pending = engine.submit(_request(engine, asks[place], Decoding(max_new_tokens=limit)))
        if float(torch.rand(1, generator=generator)) < 0.2:
            pending.cancel()
        running.append((place, limit, pending))
        time.sleep(0.01 * float(torch.rand(1, generator=generator)))
    for place, limit, pending in running:
        text = pending.text()
        if pending.cancelled:
            assert wanted[place].startswith(text) or pending.finish_reason != "cancelled"
            continue
        assert len(pending.token_ids) <= limit
        whole = engine.submit(_request(engine, asks[place], Decoding(max_new_tokens=limit)))
        assert (whole.text(), whole.token_ids) == (text, pending.token_ids)
        assert pending.finish_reason == ("length" if len(pending.token_ids) == limit else "stop")
    assert (engine.free_slots, engine.running, engine.waiting) == (3, 0, 0)


def test_text_behind_pictures_in_passes_of_fixed_shape(
    parts: tuple[Any, CogVLM2Processor], asks: list[Ask], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but without capturing them: the same answers. What does not fit in a pass goes through the model."""
    layers = [PlainLayer(layer) for layer in parts[0].model.layers]
    counted = []

    class Passes(TextGraphs):
        def prefill(self, texts: Sequence[Text]) -> torch.Tensor:
            shape = self.shape_for([len(text.tokens) for text in texts])
            assert shape is not None
            counted.append(len(texts))
            return self.computed(self.inputs(shape, texts))[: len(texts)]

    use = DecodeSteps.use

    def with_passes(self: DecodeSteps, cache: Any) -> None:
        use(self, cache)
        fused = SimpleNamespace(layers=layers, embed=parts[0].model.embed_tokens)
        self.text = Passes(parts[0], cache, fused, None)

    monkeypatch.setattr(DecodeSteps, "use", with_passes)
    monkeypatch.setattr("cogtune.generate.text_graphs.SHAPES", ((1, 24), (3, 24), (1, 40)))
    with InferenceEngine(*parts, slots=6, columns=400) as engine:
        with _held(engine):
            running = [engine.submit(_request(engine, ask)) for ask in asks]
        assert [pending.text() for pending in running] == wanted
    lengths = [len(_request(engine, ask).text) for ask in asks]
    assert sum(counted) == sum(length <= 40 for length in lengths) < len(lengths)
    assert max(counted) > 1


@contextmanager
def _held(engine: InferenceEngine) -> Iterator[None]:
    """Keep the engine's thread busy, so that what is submitted meanwhile waits together."""
    busy, free = threading.Event(), threading.Event()

    def work() -> None:
        busy.set()
        free.wait()

    thread = threading.Thread(target=engine.run, args=(work,))
    thread.start()
    busy.wait()
    yield
    free.set()
    thread.join()


@pytest.mark.parametrize("known", [False, True])
def test_waiting_requests_are_prefilled_together(
    parts: tuple[Any, CogVLM2Processor],
    asks: list[Ask],
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    known: bool,
) -> None:
    """In one pass over their texts, and one over the pictures that are new, each once: the answers are as if alone."""
    passes: list[tuple[str, int]] = []

    def counted(name: str, compute: Any, *given: Any, **options: Any) -> Any:
        passes.append((name, 1 if name == "prefill" else len(given[2])))
        return compute(*given, **options)

    for name in ("prefill", "prefill_pictures", "prefill_texts"):
        monkeypatch.setattr(prefilling, name, partial(counted, name, getattr(prefilling, name)))
    with InferenceEngine(*parts, slots=8, columns=400) as engine:
        if known:
            engine.answer([_request(engine, asks[0]), _request(engine, asks[2])])
            passes.clear()
        with _held(engine):
            running = [engine.submit(_request(engine, ask)) for ask in asks]
            running[1].cancel()
        texts = [pending.text() for pending in running]
    assert texts[:1] + texts[2:] == wanted[:1] + wanted[2:]
    assert (texts[1], running[1].finish_reason) == ("", "cancelled")
    assert passes == ([] if known else [("prefill_pictures", 2)]) + [("prefill_texts", 5)]


def test_what_is_prefilled_together_has_a_limit(
    engine: InferenceEngine, asks: list[Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts padded to the longest, and images that are new; the first request is never too much."""
    requests = [
        replace(_request(engine, ask), image_keys=tuple(map(image_digest, () if ask[0] is None else (ask[0],))))
        for ask in asks
    ]
    lengths = [len(request.text) for request in requests]
    assert engine.prefill.together(requests) == len(requests)
    monkeypatch.setattr(prefilling, "_TEXT_AT_ONCE", 2 * max(lengths[:2]))
    assert engine.prefill.together(requests) == 2
    monkeypatch.setattr(prefilling, "_TEXT_AT_ONCE", 1)
    assert engine.prefill.together(requests) == 1
    monkeypatch.setattr(prefilling, "_TEXT_AT_ONCE", 1000)
    monkeypatch.setattr(engine.prefill, "_images_at_once", 1)
    assert engine.prefill.together(requests) == 2  # the third one's picture is the second that is new
    engine.answer([requests[0]])
    assert engine.prefill.together(requests) == len(requests)


@pytest.mark.parametrize("broken", [0, 2])
def test_a_request_that_fails_takes_no_other_with_it(
    engine: InferenceEngine, asks: list[Ask], wanted: list[str], broken: int
) -> None:
    """Prefilled together, they fail together; then each is tried alone."""
    requests = [_request(engine, ask) for ask in asks[:3]]
    requests[broken] = replace(requests[broken], images=(torch.zeros(5),))  # no image
    with _held(engine):
        running = [engine.submit(request) for request in requests]
    for place, pending in enumerate(running):
        if place == broken:
            with pytest.raises(InputError, match="not a PIL image"):
                pending.text()
        else:
            assert pending.text() == wanted[place]
    assert engine.free_slots == 3


@pytest.mark.parametrize("guesses", [1, 3])
def test_guesses_leave_answers_as_they_are(
    parts: tuple[Any, CogVLM2Processor], asks: list[Ask], wanted: list[str], guesses: int
) -> None:
    """One after another, where steps have guesses, and together, where they have none; sampled ones never have any."""
    drawing = Decoding(max_new_tokens=16, sample=True, temperature=1.5)
    with InferenceEngine(*parts, slots=3, columns=400) as plain:
        tokens = [plain.submit(_request(plain, ask)) for ask in asks]
        drawn = plain.answer([_request(plain, asks[0], drawing, seed=3)])
        ids = [pending.token_ids for pending in tokens if pending.text() is not None]
    with InferenceEngine(*parts, slots=3, columns=400, guesses=guesses) as engine:
        for ask, text, wanted_ids in zip(asks, wanted, ids, strict=True):
            pending = engine.submit(_request(engine, ask))
            assert (pending.text(), pending.token_ids) == (text, wanted_ids)
        assert 0 < engine.guessed_right < engine.guessed
        before = engine.guessed
        assert engine.answer([_request(engine, asks[0], drawing, seed=3)]) == drawn
        assert engine.guessed == before
        short = engine.submit(_request(engine, asks[1], Decoding(max_new_tokens=7)))
        long = engine.submit(_request(engine, asks[2]))
        other = engine.submit(_request(engine, asks[4]))
        short.text()
        assert (short.token_ids, short.finish_reason) == (ids[1][:7], "length")
        assert (long.text(), other.text()) == (wanted[2], wanted[4])
        stop = wanted[1][5:8]
        ended = engine.submit(_request(engine, asks[1], stop=(stop,)))
        assert ended.text() == wanted[1][: wanted[1].find(stop)].rstrip()
        assert engine.free_slots == 3


def test_guesses_take_no_more_steps_than_they_save(
    parts: tuple[Any, CogVLM2Processor], asks: list[Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every right guess is a step less; a slot without room for all guesses takes plain steps."""
    counted: dict[str, int] = {}

    def count(name: str, compute: Any, *given: Any) -> Any:
        counted[name] = counted.get(name, 0) + 1
        return compute(*given)

    for name in ("step", "look_up"):
        monkeypatch.setattr(DecodeSteps, name, partialmethod(partial(count, name, getattr(DecodeSteps, name))))
    length = len(parts[1].encode(asks[1][1], asks[1][2], images=0))
    for columns in (400, length + 40):
        counted.clear()
        with InferenceEngine(*parts, slots=1, columns=columns, guesses=3) as engine:
            pending = engine.submit(_request(engine, asks[1], Decoding(max_new_tokens=40)))
            pending.text()
        steps = counted["step"] + counted["look_up"]
        # the first token is the prefill's; a step after the end and one for the end token may come
        assert len(pending.token_ids) - 1 <= steps + engine.guessed_right <= len(pending.token_ids) + 3
        assert counted["look_up"] > 0


def test_a_seed_draws_the_same_alone_and_in_company(engine: InferenceEngine, asks: list[Ask]) -> None:
    drawing = Decoding(max_new_tokens=16, sample=True, temperature=1.5, top_p=0.95)
    alone = engine.answer([_request(engine, asks[0], drawing, seed=11)])[0]
    crowd = [_request(engine, ask, drawing, seed=place) for place, ask in enumerate(asks)]
    found = engine.answer([crowd[1], crowd[2], _request(engine, asks[0], drawing, seed=11), *crowd[3:]])
    assert found[2] == alone
    assert engine.answer([_request(engine, asks[0], drawing, seed=12)])[0] != alone


def test_questions_of_a_thread_that_outlives_the_main_one_are_answered(
    engine: InferenceEngine, asks: list[Ask], wanted: list[str]
) -> None:
    """Once the main thread has ended no pool takes work: images are then resized when they are needed."""
    engine.prefill._resizing.shutdown()
    running = [engine.submit(_request(engine, ask)) for ask in asks]
    assert all(pending._ended.wait(10) for pending in running)
    assert [pending.text() for pending in running] == wanted


def test_any_whole_number_is_a_seed(engine: InferenceEngine, asks: list[Ask]) -> None:
    """A run's seed and a question's number may add up to more than a tensor holds."""
    drawn = Decoding(max_new_tokens=8, sample=True, top_k=2**63 - 1)
    found = engine.answer([_request(engine, asks[4], drawn, seed=seed) for seed in (5, 2**64 + 5, 2**63, -(2**63))])
    assert found[0] == found[1] != found[2] == found[3]


def test_pieces_join_to_the_answer(engine: InferenceEngine, asks: list[Ask], wanted: list[str]) -> None:
    pieces = list(engine.submit(_request(engine, asks[1])))
    assert "".join(pieces) == wanted[1]
    assert all(pieces)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_text_ends_the_answer_before_it(
    engine: InferenceEngine, asks: list[Ask], wanted: list[str], length: int
) -> None:
    whole = wanted[1]
    stop = whole[4 : 4 + length]
    pending = engine.submit(_request(engine, asks[1], stop=(stop, "never in it")))
    assert pending.text() == whole[: whole.find(stop)].rstrip()
    assert pending.finish_reason == "stop"
    missing = engine.submit(_request(engine, asks[1], stop=(whole[-1] + "more",)))
    assert missing.text() == whole


def test_a_cancelled_answer_gives_its_slot_back(engine: InferenceEngine, asks: list[Ask]) -> None:
    endless = Decoding(max_new_tokens=280)
    pending = engine.submit(_request(engine, asks[2], endless))
    first = next(pending)
    pending.stop()
    assert engine.free_slots == 3
    assert pending.finish_reason in ("cancelled", "stop")
    assert ("".join([first, *pending])) is not None


def test_what_does_not_go_together_is_refused(engine: InferenceEngine, asks: list[Ask]) -> None:
    with pytest.raises(InputError, match="there is room for"):
        engine.submit(_request(engine, asks[0], Decoding(max_new_tokens=400)))
    encoded = engine.processor.encode("What?", images=1)
    with pytest.raises(InputError, match="places for 1 images, 0 are given"):
        engine.submit(Request(encoded, (), DECODING))
    encoded = engine.processor.encode("", images=1, template="base")
    with pytest.raises(InputError, match="nothing follows the last image"):
        engine.submit(Request(encoded, (asks[0][0],), DECODING))
    engine.close()
    with pytest.raises(RunError, match="closed"):
        engine.submit(_request(engine, asks[0]))


@pytest.mark.parametrize("where", ["prefill", "step"])
def test_an_error_ends_the_answers_under_way_and_no_others(
    engine: InferenceEngine, asks: list[Ask], wanted: list[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        raise torch.cuda.OutOfMemoryError("no room")

    target = ("cogtune.generate.prefill.prefill", fail) if where == "prefill" else (DecodeSteps, "step", fail)
    monkeypatch.setattr(*target)
    with pytest.raises(OutOfMemoryError, match="out of memory while answering"):
        engine.submit(_request(engine, asks[1])).text()
    assert engine.answer([_request(engine, asks[1])]) == [wanted[1]]
    assert engine.free_slots == 3


def test_closed_questions_are_scored_between_steps(engine: InferenceEngine, asks: list[Ask], wanted: list[str]) -> None:
    """While answers are under way, which stay as they are; an error reaches the one who asked."""
    running = [engine.submit(_request(engine, ask)) for ask in asks[:3]]
    questions = [ClosedQuestion("Is it red?", ("yes", "no"))]
    scores = engine.score([asks[0][0]], questions)
    assert [pending.text() for pending in running] == wanted[:3]
    with torch.no_grad():
        features = engine.model.model.encode_images(engine.processor.pixels(asks[0][0]))
    (found,), (expected,) = scores, score_choices(engine.model, engine.processor.encoder, questions, features)
    assert found.choices == expected.choices
    # float32 sums: products may split differently from one call to the next
    assert found.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-4)
    with pytest.raises(InputError, match="no choices"):
        engine.score([], [ClosedQuestion("?", ())])


def test_other_work_holds_up_answers_once_a_step(engine: InferenceEngine, asks: list[Ask], wanted: list[str]) -> None:
    """However much of it waits, or comes meanwhile: closed questions without end leave no answer waiting."""
    seen: list[int] = []

    def again() -> None:
        seen.append(len(pending.token_ids))
        if len(seen) < 1000 and not pending.done:
            engine._work.append(again)

    with _held(engine):
        pending = engine.submit(_request(engine, asks[1]))
        engine._work.extend([again] * 3)
    assert pending.text() == wanted[1]
    assert len(seen) < 100


def test_closing_finishes_what_was_accepted(parts: tuple[Any, CogVLM2Processor], asks: list[Ask]) -> None:
    engine = InferenceEngine(*parts, slots=2, columns=400)
    running = [engine.submit(_request(engine, ask)) for ask in asks]
    engine.close()
    assert all(pending.done and pending.finish_reason in ("stop", "length") for pending in running)
    assert engine._thread is None


def test_slots_grow_with_what_is_asked(
    parts: tuple[Any, CogVLM2Processor], asks: list[Ask], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While answers are under way, which go on in the larger cache; an idle engine's thread ends."""
    monkeypatch.setattr("cogtune.generate.engine._COLUMNS", 16)
    monkeypatch.setattr("cogtune.generate.engine._IDLE", 0.05)
    with InferenceEngine(*parts, slots=4, columns=400) as engine:
        running = [engine.submit(_request(engine, ask)) for ask in (asks[4], asks[1], asks[2], asks[0], asks[5])]
        assert [pending.text() for pending in running] == [wanted[place] for place in (4, 1, 2, 0, 5)]
        cache = engine.work.cache
        assert cache is not None
        assert (cache.slots, cache.columns) == (4, 144)  # the longest prompt has 115 tokens
        deadline = time.monotonic() + 5
        while engine._thread is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine._thread is None
        assert engine.answer([_request(engine, asks[3])]) == [wanted[3]]


def test_slots_that_find_no_memory_are_no_slots(
    parts: tuple[Any, CogVLM2Processor], asks: list[Ask], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their keys and values fit, and the state of their steps does not: at the first question, and when slots grow."""
    use, left = DecodeSteps.use, [0, 1]

    def full(self: DecodeSteps, cache: Any) -> None:
        if not left.pop(0):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        use(self, cache)

    monkeypatch.setattr(DecodeSteps, "use", full)
    with InferenceEngine(*parts, slots=4, columns=400) as engine:
        with pytest.raises(OutOfMemoryError):
            engine.answer([_request(engine, asks[4])])
        assert engine.answer([_request(engine, asks[4])]) == [wanted[4]]
        left += [0, 0, 1, 1]  # of two together, then of the second alone
        with _held(engine):
            running = [engine.submit(_request(engine, asks[place])) for place in (4, 0)]
        assert running[0].text() == wanted[4]
        with pytest.raises(OutOfMemoryError):
            running[1].text()
        with _held(engine):
            running = [engine.submit(_request(engine, asks[place])) for place in (4, 0, 4)]
        assert [pending.text() for pending in running] == [wanted[4], wanted[0], wanted[4]]


def test_the_picture_cache_keeps_its_budget() -> None:
    cache = PictureCache(100)
    for number in range(4):
        cache.put(number, torch.zeros(10))  # 40 bytes
    assert cache.get(0) is None
    assert cache.get(2) is not None
    cache.put(4, torch.zeros(10))
    assert (cache.get(3), cache.nbytes) == (None, 80)  # 2 was used, 3 was not
    cache.put(5, torch.zeros(100))
    assert cache.get(5) is None
    cache.put(4, torch.zeros(5))
    assert cache.nbytes == 60
    cache.clear()
    assert cache.nbytes == 0


def test_digests_tell_pictures_apart() -> None:
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    assert image_digest(red) == image_digest(Image.new("RGB", (4, 3), (255, 0, 0)))
    others = [Image.new("RGB", (3, 4), (255, 0, 0)), Image.new("RGB", (4, 3), (254, 0, 0)), red.convert("L")]
    palette = red.convert("P")
    changed = palette.copy()
    changed.putpalette([9] * 768)
    assert len({image_digest(picture) for picture in [red, *others, palette, changed]}) == 6
    tall = Image.new("L", (64, 5000))  # more than is digested at once
    last = tall.copy()
    last.putpixel((63, 4999), 1)
    assert image_digest(tall) == image_digest(tall.copy()) != image_digest(last)
