#!/usr/bin/env python
"""Detect objects in pictures, folders of pictures and videos: ``codetr_d2 predict``."""

from codetr_d2_programs.predict import main

if __name__ == "__main__":
    main()
