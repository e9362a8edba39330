#!/usr/bin/env python
"""Install detectron2 where it is missing: ``codetr_d2 install-detectron2``, before anything is installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from codetr_d2_programs.install_detectron2 import main

if __name__ == "__main__":
    main()
