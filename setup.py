"""Builds the pybind11 extension `actial_fast._C`; metadata lives in pyproject.toml. Needs a C++17 compiler, no CUDA.

Where none is found the package is built without it, with a warning: `actial_fast.packing.native` then says what is slower.
"""

import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, ExecError, LinkError, PlatformError

PROBE = "#include <Python.h>\n#include <optional>\nextern "
PROBE += '"C" int probe() { return std::optional<int>(1).value(); }\n'


class BuildWithCompiler(build_ext):
    def build_extensions(self):
        """An error in our own sources still stops the build: only a missing compiler, or missing Python headers, does not."""
        if problem := self.missing():
            self.warn(f"actial_fast is built WITHOUT its C++ extension, and plans and cuts images slower: no C++17 compiler ({problem})")
            self.extensions = []
        super().build_extensions()

    def missing(self):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(PROBE)
            flag = "/std:c++17" if self.compiler.compiler_type == "msvc" else "-std=c++17"
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_shared_object(objects, str(Path(folder, "probe.so")), target_lang="c++")
            except (CompileError, ExecError, LinkError, PlatformError) as error:
                return str(error)
        return None


setup(
    ext_modules=[
        Pybind11Extension(
            "actial_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            include_dirs=["csrc"],
            cxx_std=17,
            # costs are to be those of the Python twin to the last bit; choices between two numbers are to vectorise
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"],
        )
    ],
    cmdclass={"build_ext": BuildWithCompiler},
)
