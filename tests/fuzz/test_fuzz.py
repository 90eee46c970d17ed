"""The short form of ``make fuzz``: some hundred inputs of every kind, and the harness itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import harness
from tests.fuzz.__main__ import campaign, inputs_of
from tests.fuzz.faulty_targets import FAULTS
from tests.fuzz.harness import Input
from tests.fuzz.targets import CAMPAIGN

INPUTS, SEED = 600, 0


def test_hundreds_of_broken_inputs_end_as_they_should() -> None:
    names = [target.name for target in CAMPAIGN]
    results = campaign(list(inputs_of(INPUTS, SEED, names)), 1, lambda results: None)
    found = [one for result in results.values() for one in result.found]
    assert not found, "\n".join(f"{one.target} --seed {one.seed} --number {one.number}: {one.what}" for one in found)
    assert sum(result.tried for result in results.values()) == INPUTS
    assert results.keys() == set(names)
    ended = {name for result in results.values() for name in result.ended}
    assert len(ended) > 20, "the inputs have become too much alike"


def test_the_harness_sees_what_must_not_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUZZ_SECONDS", "0.5")
    result = harness.try_inputs([Input("faulty", 0, number, ()) for number in range(len(FAULTS))], tmp_path)["faulty"]
    assert result.tried == len(FAULTS)
    found = {list(FAULTS)[one.number]: one.what for one in result.found}
    for name, expected in FAULTS.items():
        assert (expected in found[name]) if expected else (name not in found), (name, found.get(name))


def test_an_input_follows_from_its_seed_and_number(tmp_path: Path) -> None:
    """Two places, the same bytes; and a mutation left out changes no other."""
    from tests.fuzz.data_targets import TableTarget

    target = TableTarget("csv")
    texts = []
    for name, given in (("a", Input("csv", 3, 5)), ("b", Input("csv", 3, 5)), ("c", Input("csv", 3, 6))):
        place = harness.Place(tmp_path / name)
        (place.fixed / "pictures").mkdir()
        target.write(given, place)
        texts.append((place.input / "data.csv").read_bytes())
    assert texts[0] == texts[1] != texts[2]
