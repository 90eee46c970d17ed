"""Write ``metrics.json``: answers with right answers, and what the reference programs say of them.

Run as ``python -m tests.golden.make_metrics`` where these are installed beside the extra ``metrics``; nothing else
needs them: ``pip install --no-deps pycocoevalcap==1.2 anls==0.0.2 lmms-eval==0.7.3 pycocotools``.
"""

from __future__ import annotations

import importlib.util
import json
import string
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILE = HERE / "metrics.json"

PEOPLE = [
    ("yes", ["yes"] * 10),
    ("Yes.", ["yes"] * 7 + ["no"] * 3),
    ("no", ["yes"] * 8 + ["no"] * 2),
    ("two", ["2"] * 9 + ["3"]),
    ("The red bus", ["red bus"] * 3 + ["bus"] * 7),
    ("dont know", ["don't know"] * 4 + ["i don't know"] * 6),
    ("1,000", ["1000"] * 5 + ["1,000"] * 5),
    ("wi-fi", ["wifi"] * 4 + ["wi fi"] * 6),
    ("a cat, dog", ["cat dog"] * 10),
    ("3.50", ["3.50"] * 2 + ["350"] * 8),
    ("none", ["0"] * 6 + ["none"] * 4),
    ("t-shirt", ["t shirt"] * 3 + ["shirt"] * 7),
    ("couldn'tve", ["couldn't've"] * 10),
    ("frisbee?", ["frisbee"] * 10),
    ("", ["nothing"] * 10),
    ("blue", ["blue"] * 3 + ["red"] * 7),
]
SHORT = [
    ("A red bus.", ["red bus"]),
    ("invoice 2024-11", ["Invoice 2024-12", "invoice"]),
    ("  Total   Sum ", ["total sum"]),
    ("seven", ["Seven"]),
    ("kitten", ["sitting"]),
    ("", ["x"]),
    ("the the cat", ["the cat"]),
    ("New York City", ["york new"]),
    ("blue and green", ["green and blue", "teal"]),
    ("Q3 revenue", ["Q4 revenue"]),
    ("it is a dog", ["a dog", "the puppy"]),
]
NUMBERS = [
    ("10", "10"),
    ("10.4", "10"),
    ("10.6", "10"),
    ("-3", "3"),
    ("0.51", "0.5"),
    ("48%", "50%"),
    ("5%", "0.05"),
    ("1000", "1049"),
    ("7", "8"),
    ("2e3", "2000"),
]
CAPTIONS = [
    (
        "a man riding a wave on top of a surfboard",
        ["a man is riding a wave on a surfboard", "a surfer rides a large wave in the ocean", "man surfing a big wave"],
    ),
    (
        "two dogs play with a frisbee in the park",
        ["two dogs are playing with a frisbee", "dogs run after a red frisbee in a field", "two dogs in a park"],
    ),
    (
        "a kitchen with a stove and a sink",
        [
            "a clean kitchen with white cabinets and a stove",
            "a small kitchen with a sink and an oven",
            "the kitchen has a stove",
        ],
    ),
    (
        "a plate of food",
        ["a plate topped with meat and vegetables", "a plate of food on a wooden table", "food on a plate"],
    ),
    (
        "a red double decker bus driving down a street",
        ["a red bus drives down the street", "a double decker bus in a city street", "red bus on the road"],
    ),
    ("cat", ["a cat sleeps on a couch", "a grey cat lying on a sofa", "the cat is asleep"]),
]
CHINESE = [
    ("一只猫坐在垫子上", ["一只猫在垫子上睡觉", "猫坐在垫子上"]),
    ("两个人在公园里踢足球", ["两个人正在公园踢足球", "有两个人在踢球"]),
    ("红色的公交车停在路边。", ["一辆红色公交车停在路边。", "路边停着红色公交车"]),
    ("桌子上有 3 个 apple", ["桌上放着 3 个 apple", "三个苹果在桌子上"]),
]
READING = [
    ("The quick brown fox", "The quick brown fox"),
    ("The quikc brown", "The quick brown fox"),
    ("lnvoice No 1O", "Invoice No 10"),
    ("12345", "12845"),
    ("", "abc"),
    ("hello world again", "hello there world"),
]
READING_ZH = [("今天天汽很好", "今天天气很好"), ("北京大学", "北京大学生"), ("第3号楼", "第8号楼")]
BOXES = [
    ((0, 0, 100, 100), (50, 50, 150, 150)),
    ((10, 20, 30, 40), (10, 20, 30, 40)),
    ((0, 0, 10, 10), (20, 20, 30, 30)),
    ((100, 200, 500, 900), (120, 180, 480, 950)),
    ((5, 5, 500, 6), (0, 0, 999, 999)),
]


def main() -> None:
    """Ask every reference program and store what it says beside what it was asked."""
    found = {
        "vqa": _vqa(),
        "vqa_words": _vqa_words(),
        "anls": _anls(),
        "squad_f1": _squad(),
        "numeric": _numeric(),
        "bleu": _bleu(CAPTIONS, "13a"),
        "bleu_zh": _bleu(CHINESE, "zh"),
        "rouge_l": _rouge(),
        "cider": _cider(CAPTIONS),
        "cider_zh": _cider([(_spaced(a), [_spaced(r) for r in right]) for a, right in CHINESE]),
        "meteor": _meteor(),
        "cer": _jiwer("cer", READING),
        "wer": _jiwer("wer", READING),
        "cer_zh": _jiwer("cer", READING_ZH),
        "iou": _iou(),
    }
    packages = ("lmms-eval", "anls", "pycocoevalcap", "sacrebleu", "rouge-score", "nltk", "jiwer", "pycocotools")
    versions = {name: metadata.version(name) for name in packages}
    FILE.write_text(json.dumps({"versions": versions, **found}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _module(package: str, place: str) -> Any:
    """A module of lmms-eval by its file: importing the package would want all of its dependencies."""
    file = metadata.distribution(package).locate_file(place)
    spec = importlib.util.spec_from_file_location("reference", str(file))
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _vqa_processor() -> Any:
    return _module("lmms-eval", "lmms_eval/tasks/_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()


def _processed(text: str) -> str:
    processor = _vqa_processor()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return str(processor.process_digit_article(processor.process_punctuation(text)))


def _vqa() -> list[Any]:
    """lmms-eval's ``vqav2_process_results``: every answer but one, and a third for each that is the same."""
    found = []
    for answer, people in PEOPLE:
        given, right = _processed(answer), [_processed(person) for person in people]
        scores = [
            min(1, float(sum(other == given for at, other in enumerate(right) if at != left)) / 3)
            for left in range(len(right))
        ]
        found.append([answer, people, sum(scores) / len(scores)])
    return found


def _vqa_words() -> list[Any]:
    texts = [*_vqa_processor().CONTRACTIONS, *_vqa_processor().NUMBER_MAP, "a man, his dog", "what?", "3.14", "u.s.a."]
    texts += ["1,234 cars", "black/white", "black / white", 'the "stop" sign', "rock-n-roll", "who's there", "A. B. C."]
    return [[text, _processed(text)] for text in texts]


def _anls() -> list[Any]:
    from anls import anls_score

    return [[answer, right, anls_score(answer, right)] for answer, right in SHORT]


def _squad() -> list[Any]:
    """SQuAD 1.1's evaluation script: exact match and F1 after its ``normalize_answer``, the best over right answers."""
    import re
    from collections import Counter

    def cleaned(text: str) -> str:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(answer: str, right: str) -> float:
        given, wanted = cleaned(answer).split(), cleaned(right).split()
        same = sum((Counter(given) & Counter(wanted)).values())
        return 0.0 if same == 0 else 2 * same / (len(given) + len(wanted))

    plain = [(answer, right) for answer, right in SHORT if not any(c.isdigit() for c in answer)]
    return [
        [
            answer,
            right,
            max(float(cleaned(answer) == cleaned(one)) for one in right),
            max(f1(answer, one) for one in right),
        ]
        for answer, right in plain
    ]


def _numeric() -> list[Any]:
    """ChartQA's relaxed accuracy as lmms-eval computes it (its module wants packages of its own: written here)."""

    def number(text: str) -> float:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)

    return [[a, b, float(abs(number(a) - number(b)) / abs(number(b)) <= 0.05)] for a, b in NUMBERS]


def _bleu(data: list[Any], tokenizer: str) -> dict[str, Any]:
    from sacrebleu.metrics.bleu import BLEU

    streams = list(zip(*(right for _, right in data), strict=True))
    score = BLEU(tokenize=tokenizer).corpus_score([answer for answer, _ in data], [list(one) for one in streams])
    return {"data": data, "score": score.score / 100}


def _rouge() -> list[Any]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [[a, right, max(scorer.score(one, a)["rougeL"].fmeasure for one in right)] for a, right in CAPTIONS]


def _spaced(text: str) -> str:
    """Chinese as the reference program takes it: divided by blanks."""
    from cogtune.evaluate.text import words

    return " ".join(words(text))


def _cider(data: list[Any]) -> dict[str, Any]:
    from pycocoevalcap.cider.cider import Cider

    answers = {at: [answer] for at, (answer, _) in enumerate(data)}
    mean, scores = Cider().compute_score({at: right for at, (_, right) in enumerate(data)}, answers)
    return {"data": data, "score": float(mean), "scores": [float(score) for score in scores]}


def _meteor() -> list[Any]:
    from nltk.translate.meteor_score import meteor_score

    class Empty:
        def synsets(self, word: str) -> list[Any]:
            return []

    return [[a, right, meteor_score([r.split() for r in right], a.split(), wordnet=Empty())] for a, right in CAPTIONS]


def _jiwer(name: str, data: list[Any]) -> dict[str, Any]:
    import jiwer

    rate = getattr(jiwer, name)([right for _, right in data], [answer for answer, _ in data])
    return {"data": data, "score": float(rate)}


def _iou() -> list[Any]:
    import numpy as np
    from pycocotools.mask import iou

    boxes = [np.array([_xywh(pair[side]) for pair in BOXES], dtype=np.float64) for side in (0, 1)]
    values = iou(*boxes, [0] * len(BOXES)).diagonal()
    return [[*pair, float(value)] for pair, value in zip(BOXES, values, strict=True)]


def _xywh(box: tuple[int, ...]) -> list[int]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


if __name__ == "__main__":
    main()
