"""VQA accuracy: an answer counts by how many of ten people gave it.

Normalisation and rule are those of the data set's evaluation code; what it does is written anew here. Two texts are
compared normalised in every case, where that code leaves them as they are if all ten people agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_TO_TEN)}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTED = """
ain't|aren't|can't|could've|couldn't|couldn't've|didn't|doesn't|don't|hadn't|hadn't've|hasn't|haven't|he'd|he'd've|he's
how'd|how'll|how's|isn't|it'd|it'd've|it'll|ma'am|mightn't|mightn't've|might've|mustn't|must've|needn't|not've|o'clock
oughtn't|'ow's'at|shan't|she'd've|should've|shouldn't|shouldn't've|somebody'd've|somebody'll|somebody's|someone'd
someone'd've|someone'll|someone's|something'd|something'd've|something'll|that's|there'd|there'd've|there're|there's
they'd
they'd've|they'll|they're|they've|'twas|wasn't|we'd've|we've|weren't|what'll|what're|what's|what've|when's|where'd
where's|where've|who'd|who'd've|who'll|who's|who've|why'll|why're|why's|won't|would've|wouldn't|wouldn't've|y'all
y'all'll|y'all'd've|you'd|you'd've|you'll|you're|you've
"""


def _misspelt(word: str) -> set[str]:
    """Return a contraction without its apostrophe; of several apostrophes, without any one of them."""
    places = [at for at, character in enumerate(word) if character == "'"]
    return {word[:at] + word[at + 1 :] for at in places}


_CONTRACTIONS = {wrong: word for word in re.split(r"[|\n]", _CONTRACTED.strip()) for wrong in _misspelt(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # so it stands in the data set's code


def normalise_vqa(text: str) -> str:
    """Return an answer as VQA accuracy compares it: without punctuation and articles, numbers up to ten in digits."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found, comma = text, _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        joined = comma or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if joined else " ")
    found = _PERIOD.sub("", found)
    parts = [_NUMBERS.get(part, part) for part in found.lower().split()]
    return " ".join(_CONTRACTIONS.get(part, part) for part in parts if part not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the mean over leaving one person out of min(1, people of the others who gave this answer / 3)."""
    given, people = normalise_vqa(answer), [normalise_vqa(reference) for reference in references]
    same = people.count(given)
    left_out = [same - (person == given) for person in people]
    return sum(min(1.0, others / 3) for others in left_out) / len(people)
