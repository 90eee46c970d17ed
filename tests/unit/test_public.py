"""The public names: there, quick to import, documented, and typed."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import cogtune
from cogtune.errors import ConfigError

FUNCTIONS = ("load_config", "load_generator", "merge", "plan", "train")


def described(name: str) -> str:
    """The docstring of a public name; a callable package's is that of its function too."""
    found = getattr(cogtune, name)
    own = inspect.getdoc(found) or ""
    return own + (inspect.getdoc(found._imported()) or "" if name in ("plan", "train") else "")


def test_importing_is_quick_and_loads_nothing_heavy() -> None:
    code = "import sys, cogtune; dir(cogtune); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "transformers", "pydantic", "numpy", "PIL") if f"'{name}'" in loaded]


@pytest.mark.parametrize("name", [name for name in cogtune.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_documented(name: str) -> None:
    text = described(name)
    assert len(text) > 80
    if name in FUNCTIONS:
        assert callable(getattr(cogtune, name))
        assert all(f"{part}:" in text for part in ("Example", "Args", "Raises"))
        assert text.count(">>>") >= 3


def test_the_help_is_a_few_pages() -> None:
    text = pydoc.plain(pydoc.render_doc(cogtune))
    assert len(text.split("\n")) < 170
    assert all(name in text for name in cogtune.__all__ if name != "__version__")


def test_a_package_that_is_a_function_stays_both() -> None:
    """Whatever was imported first."""
    for code in (
        "import cogtune; print(callable(cogtune.train), cogtune.plan.__name__)",
        "import cogtune.train.log; import cogtune.plan.cards; print(callable(cogtune.train), cogtune.plan.__name__)",
        "from cogtune import train, plan; import cogtune.train.log as log; print(callable(train), plan.__name__)",
    ):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "True cogtune.plan\n"
    assert list(inspect.signature(cogtune.train).parameters) == ["config", "dry_run", "force"]
    assert list(inspect.signature(cogtune.plan).parameters)[:3] == ["config", "card", "cards"]


def test_an_unknown_name_is_said() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cogtune.trian  # type: ignore[attr-defined]  # noqa: B018


def test_a_plan_is_an_object_with_its_text(tmp_path: Path) -> None:
    config = cogtune.load_config(None, {"model": "x", "data": "y", "output": str(tmp_path)})
    plan = cogtune.plan(config, "24GiB", cards=2, placeholders=["model.path", "data.path"])
    assert str(plan) == plan.text
    assert plan.text.startswith("cards    2 x 24.0 GiB card")
    assert plan.keys["quant.experts"]
    assert cogtune.load_config(None, {"model": "x", "data": "y", "output": "o"} | plan.keys).quant
    with pytest.raises(ConfigError, match="at least 1"):
        cogtune.plan(config, "24GiB", cards=0)


def test_types_reach_a_users_program(tmp_path: Path) -> None:
    """As mypy sees them, in a program that is strict."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\nimport cogtune\nfrom cogtune import RunConfig\n"
        "def run(config: RunConfig) -> Path | None:\n"
        "    plan = cogtune.plan(config, card='24GiB')\n    text: str = plan.text\n    print(text)\n"
        "    result = cogtune.train(config)\n"
        "    answer: str = cogtune.load_generator(adapter=result.adapter).answer('a.jpg', 'what?')\n    print(answer)\n"
        "    return result.adapter\n"
        "run(cogtune.load_config(None, {'train.lr': 3e-4}))\n"
        "reveal_type(cogtune.merge(adapter='a', output='b').changed)\n"
    )
    words = ["--strict", "--follow-imports=silent", "--ignore-missing-imports", str(program)]
    done = subprocess.run([sys.executable, "-m", "mypy", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert 'Revealed type is "int"' in done.stdout or 'Revealed type is "builtins.int"' in done.stdout


def test_a_call_that_was_to_start_processes_is_refused(tmp_path: Path) -> None:
    """The command starts them and runs itself in each; a function cannot."""
    keys = {"model": "x", "data": "y", "output": str(tmp_path), "parallel.launch": 2}
    with pytest.raises(ConfigError, match=r"parallel\.launch is 2, but this process was not launched") as caught:
        cogtune.train(cogtune.load_config(None, keys))
    assert "`cogtune train`" in str(caught.value.hint)
