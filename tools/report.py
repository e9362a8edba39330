#!/usr/bin/env python
"""Write a page about a run: ``codetr_d2 report``."""

from codetr_d2_programs.report import main

if __name__ == "__main__":
    main()
