"""Everything is in pyproject.toml; here is only how to compile the CUDA extension ahead.

    FMUPSAMPLE_BUILD_CUDA=1 pip install --no-build-isolation .

puts it into the package (``-e`` works as well), for the architectures in TORCH_CUDA_ARCH_LIST or
the usual ones. It then serves the PyTorch it was compiled with and no other. Without the switch the
package is pure Python, and PyTorch is not needed to install it.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NAMES = ("fmupsample/ops/_cuda.so", "fmupsample/ops/_cuda.json")


class BuildLibrary(build_ext):
    """Compiles with the builder that is used at the first use, too."""

    def run(self) -> None:
        sys.path.insert(0, str(ROOT))
        from fmupsample.errors import FmupsampleError
        from fmupsample.ops.building.extension import EXTENSION

        path = (ROOT if self.inplace else Path(self.build_lib)) / NAMES[0]
        try:
            library = EXTENSION.build_into(path, EXTENSION.targets("listed"), jobs=self.parallel)
        except FmupsampleError as error:
            sys.exit(f"error: FMUPSAMPLE_BUILD_CUDA is set, but {error}")
        print(f"compiled {path} for {', '.join(library.targets)} in {library.seconds:.0f} s")

    def get_outputs(self) -> list[str]:
        return [str(ROOT / name if self.inplace else Path(self.build_lib, name)) for name in NAMES]

    def get_output_mapping(self) -> dict[str, str]:
        return {str(Path(self.build_lib, name)): name for name in NAMES if self.inplace}


class PlatformWheel(bdist_wheel):
    """The library does not depend on Python: one wheel for every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


options = {}
if os.environ.get("FMUPSAMPLE_BUILD_CUDA", "") not in ("", "0"):
    # For setuptools it is an extension without sources: a file of this platform to be made.
    options["ext_modules"] = [Extension("fmupsample.ops._cuda", sources=[])]
    options["cmdclass"] = {"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel}
setup(**options)
