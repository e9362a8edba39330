"""The detector in formats that run without this package."""
