"""Pascal VOC: an XML file for each picture (labelImg, CVAT, Roboflow)."""

from xml.etree import ElementTree

from .export import Export, ExportBuilder, Source, split_of_folders

__all__ = ["read_pascal_voc"]

_FROM_1 = ("The VOC", "roboflow.ai")  # databases of files that count pixels from 1: PASCAL's own, supervision's


def read_pascal_voc(source: Source) -> Export:
    """Read the XML files. Splits are known by ``ImageSets/Main/train.txt`` and so on, or by the names of folders.

    Tools write the edges of a box as they are; PASCAL's own files and those of supervision count pixels from 1, and are
    known by the name of their database. Objects that are "difficult" count as any other.
    """
    builder = ExportBuilder("Pascal VOC")
    listed = {}
    for split in ("train", "val", "test"):
        for file in source.path.rglob(f"ImageSets/Main/{split}.txt"):
            listed |= {line.split()[0]: split for line in file.read_text().splitlines() if line.strip()}
    for file in source.files:

        def parse(file=file) -> None:
            try:
                root = ElementTree.parse(file).getroot()
            except ElementTree.ParseError as error:
                raise ValueError(error) from error
            name = root.findtext("filename") or ""
            # Some tools leave the suffix out, and renamed pictures keep their XML file.
            picture = source.pictures.find(name, file.parent) if name else None
            picture = picture or source.pictures.find_stem(file.stem, file.parent)
            size = root.find("size")
            claimed = (
                (int(size.findtext("width") or 0), int(size.findtext("height") or 0)) if size is not None else None
            )
            split = listed.get(file.stem) or split_of_folders(file, source.path)
            image = builder.picture(picture, f"{name or file.stem} of {file}", split, claimed)
            if image is None:
                return
            first = 1 if (root.findtext("source/database") or "").startswith(_FROM_1) else 0
            for entry in root.iter("object"):
                box = entry.find("bndbox")
                x0, y0, x1, y1 = (float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
                box = (x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first)
                builder.object(image, entry.findtext("name").strip(), box)

        builder.read(file, parse)
    return builder.export()
