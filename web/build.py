"""Compile the core to WebAssembly: web/pomona.wasm. Needs clang and lld, of any version from 14 on, and nothing else.

    python web/build.py [--clang clang++-19] [--out FILE]

There is no C or C++ library for this target; core/wasm has the few pieces that the core uses. The result remembers what
it was made of (a custom section, `sources`), so that a test can see whether it is up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "web" / "pomona.wasm"
SOURCES = (
    "core/src/net.cpp",
    "core/src/plan.cpp",
    "core/src/run.cpp",
    "core/src/net_kernels_portable.cpp",
    "core/wasm/interface.cpp",
    "core/wasm/runtime.cpp",
)
_SECTION = b"\7sources"  # its name, with its length
EXPORTS = ("new", "run", "type", "about")
# -Os: kernels are unrolled by hand; it is a quarter smaller than -O3 and not slower.
COMPILE = """
    --target=wasm32 -std=c++17 -Os -msimd128 -mbulk-memory -ffreestanding -fno-exceptions -fno-rtti -fvisibility=hidden
    -Wall -Wextra -Werror -DPOMONA_NO_THREADS -Icore/wasm/include -Icore/include -Icore/src
""".split()
# Addresses stay below 2^31, where they are the same number with and without a sign. The stack is below everything else:
# one that overflows ends the instance.
LINK = ["-nostdlib", "-Wl,--no-entry,--stack-first,-z,stack-size=262144,--max-memory=2147418112,--strip-all"]
LINK += [f"-Wl,--export=pomona_net_{name}" for name in EXPORTS]


def digest() -> str:
    """A digest of everything that the result depends on, except the compiler's version."""
    found = hashlib.sha256(" ".join((*COMPILE, *LINK)).encode())
    for path in sorted(included(ROOT / name for name in SOURCES)):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def included(files: Iterable[Path]) -> set[Path]:
    """These files and the files from the core's folders that they include."""
    found: set[Path] = set()
    left = list(files)
    while left:
        file = left.pop()
        if file in found:
            continue
        found.add(file)
        for name in re.findall(r'^\s*#\s*include\s*["<]([^">]+)', file.read_text(), flags=re.MULTILINE):
            places = [file.parent, *(ROOT / flag[2:] for flag in COMPILE if flag.startswith("-I"))]
            left += [path for place in places if (path := place / name).is_file()][:1]
    return found


def remembered(wasm: bytes) -> str:
    """The digest that a module ends with."""
    return wasm.rpartition(_SECTION)[2].decode("latin-1")


def has_compiler(clang: str) -> bool:
    """Whether the compiler and the linker that it calls exist."""
    if shutil.which(clang) is None:
        return False
    asked = subprocess.run([clang, "-print-prog-name=wasm-ld"], capture_output=True, text=True, check=True)
    return shutil.which(asked.stdout.strip()) is not None


def build(clang: str, out: Path) -> None:
    command = [clang, *COMPILE, *LINK, *SOURCES, "-o", str(out.absolute())]
    subprocess.run(command, cwd=ROOT, check=True)
    content = _SECTION + digest().encode()
    out.write_bytes(out.read_bytes() + bytes([0, len(content)]) + content)  # a custom section
    out.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clang", default="clang++")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if not has_compiler(options.clang):
        print(f"no {options.clang} with wasm-ld (Debian: apt-get install clang lld): {options.out.name} stays as it is")
        sys.exit(0 if options.out.exists() else 1)
    try:
        build(options.clang, options.out)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # clang has said why
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
