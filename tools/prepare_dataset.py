#!/usr/bin/env python
"""Make a dataset of a labelling tool's export: ``codetr_d2 prepare-dataset``."""

from codetr_d2_programs.prepare_dataset import main

if __name__ == "__main__":
    main()
