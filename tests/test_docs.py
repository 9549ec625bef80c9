"""Every command in README and docs exists and is spelt as the command line takes it; what is quick is run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from passdeploy.cli import app
from passdeploy.config import RunConfig, Section

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICK = ("passdeploy targets", "passdeploy doctor", "passdeploy groups")
INSTALLERS = ("pip", "venv")
"""Modules of the user's Python, which this one may lack."""
ELSEWHERE = ("docker", "nvcc", "tritonserver", "mlserver", "kubectl", "curl", "pip", "git", "pre-commit", "trtexec")


def commands(page: Path) -> list[str]:
    """Command lines of the page's shell blocks; continued lines joined, comments cut."""
    found = []
    for block in re.findall(r"```(?:bash|text|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split(" #")[0].strip()
            if re.match(r"(\$ )?(make|passdeploy|python\S*|\.venv/bin/\S+|" + "|".join(ELSEWHERE) + r")\b", words):
                found.append(words.removeprefix("$ "))
    return found


CASES = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)]


def test_every_setting_is_described_with_its_default() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    described = {
        key: default.strip("` ") for key, default in re.findall(r"^\| `([\w.]+)` \| (.*?) \|", page, re.MULTILINE)
    }

    def shown(value: object) -> str:
        if isinstance(value, tuple):
            return ", ".join(map(str, value)) or "[]"
        return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    expected = {}
    for key, value in RunConfig():
        inner = dict(value) if isinstance(value, Section) else {}
        expected |= {f"{key}.{name}": shown(each) for name, each in inner.items()} or {key: shown(value)}
    assert described == expected


def test_the_pages_have_commands() -> None:
    assert {page for page, _ in CASES} >= {"README.md", "CONTRIBUTING.md", "docs/own-model.md"}
    assert len(CASES) > 15


def check(line: str) -> None:
    """Fails unless what a command line names is there."""
    words = shlex.split(re.split(r" [>|] ", line)[0])
    words[0] = words[0].removeprefix(".venv/bin/")
    started = words[2] if words[0].startswith("python") and words[1:2] == ["-m"] else None
    if started == "passdeploy":
        words = words[2:]
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        done = subprocess.run(["make", "-n", *targets, "PYTHON=python3"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "passdeploy":
        verb = typer.main.get_command(app)
        verb.resolve_command(verb.make_context("passdeploy", [words[1]], resilient_parsing=True), [words[1]])  # type: ignore[attr-defined]
        parsed = verb.commands[words[1]].make_context(words[1], [w for w in words[2:] if w != "..."])  # type: ignore[attr-defined]
        assert parsed.params
    elif words[0].startswith("python"):
        assert started is None or started in INSTALLERS or find_spec(started) is not None, line
        scripts = [word for word in words if word.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts), line
    else:
        assert words[0] in ELSEWHERE


@pytest.mark.parametrize(("page", "line"), CASES, ids=[f"{page}: {line}" for page, line in CASES])
def test_command(page: str, line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("python -m passdeploy.shipping.srve x", "srve"),
        ("python3 -m passdeploy doctr", "doctr"),
        ("passdeploy doctr", "doctr"),
        ("python3 benchmarks/nothing.py", "nothing"),
    ],
)
def test_what_is_spelt_otherwise_is_noticed(line: str, told: str) -> None:
    with pytest.raises(Exception, match=told):
        check(line)


@pytest.mark.parametrize("line", QUICK)
def test_quick_command_runs(line: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "passdeploy", *shlex.split(line)[1:], "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("{", "["))
