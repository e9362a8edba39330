"""Models without PyTorch: ONNX and OpenVINO files, compared with what they were made of.

``detector.py`` runs such files in the place of a model. All else here needs the packages of the extra ``export``.
"""
