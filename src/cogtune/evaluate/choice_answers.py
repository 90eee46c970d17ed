"""Questions whose right answers are among given choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cogtune.errors import ConfigError
from cogtune.evaluate.questions import Asked, number
from cogtune.evaluate.text import normalise
from cogtune.language import tr


def closed(asked: Asked, choices: Sequence[str]) -> Asked:
    """Return the questions whose right answers are all among the choices.

    Raises:
        ConfigError: fewer than two different choices, or none of the questions is one of them.
    """
    known = {normalise(choice) for choice in choices}
    if len(known) < 2:
        raise ConfigError(
            tr("--choices {choices}: at least two different ones were expected", choices=",".join(choices)),
            hint=tr("for example --choices yes,no"),
            code="config-value",
        )
    kept = [one for one in asked.questions if all(normalise(right) in known for right in one.references)]
    if not kept:
        raise ConfigError(
            tr("no right answer of the data is one of {choices}", choices=tr(", ").join(choices)),
            hint=tr("name the answers as the data writes them; without --choices answers are generated"),
            code="config-value",
        )
    left = {(one.id, one.turn) for one in asked.questions} - {(one.id, one.turn) for one in kept}
    found = number(kept)
    return replace(asked, questions=found.questions, pictures=found.pictures, aside=asked.aside | left)
