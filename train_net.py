#!/usr/bin/env python
"""Train or evaluate a model that a config file describes: ``codetr_d2 train`` and ``codetr_d2 evaluate``."""

from codetr_d2_programs.train import main

if __name__ == "__main__":
    main()
