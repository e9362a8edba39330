#!/usr/bin/env python
"""Measure on trained models what the paper measures: ``codetr_d2 analyze``."""

from codetr_d2_programs.analyze import main

if __name__ == "__main__":
    main()
