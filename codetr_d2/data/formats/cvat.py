"""CVAT's own XML, "CVAT for images 1.1": all pictures of a task in one file."""

import math
from xml.etree import ElementTree

from ...errors import InputError
from .export import Export, ExportBuilder, Source, split_in, split_of_folders

__all__ = ["read_cvat"]


def read_cvat(source: Source) -> Export:
    """Read the XML files: boxes, rotated ones as the box around them, polygons, ellipses. Other shapes are reported.

    Raises:
        InputError: a file is malformed, or is an export of a video, whose frames are no files.
    """
    roots = []
    for file in source.files:
        try:
            roots.append(ElementTree.parse(file).getroot())
        except ElementTree.ParseError as error:
            raise InputError(f"{file} is not readable XML ({error}). Export it again.") from error
        if roots[-1].find("track") is not None:
            raise InputError(f'{file} is of a video. Export it as "CVAT for images 1.1", with its images.')
    builder = ExportBuilder("CVAT", [x.text for root in roots for x in root.iterfind("meta//labels/label/name")])
    for file, root in zip(source.files, roots):
        for entry in root.iterfind("image"):

            def parse(entry=entry, file=file) -> None:
                name = entry.attrib["name"]
                claimed = (int(entry.attrib["width"]), int(entry.attrib["height"]))
                picture = source.pictures.find(name, file.parent)
                split = split_in(entry.get("subset", ""))
                split = split or (split_of_folders(picture, source.path) if picture else "")
                image = builder.picture(picture, f"{name} in {file}", split, claimed)
                if image is None:
                    return
                for shape in entry:
                    _add_shape(builder, image, shape)

            builder.read(file, parse)
    return builder.export()


def _add_shape(builder: ExportBuilder, image: dict, shape: ElementTree.Element) -> None:
    value = {
        key: float(shape.attrib[key])
        for key in ("xtl", "ytl", "xbr", "ybr", "cx", "cy", "rx", "ry")
        if key in shape.attrib
    }
    angle = math.radians(float(shape.get("rotation", 0)))
    if shape.tag == "polygon":
        polygon = [float(x) for point in shape.attrib["points"].split(";") for x in point.split(",")]
        builder.object(image, shape.attrib["label"], None, [polygon])
        return
    if shape.tag == "box":
        x, y = (value["xtl"] + value["xbr"]) / 2, (value["ytl"] + value["ybr"]) / 2
        w, h = value["xbr"] - value["xtl"], value["ybr"] - value["ytl"]
        cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
        w, h = w * cos + h * sin, w * sin + h * cos
    elif shape.tag == "ellipse":
        x, y = value["cx"], value["cy"]
        w = 2 * math.hypot(value["rx"] * math.cos(angle), value["ry"] * math.sin(angle))
        h = 2 * math.hypot(value["rx"] * math.sin(angle), value["ry"] * math.cos(angle))
    else:
        if shape.tag != "tag":  # one of the whole picture
            builder.problem("shape that is no object", f"{shape.tag} {shape.get('label')}", image)
        return
    builder.object(image, shape.attrib["label"], (x - w / 2, y - h / 2, w, h))
