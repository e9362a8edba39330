"""Models in files that run without this package: ONNX, OpenVINO, torch programs.

``detector.py`` runs ONNX and OpenVINO files in the place of a model; what writes these needs the packages of the extra
``export``.
"""
