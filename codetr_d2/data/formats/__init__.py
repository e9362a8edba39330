"""An export of any labelling tool -> one COCO dict in memory.

Each format is one short parser that fills an :class:`ExportBuilder`. They are ours, as no library reads all of these
and keeps polygons: docs/your_data.md compares them.
"""

from .export import Export, Problem
from .find import FORMATS, read_export

__all__ = ["FORMATS", "Export", "Problem", "read_export"]
