"""Build the compiled core along with the package, where that is possible; without it the package is pure Python.

POMONA_CORE=0 in the environment leaves the core out, POMONA_CORE=1 makes it an error if it cannot be built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_LIBRARY = {"win32": "_core.dll", "darwin": "_core.dylib"}.get(sys.platform, "_core.so")


class CoreHook(BuildHookInterface):
    """Runs CMake in a temporary directory; the library goes into the wheel, or for an editable install into src."""

    def dependencies(self) -> list[str]:
        """CMake from PyPI, only where there is a compiler for it to call."""
        if os.environ.get("POMONA_CORE") == "0" or not _has_compiler():
            return []
        missing = [] if shutil.which("cmake") else ["cmake>=3.15"]
        if sys.platform != "win32" and not shutil.which("ninja") and not shutil.which("make"):
            missing.append("ninja")
        return missing

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get("POMONA_CORE")
        in_source = Path(self.root, "src", "pomona", "native", _LIBRARY)
        if version == "editable":
            in_source.unlink(missing_ok=True)  # a failed build must not leave an old one in use
        if wanted == "0":
            return
        self._scratch = tempfile.mkdtemp(prefix="pomona-core-")
        try:
            library = self._build(Path(self._scratch))
        except (OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            self.app.display_warning(f"{error}\npomona is installed without its compiled core: it works, but slower")
            return
        if version == "editable":
            shutil.copyfile(library, in_source)
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["force_include"][str(library)] = f"pomona/native/{_LIBRARY}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_scratch"):
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _build(self, scratch: Path) -> Path:
        cmake = shutil.which("cmake") or "cmake"
        build, out = scratch / "build", scratch / "out"
        configure = [cmake, "-S", str(Path(self.root, "core")), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        if shutil.which("ninja") and sys.platform != "win32":
            configure += ["-G", "Ninja"]
        if sys.platform == "darwin":  # what the tag promises
            _, target, machine = sysconfig.get_platform().split("-")
            machines = "arm64;x86_64" if machine == "universal2" else machine
            configure += [f"-DCMAKE_OSX_DEPLOYMENT_TARGET={target}", f"-DCMAKE_OSX_ARCHITECTURES={machines}"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--config", "Release", "--parallel", "2"], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(out), "--config", "Release"], check=True)
        return out / _LIBRARY


def _has_compiler() -> bool:
    return sys.platform == "win32" or any(
        shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name
    )
