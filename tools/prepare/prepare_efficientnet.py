#!/usr/bin/env python
"""Fetch the weights that the small models start from: ``codetr_d2 prepare-efficientnet``."""

from codetr_d2_programs.prepare_efficientnet import main, prepare

__all__ = ["main", "prepare"]

if __name__ == "__main__":
    main()
