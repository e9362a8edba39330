"""Options: their defaults, how configs are read, what is checked before any long work starts."""

from .defaults import add_codetr_config

__all__ = ["add_codetr_config"]
