#!/usr/bin/env python
"""Convert a published checkpoint, and back: ``codetr_d2 convert-checkpoint``."""

from codetr_d2_programs.convert_checkpoint import main

if __name__ == "__main__":
    main()
