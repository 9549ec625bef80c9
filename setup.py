"""Puts the CUDA sources into the wheel, with machine code where there is an nvcc. All else: pyproject.toml."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildWithKernels(build_py):
    """kernels/ at the top of the repository becomes passdeploy/kernels/cuda/ in the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the sources are found in the repository
            return
        folder = Path(self.build_lib) / "passdeploy" / "kernels" / "cuda"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for source in sorted((HERE / "kernels").glob("*.cu*")):
            shutil.copy2(source, folder)
        sys.path.insert(0, str(HERE))
        from passdeploy.errors import PassdeployError
        from passdeploy.kernels import build

        if build.nvcc_path() is None:
            print("no nvcc: the wheel carries the CUDA sources only, which NVRTC compiles when they are first used")
            return
        for name in build.SOURCES:
            fatbin = folder / f"{name}.fatbin"
            try:
                build.build_fatbin(name, fatbin)
            except PassdeployError as error:  # a toolkit before CUDA 13 does not know the newest GPUs
                fatbin.unlink(missing_ok=True)
                print(f"{error}; the wheel carries its source only, which NVRTC compiles when it is first used")


setup(cmdclass={"build_py": BuildWithKernels})
