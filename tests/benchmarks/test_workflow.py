"""The GPU job of the workflow: what it runs exists, and its comment says what was found."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
JOBS: dict[str, Any] = WORKFLOW["jobs"]
HARNESS = """
const calls = [];
const github = {
  paginate: async () => JSON.parse(process.argv[1]),
  rest: { issues: {
    listComments: null,
    updateComment: async (given) => calls.push(['update', given]),
    createComment: async (given) => calls.push(['create', given]),
  } },
};
const context = { repo: { owner: 'o', repo: 'r' }, issue: { number: 7 } };
(async () => { SCRIPT })().then(() => console.log(JSON.stringify(calls)));
"""


def script() -> str:
    (step,) = [step for step in JOBS["comment"]["steps"] if "script" in step.get("with", {})]
    return str(step["with"]["script"])


def comment(folder: Path, present: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    program = HARNESS.replace("SCRIPT", script())
    done = subprocess.run(["node", "-e", program, json.dumps(present)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((verb, given),) = json.loads(done.stdout)
    return verb, given


def test_the_gpu_job_runs_what_exists_and_keeps_it() -> None:
    steps = JOBS["gpu"]["steps"]
    commands = [shlex.split(step["run"]) for step in steps if "run" in step]
    scripts = [word for words in commands for word in words if word.endswith(".py")]
    assert scripts == ["benchmarks/gpu.py", "benchmarks/gpu_compare.py"]
    assert all((ROOT / name).is_file() for name in scripts)
    assert not any(step.get("continue-on-error") for step in steps), "a regression has to fail the job"
    (kept,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    assert "bundle/" in kept["with"]["path"] and "report." in kept["with"]["path"]
    assert "cancelled" in kept["if"], "what a failed job found is what is needed most"


def test_the_gpu_job_installs_a_torch_that_finds_the_gpu() -> None:
    """What the whole workflow hands to pip names an index with CPU builds."""
    assert "PIP_ARGS" in WORKFLOW["env"]
    assert JOBS["gpu"]["env"]["PIP_ARGS"] == ""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; it runs the comment's script")
def test_the_comment_holds_both_reports_and_is_replaced(tmp_path: Path) -> None:
    verb, given = comment(tmp_path, [{"id": 1, "body": "looks good"}])
    assert (verb, given["issue_number"]) == ("create", 7)
    assert "No report was written" in given["body"]
    written = {
        "demo/report.md": "# demo page",
        "gpu/gpu-results/regression.md": "## ❌ Regressed on NVIDIA Test",
        "gpu/gpu-results/nvidia-test/summary.md": "# NVIDIA Test",
    }
    for name, text in written.items():
        (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / name).write_text(text)
    verb, again = comment(tmp_path, [{"id": 1, "body": "looks good"}, {"id": 2, "body": given["body"]}])
    assert (verb, again["comment_id"]) == ("update", 2)
    assert all(text in again["body"] for text in written.values())
    (tmp_path / "results" / "demo" / "report.md").write_text("x" * 100_000)
    assert len(comment(tmp_path, [])[1]["body"]) < 65_536, "GitHub takes no longer ones"
