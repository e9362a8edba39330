"""Build and install the package; the C++ operator is built against the installed PyTorch.

Without a compiler or PyTorch, or where the build fails, the package installs all the same, with one warning: the
operator then runs in plain PyTorch. ``CODETR_D2_NO_CPP=1`` leaves the C++ operator out on purpose.
"""

import os
import sys

from setuptools import find_packages, setup


def warn(reason):
    print(
        "WARNING: codetr_d2 is installed without its C++ operator, so deformable attention will be slow on the CPU: "
        + reason,
        file=sys.stderr,
    )


def cpp_extension():
    """The arguments of ``setup`` that build the operator; empty where it can't be built."""
    if os.environ.get("CODETR_D2_NO_CPP", "0") not in ("", "0"):
        warn("CODETR_D2_NO_CPP is set.")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        warn(f"PyTorch can't be imported ({error}). Install it, then run pip with --no-build-isolation.")
        return {}

    class OptionalBuildExtension(BuildExtension):
        """Builds the library, or goes on without it."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:  # whatever compilers, distutils and PyTorch raise
                warn(f"its build failed ({str(error).splitlines()[0] if str(error) else type(error).__name__}).")

    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: single-threaded there
    extension = CppExtension(
        "codetr_d2._C",
        ["codetr_d2/ops/csrc/ms_deform_attn_cpu.cpp"],
        # No -march=native: the file holds the kernels of several instruction sets, and the build may move.
        extra_compile_args=["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", *openmp],
        extra_link_args=openmp,
        optional=True,  # a library that isn't there is not copied
    )
    # Loaded by torch.ops.load_library: it is no Python module, needs no Python headers and fits every Python 3.
    command = OptionalBuildExtension.with_options(no_python_abi_suffix=True, use_ninja=False)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": command}}


setup(
    name="codetr_d2",
    version="0.1.0",
    description="Co-DETR (ICCV 2023) for Detectron2",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["codetr_d2", "codetr_d2.*"]),
    package_data={"codetr_d2.ops": ["csrc/*.cpp"]},
    install_requires=[
        "torch",
        "torchvision",
        "detectron2",  # tools/install_detectron2.py
        "fvcore",
        "iopath",
        "numpy",
        "scipy",
        "pycocotools",
        "timm",
        "pillow",
        "matplotlib",
        "tqdm",
        # OpenCV too, as opencv-python or opencv-python-headless: detectron2 and the demo import cv2 from either.
    ],
    extras_require={"dev": ["pytest", "ruff"], "quickstart": ["scikit-learn"]},
    **cpp_extension(),
)
