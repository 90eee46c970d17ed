"""What the pages tell a user to type exists: commands, their flags, configuration keys, files, make targets."""

from __future__ import annotations

import re

import pytest
import yaml

from cogtune.cli import main
from cogtune.cli.command import own_flags
from cogtune.cli.options import root_of
from cogtune.cli.published import FLAGS as PUBLISHED_FLAGS
from cogtune.configuration.answer_config import AnswerConfig
from cogtune.configuration.keys import aliases, known_keys, sections
from tests.docs.pages import ROOT, blocks, inline_code, name, pages, shell_lines, words

PAGES = pages()
LAUNCHERS = r"(?:cogtune|(?:torchrun|deepspeed)\b.*?(?:-m|--module) cogtune|python -m cogtune) "


def flags_of(name: str) -> set[str]:
    """The flags that a command takes: its own, and the configuration keys that count."""
    command = main.find_command(name)
    own = {f"--{other}" for flag in own_flags(command.flags) for other in (flag.name, *flag.also)}
    root = root_of(command.keys)
    if root is None:
        return own
    short = {f"--{alias}" for alias, key in aliases(root).items() if key.startswith(command.counted)}
    keys = {f"--{key}" for key in known_keys(root) if not command.strict or key.startswith(command.counted)}
    return own | short | keys | {"--config"}


COMMANDS = {name: flags_of(name) for name in main.COMMANDS}
GROUPS = main.GROUPS
ALL_KEYS = known_keys() | known_keys(AnswerConfig)
SECTIONS = {**sections(), **sections(AnswerConfig)}


def cogtune_lines(text: str) -> list[str]:
    """What follows ``cogtune`` on every shell line and in inline code."""
    lines = [*shell_lines(text), *inline_code(text)]
    return [match[1] for line in lines if (match := re.match(LAUNCHERS + "(.+)", line))]


def command_of(line: str) -> str:
    """The command a line calls: the longest registered one its words begin with, else its first word."""
    parts = line.split()
    for length in (2, 1):
        if " ".join(parts[:length]) in COMMANDS:
            return " ".join(parts[:length])
    return parts[0]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    for line in cogtune_lines(page.read_text(encoding="utf-8")):
        if not line.startswith("-") and not re.match(r"[A-Z.]", line):
            assert command_of(line) in COMMANDS or line.split()[0] in GROUPS, f"{name(page)}: `cogtune {line}`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_exist(page):
    for line in cogtune_lines(page.read_text(encoding="utf-8")):
        command = command_of(line)
        if command not in COMMANDS:
            continue
        known = COMMANDS[command] | {"--help", "-h"}
        for flag in re.findall(r"(?<!\S)(--?[A-Za-z][\w.-]*)", line):
            assert flag in known or flag.startswith("--lora.extra."), f"{name(page)}: `cogtune {line}`: {flag}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_keys_exist(page):
    """Keys written as `section.key`, with or without dashes; a trailing `...` or `*` stands for several."""
    text = page.read_text(encoding="utf-8")
    dotted = re.compile(rf"(?<![\w./`-])(?:--)?((?:{'|'.join(SECTIONS)})\.[a-z_]+)(?![\w/(]|\.(?!\s|$))")
    for code in [*inline_code(text), *shell_lines(text)]:
        for key in dotted.findall(code):
            if not re.search(r"\.(py|yaml|yml|json|jsonl|txt|md|html|safetensors)$", key):
                assert key in ALL_KEYS, f"{name(page)}: {key} in `{code}`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_published_flags_exist(page):
    for line in shell_lines(page.read_text(encoding="utf-8")):
        if "peft_lora.py" in line:
            flags = re.findall(r"(?<!\S)--([a-z_]+)", line.split("peft_lora.py", 1)[1])
            assert set(flags) <= PUBLISHED_FLAGS.keys() | {"help"}, f"{name(page)}: `{line}`"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_configuration_examples_have_known_keys(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language not in ("yaml", "yml"):
            continue
        content = yaml.safe_load(block.body)
        if not isinstance(content, dict) or not content.keys() <= SECTIONS.keys():
            continue  # a DeepSpeed file
        for section, values in content.items():
            for key in values:
                assert f"{section}.{key}" in ALL_KEYS, f"{name(page)}: {section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_and_scripts_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*)(?=[: ])", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    targets |= {
        target
        for line in re.findall(r"^(test-[a-z -]+):", (ROOT / "Makefile").read_text(), re.M)
        for target in line.split()
    }
    for line in [*shell_lines(text), *inline_code(text)]:
        parts = line.split()
        if parts[0] == "make" and len(parts) > 1:
            assert parts[1] in targets, f"{name(page)}: `{line}`"
        for script in re.findall(r"(?<=python )[\w/.-]+\.py", line):
            assert (ROOT / script).is_file(), f"{name(page)}: `{line}`"


def test_shell_blocks_are_shell():
    """Blocks marked as shell can be split into words, so that they can be pasted."""
    for page in PAGES:
        for line in shell_lines(page.read_text(encoding="utf-8")):
            assert words(line), f"{name(page)}: `{line}`"
