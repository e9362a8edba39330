"""Where the query heads are registered."""

from detectron2.utils.registry import Registry

__all__ = ["QUERY_HEAD_REGISTRY"]

QUERY_HEAD_REGISTRY = Registry("QUERY_HEAD")
QUERY_HEAD_REGISTRY.__doc__ = """
Registry of query heads, the detectors' own: the names that ``MODEL.CODETR.QUERY_HEAD`` may have.

The registered object is called with ``obj(cfg)``. A query head is trained with the auxiliary heads and is all that
inference keeps of them.
"""
