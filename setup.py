"""Build and install the package; the C++ operators are built against the installed PyTorch.

Without a compiler or PyTorch, or where the build fails, the package installs all the same, with one warning: the
operators then run in plain PyTorch and torchvision. ``CODETR_D2_NO_CPP=1`` leaves the C++ out on purpose.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    problem = ""
except ImportError as error:
    BuildExtension, CppExtension = build_ext, Extension
    problem = f"PyTorch can't be imported ({error}). Install it, then run pip with --no-build-isolation."
if os.environ.get("CODETR_D2_NO_CPP", "0") not in ("", "0"):
    problem = "CODETR_D2_NO_CPP is set."


class BuildWithConfigs(build_py):
    """Puts the configs into ``codetr_d2/model_zoo``; in a checkout they are found at its top (``config/zoo.py``)."""

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            target = Path(self.build_lib) / "codetr_d2" / "model_zoo" / "configs"
            shutil.copytree("configs", target, dirs_exist_ok=True)


class OptionalBuildExtension(BuildExtension):
    """Builds the library, or warns and goes on without it."""

    def __init__(self, *args, **kwargs):
        # torch.ops.load_library loads it: it is no Python module, needs no Python headers and fits every Python 3.
        options = {} if BuildExtension is build_ext else {"no_python_abi_suffix": True, "use_ninja": False}
        super().__init__(*args, **kwargs, **options)

    def build_extensions(self):
        reason = problem
        if not reason:
            try:
                super().build_extensions()
                return
            except (Exception, SystemExit) as error:  # whatever compilers, setuptools and PyTorch raise
                reason = f"its build failed ({(str(error) or type(error).__name__).splitlines()[0]})."
        print(
            "WARNING: codetr_d2 is installed without its C++ library: it will be slow on the CPU: " + reason,
            file=sys.stderr,
        )
        for extension in self.extensions:
            extension.optional = True  # nobody misses the file
        if getattr(self, "editable_mode", False):  # an older build in the source folder would be taken for this one
            for library in Path("codetr_d2").glob("_C.*"):
                library.unlink()


openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: single-threaded there
extension = CppExtension(
    "codetr_d2._C",
    sorted(map(str, Path("codetr_d2/ops").glob("*/*.cpp"))),
    depends=sorted(map(str, Path("codetr_d2/ops").rglob("*.h"))),
    # No -march=native: the file holds the kernels of several instruction sets, and the build may move.
    extra_compile_args=["-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", *openmp],
    extra_link_args=openmp,
)

setup(
    name="codetr_d2",
    version="0.1.0",
    description="Co-DETR (ICCV 2023) for Detectron2",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["codetr_d2", "codetr_d2.*", "codetr_d2_programs"]),
    entry_points={"console_scripts": ["codetr_d2 = codetr_d2_programs.__main__:main"]},
    package_data={
        "codetr_d2.ops": ["*.h", "*/*.cpp", "*/*.h"],
        "codetr_d2.report": ["*.html", "*.css", "*.js"],
    },
    install_requires=[
        "torch>=2.6",  # reads checkpoints of strangers without running what they hold
        "torchvision",
        "fvcore",
        "iopath",
        "numpy",
        "scipy",
        "scikit-learn",
        "shapely",  # detectron2 crops polygon masks with it, and doesn't ask for it
        "pycocotools",
        "faster-coco-eval",
        "timm",
        "huggingface_hub",
        "pillow",
        "matplotlib",
        "tqdm",
        "jinja2",
        "tabulate",
        "tensorboard",
        # And detectron2, which pip finds under no name, with OpenCV as opencv-python or opencv-python-headless:
        # "codetr_d2 install-detectron2" installs what is missing.
    ],
    extras_require={
        "export": ["nncf", "onnx", "onnxruntime", "onnxscript", "openvino"],
        "dev": ["globox", "playwright", "pytest", "pytest-xdist", "ruff", "transformers"],
        "trackers": ["mlflow", "wandb"],
    },
    ext_modules=[extension],
    cmdclass={"build_ext": OptionalBuildExtension, "build_py": BuildWithConfigs},
)
