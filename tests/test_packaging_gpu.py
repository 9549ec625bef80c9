"""What carries the code to a GPU: the wheel, Dockerfile.gpu (read, for want of Docker), and a list of wheels."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
BUILD = """
import runpy, sys
from passdeploy.kernels import build
build.nvcc_path = lambda: {nvcc!r}
build.build_fatbin = lambda name, out, **_: out.write_bytes(b"code of " + name.encode())
sys.argv = ["setup.py", "-q", "egg_info", "--egg-base", {base!r}, "build_py", "--build-lib", {lib!r}]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize("nvcc", [None, "/somewhere/nvcc"])
def test_wheel_carries_sources_and_machine_code(nvcc: str | None, tmp_path: Path) -> None:
    code = BUILD.format(nvcc=nvcc, base=str(tmp_path), lib=str(tmp_path / "lib"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "lib" / "passdeploy" / "kernels" / "cuda"
    sources = {path.name for path in (ROOT / "kernels").iterdir()}
    assert {path.name for path in folder.iterdir() if path.suffix != ".fatbin"} == sources
    fatbins = {path.name: path.read_bytes() for path in folder.glob("*.fatbin")}
    made = {f"{name}.fatbin": b"code of " + name.encode() for name in ("masked_affine_act", "prompted_input")}
    assert fatbins == (made if nvcc else {})


OLD_NVCC = """#!/bin/sh
for word; do case $last in -o) echo half > "$word" ;; esac; last=$word; done
echo "nvcc fatal   : Unsupported gpu architecture 'compute_100'" >&2
exit 1
"""


def test_an_older_nvcc_costs_the_machine_code_and_not_the_installation(tmp_path: Path) -> None:
    nvcc, lib = tmp_path / "bin" / "nvcc", tmp_path / "lib"
    nvcc.parent.mkdir()
    nvcc.write_text(OLD_NVCC)
    nvcc.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib"]
    environment = {**os.environ, "PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*command, str(lib)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Unsupported gpu architecture 'compute_100'; the wheel carries its source" in done.stdout
    found = {path.name for path in (lib / "passdeploy" / "kernels" / "cuda").iterdir()}
    assert found == {path.name for path in (ROOT / "kernels").iterdir()}


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage by its name: (keyword, rest)."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile.gpu").read_text(), flags=re.M).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            image, _, name = rest.partition(" AS ")
            found[name] = [("FROM", image)]
        else:
            found[name].append((keyword, rest.strip()))
    return found


def test_dockerfile_is_multi_stage_and_ends_without_root() -> None:
    found = stages()
    assert list(found) == ["", "build", "test", "final"]
    assert ("COPY", "--from=build /opt/passdeploy /opt/passdeploy") in found["final"]
    for name in ("test", "final"):
        users = [rest for keyword, rest in found[name] if keyword == "USER"]
        assert users and users[-1] not in ("root", "0")


def test_dockerfile_knows_only_instructions_and_files_that_exist() -> None:
    known = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    for instructions in stages().values():
        assert {keyword for keyword, _ in instructions} <= known
        for keyword, rest in instructions:
            if keyword == "COPY" and not rest.startswith("--from"):
                assert (ROOT / rest.split()[0]).exists()


def test_dockerfile_pins_what_it_installs() -> None:
    found = stages()
    arguments = dict(rest.split("=") for name in ("", "build") for keyword, rest in found[name] if keyword == "ARG")
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in arguments.values())
    constraints = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    assert arguments["TORCH_TENSORRT"].rsplit(".", 1)[0] == constraints["torch"].rsplit(".", 1)[0]
    # CUDA 13.0.2 is the toolkit of NVRTC 13.0.88: one PTX version for both ways to compile.
    assert arguments["CUDA"].startswith("13.0.") and constraints["nvidia-cuda-nvrtc"].startswith("13.0.")
    pinned = {*constraints, "setuptools", "wheel"}
    for keyword, rest in found["build"]:
        if keyword != "RUN" or "pip install" not in rest:
            continue
        for command in rest.split("&&"):
            words = command.split("pip install")[-1].split() if "pip install" in command else []
            for word in (w.strip('"') for w in words):
                if not (word.startswith(("-", "/", "https://pypi.nvidia.com")) or "==${" in word):
                    assert word in pinned, word


def test_dockerfile_ends_with_what_inductor_compiles_and_links_against() -> None:
    (command,) = [rest for keyword, rest in stages()["final"] if keyword == "RUN" and "apt-get install" in rest]
    # cuda_runtime.h, the crt/host_defines.h and <nv/target> that CUDA 13's headers include, and libcuda's stub.
    wanted = {"cuda-cudart-dev", "cuda-crt", "cuda-cccl", "cuda-driver-dev"}
    major, minor, *_ = dict(rest.split("=") for keyword, rest in stages()[""] if keyword == "ARG")["CUDA"].split(".")
    assert {f"{name}-{major}-{minor}" for name in wanted} | {"g++", "python3-dev"} <= set(command.split())


def test_dockerfile_installs_extras_that_exist() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"/src\[([\w,-]+)\]", (ROOT / "Dockerfile.gpu").read_text()):
        assert set(name.split(",")) <= set(extras)


def test_the_wheels_for_a_machine_without_a_network_want_nothing_more() -> None:
    """They are installed with --no-deps: what is not named is missing there."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    (command,) = re.findall(r"pip download (.*?)\n```", page.replace("\\\n", " "))
    named = {canonicalize_name(name): version for name, version in re.findall(r"([\w-]+)==(\S+)", command)}
    in_the_image = {"torch", "numpy"}
    for name in named:
        here = importlib.metadata.version(name) == named[name]
        for text in importlib.metadata.requires(name) or ():
            wanted = Requirement(text)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            other = canonicalize_name(wanted.name)
            assert other in {*named, *in_the_image}, f"{name} wants {other}"
            if here and other in named:
                assert wanted.specifier.contains(named[other]), f"{name} wants {text}"
