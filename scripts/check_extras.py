"""Shows that all extras live together: ``pip check``, then imports per extra, in the environment that runs it."""

from __future__ import annotations

import datetime
import importlib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

# easy-vqa is read by path and never imported: it installs a top-level package called `test`.
IMPORTS = {
    "deepspeed": ["deepspeed"],
    "quant": ["bitsandbytes"],
    "data": ["pyarrow"],
    "metrics": ["sacrebleu", "rouge_score", "nltk", "jiwer", "rapidfuzz"],
    "track": ["wandb", "mlflow", "swanlab", "trackio"],
    "serve": ["fastapi", "uvicorn"],
    "web": ["gradio"],
    "demo": [],
    "dev": ["pytest", "xdist", "mypy", "importlinter", "hypothesis", "tiktoken", "build"],
}


def main(target: Path) -> int:
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    print(check.stdout.strip())
    for extra, modules in IMPORTS.items():
        for module in modules:
            importlib.import_module(module)
        print(f"{extra}: {', '.join(modules) or 'installed'}")
    versions = {name: metadata.version(name) for name in sorted({d.metadata["Name"] for d in metadata.distributions()})}
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "what": "every extra installed together in a fresh environment",
        "command": "make check-extras",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "pip_check": check.stdout.strip(),
        "imported": IMPORTS,
        "versions": versions,
    }
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return check.returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
