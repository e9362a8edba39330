"""Co-DETR for detectron2. Importing this package registers its components in detectron2's registries."""

try:
    import torch  # noqa: F401  # isort: skip (first: without it the whole set-up is missing)
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    mend = "pip install torch torchvision" if error.name == "torch" else "codetr_d2 install-detectron2"
    checkout = "make setup" if error.name == "torch" else "python tools/install_detectron2.py"
    raise ModuleNotFoundError(
        f"codetr_d2 needs {error.name}, which is not installed here. Run: {mend} (in the project's folder: {checkout})",
        name=error.name,
    ) from error

from . import modeling  # noqa: F401 (registers their classes)
from .config import add_codetr_config
from .data import objects365  # noqa: F401 (registers the dataset)

__all__ = ["__version__", "add_codetr_config"]
__version__ = "0.1.0"
