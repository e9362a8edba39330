"""Models in files that run without this package: ONNX, OpenVINO, torch programs.

What writes ONNX and OpenVINO files needs the packages of the extra ``export``; ``codetr_d2.inference.exported`` runs
them.
"""
