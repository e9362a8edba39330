"""Models without PyTorch: ONNX and OpenVINO files, compared with what they were made of.

Importing this needs the packages of the extra ``export``; nothing else of ``codetr_d2`` imports it.
"""
