"""Builds the pybind11 extension `actial_fast._C`; metadata lives in pyproject.toml. Needs a C++17 compiler, no CUDA."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "actial_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-ffp-contract=off"],  # costs are to be those of the Python twin to the last bit
        )
    ],
    cmdclass={"build_ext": build_ext},
)
