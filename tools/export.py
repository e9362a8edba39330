#!/usr/bin/env python
"""Export a model, and compare what it finds: ``codetr_d2 export``."""

from codetr_d2_programs.export import main

if __name__ == "__main__":
    main()
