"""Messages in the user's language, and that each one in the source has its Chinese twin.

CONTRIBUTING.md says how a message is written; `NOT_MOVED` names the modules that do not do so yet, and only shrinks.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cogtune import language
from cogtune.cli.command import own_flags
from cogtune.cli.help import first_paragraph
from cogtune.cli.main import COMMANDS, GROUPS, find_command
from cogtune.cli.published import FLAGS
from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.keys import describe_keys, sections
from cogtune.configuration.run_config import RunConfig
from cogtune.errors import CogtuneError
from cogtune.language import english, padded, tr, width

SOURCE = Path(language.__file__).parent
CHINESE = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
"""Characters and punctuation."""
PROSE = re.compile(r"[A-Za-z]{2,}[,:;]? [a-z]{2,}")
"""Two words in a row: what a message has, and a key, a flag or a file's name has not."""

PROGRAMMING_ERRORS = {
    *("TypeError", "ValueError", "RuntimeError", "NotImplementedError", "KeyError", "AttributeError", "AssertionError")
}

VALIDATORS = ("configuration/", "system/byte_sizes.py")
"""Where a ValueError is for users all the same: pydantic hands it on."""

CODE = re.compile(r" *cogtune |({} -m )?(pip|apt) (un)?install|torchrun |{} --|--|quant\.|bold |es run$")
"""How commands, flags and styles begin, which read the same in every language."""

NOT_MOVED: tuple[str, ...] = ()
"""Modules and folders below src/cogtune whose messages are still bare strings."""

NO_TWINS_YET: tuple[str, ...] = ()
"""Packages whose templates are marked and not all translated."""

ENGLISH = {
    "adapters/attach.py": r"Found missing adapter keys|size mismatch|was renamed",
    "adapters/model_card.py": r"",
    "bench/breakdown.py": r"copies between host and device",
    "cli/published.py": r"unrecognized arguments",
    "cli/plan.py": r"# Made by `cogtune plan`",
    "configuration/answer_config.py": r"cogtune predict",
    "data/preview_html.py": r"<|\n *body {|^special trained$",
    "demo/drawings.py": r"",
    "demo/moving.py": r"What happens",
    "demo/page.py": r"<",
    "demo/pretrain.py": r"",
    "demo/record.py": r"model name",
    "demo/words.py": r"",
    "distributed/group.py": r"address already in use",
    "evaluate/report/chart.py": r"<",
    "evaluate/report/gallery.py": r"<",
    "evaluate/report/page.py": r"<|default-src",
    "evaluate/report/pictures.py": r"<",
    "evaluate/report/sections.py": r"<",
    "evaluate/report/words.py": r"<",
    "export/hub.py": r"^LoRA adapter, exported",
    "export/package.py": r"^loss|training, last|validation|<rect",
    "features/ownership.py": r"[Ff]eatures? ",
    "plan/inference.py": r"^keys and values$",
    "plan/memory.py": r"",
    "plan/step.py": r"vision backward",
    "processing/prompt.py": r"Short answer:",
    "processing/sentencepiece_file.py": r"^Question: What|^The quick",
    "serve/app.py": r"",
    "serve/metrics.py": r"",
    "serve/clips.py": r"",
    "serve/pictures.py": r"",
    "serve/protocol.py": r"",
    "serve/refusals.py": r"",
    "serve/request_body.py": r"",
    "web/guard.py": r"",  # HTTP answers, before there is a page
    "web/page.py": r"[<{]",  # HTML and CSS
    "system/file_errors.py": r"os error",
    "system/gpu.py": r"can't allocate memory",
    "train/engines/zero.py": r"is deprecated",
    "data/loader.py": r"^shared memory$|^DataLoader worker",
    "distributed/lost_peers.py": r"Connection (closed|reset|was likely closed)|Broken pipe|Timed out|operation timeout",
    "train/failures.py": r"^loading the model$",
    "train/loop.py": r"Detected call of",
    "train/saver.py": r"validation|training, last",
    "train/trackers/swanlab_tracker.py": r"^swanlab sync|^see run.log$",
    "train/trackers/trackio_tracker.py": r"^trackio show",
    "train/trackers/wandb_tracker.py": r"^wandb sync",
}
"""Module -> what its texts match that are no messages: words for a model or on its card, names in a record, what other
programs write, an API's answers.
"""


SAYING = ("tr", "phrase", "both", "plain")
"""Functions whose first argument is a template; the last two are the report's, which says it in both languages."""


WHOLLY_ENGLISH = {module for module, pattern in ENGLISH.items() if not pattern}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(SOURCE.rglob("*.py")):
        yield file.relative_to(SOURCE).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def catalogue_of(module: str) -> str:
    return module.split("/")[0] if "/" in module else "cogtune"


def templates(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield the first argument of each call that says or marks a template."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in SAYING and node.args:
            yield node.args[0]


@cache
def help_texts() -> tuple[tuple[str, str], ...]:
    return tuple(_help_texts())


def _help_texts() -> Iterator[tuple[str, str]]:
    """Yield package and text of all help that commands, flags and configuration keys declare."""
    for name in COMMANDS:
        command = find_command(name)
        yield from (("cli", command.summary), ("cli", command.about))
        yield from (("cli", flag.help) for flag in own_flags(command.flags))
    yield from (("cli", about) for about in GROUPS.values())
    yield from (("cli", flag.help) for flag in FLAGS.values())
    for root in (RunConfig, AnswerConfig):
        yield from (("configuration", key.description) for key in describe_keys(root))
        yield from (("configuration", first_paragraph(kind.__doc__)) for kind in sections(root).values())


def catalogues() -> dict[str, dict[str, str]]:
    files = sorted((SOURCE / "zh").glob("*.toml"))
    return {file.stem: tomllib.loads(file.read_text(encoding="utf-8")) for file in files}


def used() -> dict[str, set[str]]:
    """Every template of the source by the catalogue that has its twin."""
    found: dict[str, set[str]] = {}
    for module, tree in modules():
        for template in templates(tree):
            if isinstance(template, ast.Constant):
                found.setdefault(catalogue_of(module), set()).add(template.value)
    for package, template in help_texts():
        found.setdefault(package, set()).add(template)
    return found


def names(template: str) -> set[str]:
    return set(re.findall(r"(?<!{){(\w+)[^{}]*}", template)) - {"s"}


def bare(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string that reads like a message and is no template."""
    no_message: set[int] = set()

    def leave_out(node: ast.AST) -> None:
        no_message.update(id(inner) for inner in ast.walk(node))

    for template in templates(tree):
        leave_out(template)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            leave_out(node)  # documentation
        elif isinstance(node, ast.Assert):
            leave_out(node)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("Field", "flag", "Command", "compile"):  # help texts are looked at where they are shown
                leave_out(node)
            elif name in PROGRAMMING_ERRORS and not (name == "ValueError" and module.startswith(VALIDATORS)):
                leave_out(node)  # for the programmer who calls us
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in no_message:
            pieces = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            no_message.update(id(part) for part in node.values if isinstance(part, ast.Constant))
            if PROSE.search("".join(pieces)):
                yield node.lineno, "".join(pieces)
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in no_message
        if is_text and PROSE.search(node.value):
            yield node.lineno, node.value


def messages(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of what `bare` finds and nothing here says is no message."""
    helps = {text for _, text in help_texts()}
    for line, said in bare(module, tree):
        if said in helps or said in COMMANDS or CODE.match(said):
            continue
        if module not in ENGLISH or not re.search(ENGLISH[module], said):
            yield line, said


def moved(module: str) -> bool:
    return not any(module == entry or module.startswith(f"{entry}/") for entry in NOT_MOVED)


def test_every_message_of_the_source_is_a_template():
    missed = [
        f"src/cogtune/{module}:{line}: {said}"
        for module, tree in modules()
        if moved(module)
        for line, said in messages(module, tree)
    ]
    assert not missed, 'write tr("...", name=value):\n' + "\n".join(missed)


def test_messages_of_one_word_are_templates_too():
    """What an error, a log or a print says is a template even where it is too short to read like a sentence."""
    errors = {kind.__name__ for kind in [CogtuneError, *_all_below(CogtuneError)]} | {"BadRecordError", "Problem"}
    missed = []
    for module, tree in modules():
        for node in ast.walk(tree):
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if module in WHOLLY_ENGLISH or name not in errors | {"info", "warning", "note", "say"}:
                continue
            said = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg in ("hint", "message"))]
            said = [
                branch
                for value in said
                for branch in ([value.body, value.orelse] if isinstance(value, ast.IfExp) else [value])
            ]
            missed += [
                f"src/cogtune/{module}:{value.lineno}: {words}"
                for value in said
                if (words := _plain(value))
                and re.search(r"[A-Za-z]{2,}[ :,]|[ :,][A-Za-z]{2,}", words)
                and not CODE.match(words)
            ]
    assert not missed, "\n".join(missed)


def _plain(node: ast.expr) -> str:
    """The words of a text in the source; empty for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _all_below(kind: type) -> Iterator[type]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _all_below(inner)


def test_the_list_of_modules_that_are_not_moved_shrinks():
    left = {module for module, tree in modules() if any(True for _ in messages(module, tree))}
    for entry in NOT_MOVED:
        assert any(module == entry or module.startswith(f"{entry}/") for module in left), f"{entry} is moved"


def test_a_template_is_written_where_it_is_used():
    """A template made by the program has no twin; what is chosen from a table is marked there with `phrase`."""
    wrong = [
        f"src/cogtune/{module}:{template.lineno}"
        for module, tree in modules()
        for template in templates(tree)
        if isinstance(template, ast.JoinedStr | ast.BinOp)
    ]
    assert wrong == []


def test_a_template_is_given_its_values():
    for module, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tr" and node.args:
                template = node.args[0]
                if isinstance(template, ast.Constant):
                    given = {keyword.arg for keyword in node.keywords} - {"s"}
                    assert None in given or names(template.value) == given, f"src/cogtune/{module}:{node.lineno}"


def test_every_template_has_its_twin():
    twins = catalogues()
    missing = [
        f'zh/{package}.toml: "{template}" = ""'
        for package, said in used().items()
        for template in sorted(said)
        if package not in NO_TWINS_YET and template not in twins.get(package, {})
    ]
    assert not missing, "\n".join(missing)


def test_every_twin_is_used():
    said = used()
    unused = [
        f"zh/{package}.toml: {template}"
        for package, twins in catalogues().items()
        for template in twins
        if template not in said.get(package, ())
    ]
    assert not unused, "\n".join(unused)


def test_twins_have_the_values_of_their_templates():
    for package, twins in catalogues().items():
        for template, twin in twins.items():
            assert names(twin) == names(template), f"zh/{package}.toml: {template}"


def test_twins_are_chinese():
    for package, twins in catalogues().items():
        for template, twin in twins.items():
            assert CHINESE.search(twin) or not re.search(r"[A-Za-z]{2}", re.sub(r"{[^}]*}", "", template)), (
                f"zh/{package}.toml: {template}"
            )
            assert not re.search(r"[\u4e00-\u9fff]", template)
            spaced = re.search(r"[\u4e00-\u9fff] [\u4e00-\u9fff]|[\u4e00-\u9fff][,;:!?](?!\d)", twin)
            assert not spaced, f"zh/{package}.toml: blank or Latin punctuation in `{twin}`"


def test_a_template_says_the_same_in_every_package():
    seen: dict[str, str] = {}
    for package, twins in catalogues().items():
        for template, twin in twins.items():
            assert seen.setdefault(template, twin) == twin, f"zh/{package}.toml: {template}"


@pytest.fixture
def no_language(monkeypatch):
    for name in (language.VARIABLE, *language.LOCALE_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "en"),
        ({"COGTUNE_LANG": "zh"}, "zh"),
        ({"COGTUNE_LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "COGTUNE_LANG": "en"}, "en"),
        ({"LANG": "en_US.UTF-8", "COGTUNE_LANG": "zh"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "COGTUNE_LANG": ""}, "zh"),
    ],
)
def test_the_variable_wins_over_the_locale(monkeypatch, no_language, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language.language() == expected


def test_values_are_put_into_either_language(monkeypatch):
    assert tr("{variable} is {asked}; there is en and zh", variable="A", asked="{b}") == "A is {b}; there is en and zh"
    monkeypatch.setenv("COGTUNE_LANG", "zh")
    assert tr("hint: {hint}", hint="x") == "提示：x"
    assert tr("no such template: {hint}", hint="x") == "no such template: x"
    with english():
        assert tr("hint: {hint}", hint="x") == "hint: x"


def test_chinese_takes_two_columns():
    assert width("显存 GiB") == 8
    assert padded("显存", 6) == "显存  "
    assert padded("memory", 3) == "memory"


def test_english_reads_no_catalogue():
    code = "import sys, cogtune.cli.main as m; m.main(['--help']); assert 'tomllib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env={"PATH": "", "LANG": "C"})
