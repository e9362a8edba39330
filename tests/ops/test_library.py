"""The compiled library: there where it can be."""

import os
import shutil

import pytest

from codetr_d2.ops.library import library_problem

HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
LEFT_OUT = os.environ.get("CODETR_D2_NO_CPP", "0") not in ("", "0")  # as setup.py reads it


@pytest.mark.skipif(LEFT_OUT or not HAS_COMPILER, reason="CODETR_D2_NO_CPP is set, or there is no C++ compiler")
def test_it_is_built_where_there_is_a_compiler():
    """Otherwise the tests that need it would be skipped where they should run."""
    assert not library_problem(), f"{library_problem()}; or set CODETR_D2_NO_CPP=1, to test without it"
