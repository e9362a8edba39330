"""The paper's measurements on models: maths in one file for each, pictures in :mod:`codetr_d2.analysis.plots`."""
