"""Auto classes know CogVLM2 after `import cogtune`, whichever is imported first and however deep."""

from __future__ import annotations

import subprocess
import sys

import pytest

REGISTERED = """
from cogtune.configuration.model import CogVLM2Config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
assert type(AutoConfig.for_model("cogvlm2")) is CogVLM2Config
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    assert auto._model_mapping[CogVLM2Config].__name__ == "CogVLM2ForCausalLM"
import transformers
assert type(transformers.__spec__.loader).__name__ == "SourceFileLoader"
print("registered")
"""


@pytest.mark.parametrize(
    "first",
    [
        "import cogtune",
        "import transformers, cogtune",
        "from transformers import AutoModel; import cogtune",
        "import cogtune.model.vision",  # which the model needs, and which imports transformers
        "import cogtune, transformers.modeling_layers",  # which imports the Auto classes while it is half imported
    ],
)
def test_auto_classes_know_the_model(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", first + REGISTERED], capture_output=True, text=True)
    assert done.stdout == "registered\n", done.stderr
