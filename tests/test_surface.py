"""What the world may rely on: the public names, the cheap import, and what the README says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import octavo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_public_names() -> None:
    assert octavo.__all__ == [
        "LLM",
        "SamplingParams",
        "Completion",
        "Chunk",
        "Message",
        "Persona",
        "load_model",
        "open_checkpoint",
        "Mixtral",
        "ModelArgs",
        "MoEArgs",
        "Tokenizer",
        "OctavoError",
        "UserError",
    ]
    for name in octavo.__all__:
        assert getattr(octavo, name).__name__ == name
        assert name in dir(octavo)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        octavo.Nonsense  # noqa: B018


def test_importing_octavo_imports_nothing_heavy() -> None:
    code = "import sys, octavo; print(sorted({'torch', 'numpy', 'sentencepiece', 'click'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_the_readmes_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert README.index("make chat") < 1200
    assert README.index("make test") < 1200
    commands = [
        line.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
    ]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        if words and words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        if words and words[0] == "octavo":
            helped = subprocess.run(
                [sys.executable, "-m", "octavo", words[1], "--help"], capture_output=True, text=True
            )
            assert helped.returncode == 0, command
            for flag in (word for word in words[2:] if re.fullmatch(r"--[a-z-]+|-[a-z]", word)):
                assert re.search(rf"(^|\W){flag}\b", helped.stdout), f"{command}: {flag}"


def test_sources_stay_short() -> None:
    for path in [*ROOT.glob("src/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("recipes/**/*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 600, path
    assert len((ROOT / "src/octavo/model.py").read_text(encoding="utf-8").splitlines()) < 450
