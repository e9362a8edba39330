"""COCO-style datasets on disk: registered in detectron2's catalogs, and checked before any long work starts."""

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from ..errors import InputError
from .images import check_image_file
from .json_file import read_annotation_json
from .lvis import load_lvis

__all__ = ["check_registered", "class_names", "load_datasets", "register_datasets", "register_metadata"]

logger = logging.getLogger(__name__)

_OVERHANG = 1.0  # pixels that a box may stick out of its image without a word: rounding
_registered: dict[str, tuple[str, str]] = {}  # dataset name -> (image folder, annotation json)
_faulty_masks: dict[str, str | None] = {}  # annotation json, once it is read -> what is wrong with its first bad mask
_checked_images: set[tuple] = set()  # what _check_images has passed in this process


def register_datasets(cfg: CfgNode) -> None:
    """Register the datasets of ``cfg.DATASETS.COCO_JSON``, (name, image folder, annotation json) triples.

    Registering a triple again changes nothing.

    Raises:
        InputError: an entry is no such triple, its folder or file does not exist, or its name is taken.
    """
    for entry in cfg.DATASETS.COCO_JSON:
        if not (isinstance(entry, (list, tuple)) and len(entry) == 3 and all(isinstance(x, str) for x in entry)):
            raise InputError(
                f"DATASETS.COCO_JSON: {entry!r} is not a [name, image folder, annotation json] triple. "
                'Write it like ["my_train", "data/images", "data/train.json"].'
            )
        name, image_folder, annotation_json = entry
        paths = (image_folder, annotation_json)
        if _registered.get(name, paths) != paths or (name in DatasetCatalog and name not in _registered):
            taken_by = " and ".join(_registered[name]) if name in _registered else "a dataset registered elsewhere"
            raise InputError(f"DATASETS.COCO_JSON: the name {name!r} is taken by {taken_by}. Choose another name.")
        if not PathManager.isdir(image_folder):
            raise InputError(
                f"The image folder {image_folder} of dataset {name!r} does not exist. Correct DATASETS.COCO_JSON "
                "(paths are relative to where the command is run) or put the images there."
            )
        if not PathManager.isfile(annotation_json):
            raise InputError(
                f"The annotation file {annotation_json} of dataset {name!r} does not exist. Correct DATASETS.COCO_JSON "
                "(paths are relative to where the command is run) or put the file there."
            )
        if name not in _registered:
            DatasetCatalog.register(name, partial(_load_coco, name, *paths))
            MetadataCatalog.get(name).set(image_root=image_folder, json_file=annotation_json, evaluator_type="coco")
            _registered[name] = paths


def register_metadata(cfg: CfgNode) -> None:
    """Let the names of the config's datasets carry ``MODEL.CODETR.CLASS_NAMES``, where they have no class names yet.

    For prediction with a saved config, where the dataset itself may be far away: ``DefaultPredictor.metadata`` and the
    ``Visualizer`` then show the names.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if cfg.MODEL.CODETR.CLASS_NAMES and MetadataCatalog.get(name).get("thing_classes") is None:
            MetadataCatalog.get(name).thing_classes = list(cfg.MODEL.CODETR.CLASS_NAMES)


def class_names(cfg: CfgNode) -> list[str]:
    """The names of the classes, in the order of their indices: the config's own, or those of its first dataset.

    Datasets must be registered. Empty where neither the config nor the dataset names its classes.

    Raises:
        InputError: the dataset is not registered, or its annotation file is malformed.
    """
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if cfg.MODEL.CODETR.CLASS_NAMES or not names:
        return list(cfg.MODEL.CODETR.CLASS_NAMES)
    check_registered(names[:1])
    metadata = MetadataCatalog.get(names[0])
    known, annotation_json = metadata.get("thing_classes"), _annotation_json(names[0])
    if known is None and annotation_json is not None:
        categories = _check_categories(annotation_json, read_annotation_json(annotation_json))
        known = [categories[x] for x in sorted(categories)]
    return list(known or [])


def load_datasets(cfg: CfgNode, names: Sequence[str], is_train: bool) -> list[dict]:
    """Load datasets as detectron2 dataset dicts and check them, annotations and image files alike.

    For training, the test datasets of the config are checked too, so that nothing stops the evaluation later. Boxes of
    no area are left out and boxes that overhang the image are clipped, with one warning for each dataset. Images
    without an object are kept unless ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``. With ``MODEL.MASK_ON`` every annotation
    must have a mask.

    Args:
        cfg: the config; its datasets must be registered (:func:`register_datasets`).
        names: names of the datasets to load, which are concatenated.
        is_train: whether to train on them.

    Returns:
        One dict for each image: ``file_name``, ``height``, ``width``, ``image_id`` and ``annotations``, whose
        ``category_id`` count from 0 in the order of the ids in the file.

    Raises:
        InputError: naming the file and the key at fault.
    """
    names = list(names)
    if not names:
        raise InputError(f"DATASETS.{'TRAIN' if is_train else 'TEST'} is empty. Name a dataset there.")
    other_names = [x for x in cfg.DATASETS.TEST if x not in names] if is_train else []
    check_registered(names + other_names)

    others = {name: _load(name) for name in other_names}
    loaded = {name: _load(name) for name in names}
    dicts = [record for name in names for record in loaded[name]]
    _check_classes(cfg, names + other_names)
    if cfg.MODEL.MASK_ON:
        _check_masks("MODEL.MASK_ON", {**others, **loaded})
    if is_train and cfg.INPUT.COPY_PASTE.ENABLED:
        _check_masks("INPUT.COPY_PASTE.ENABLED", loaded)
    elif is_train and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        _check_polygons(loaded)
    if is_train and not any(x.get("iscrowd", 0) == 0 for d in dicts for x in d.get("annotations", [])):
        raise InputError(
            f"No image of {', '.join(names)} has a valid box, so there is nothing to learn. "
            "Check the boxes ([x, y, width, height] in pixels, width and height above 0) in the annotation file."
        )
    for name, records in {**others, **loaded}.items():  # last, as it takes longest
        _check_images(name, records)
    if is_train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    return dicts


def _load(name: str) -> list[dict]:
    if MetadataCatalog.get(name).get("evaluator_type") == "lvis":
        return load_lvis(name)
    return DatasetCatalog.get(name)


def _annotation_json(name: str) -> str | None:
    """The annotation file of a dataset, where it has one."""
    return _registered[name][1] if name in _registered else MetadataCatalog.get(name).get("json_file")


def check_registered(names: Iterable[str]) -> None:
    """Every dataset is registered, and the files of those that no config describes are there.

    Raises:
        InputError: naming the dataset or the missing path, and what to do.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise InputError(
                f"The dataset {name!r} (DATASETS.TRAIN, DATASETS.TEST) is not registered. Describe it with a "
                "[name, image folder, annotation json] triple in DATASETS.COCO_JSON, or use the name of one of "
                "detectron2's own datasets, like coco_2017_train."
            )
        metadata = MetadataCatalog.get(name)
        for path in (metadata.get("json_file"), metadata.get("image_root")):
            if name not in _registered and path is not None and not PathManager.exists(path):
                raise InputError(
                    f"{path} of the dataset {name!r} does not exist. Set the environment variable DETECTRON2_DATASETS "
                    "to the folder that holds detectron2's datasets (./datasets otherwise), or put the dataset there."
                )


def _check_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """The datasets, which are loaded, have the same classes, and as many as the model."""
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    classes = {name: list(x) for name, x in classes.items() if x is not None}
    expected = list(cfg.MODEL.CODETR.CLASS_NAMES)
    first = next(iter(classes), None)
    for name, found in classes.items():
        if len(found) != cfg.MODEL.CODETR.NUM_CLASSES:
            raise InputError(
                f"The dataset {name!r} has {len(found)} categories but MODEL.CODETR.NUM_CLASSES is "
                f"{cfg.MODEL.CODETR.NUM_CLASSES}. Set MODEL.CODETR.NUM_CLASSES {len(found)}, or correct the categories "
                "in its annotation file."
            )
        if found != classes[first]:
            raise InputError(
                f"The datasets {first!r} and {name!r} have different categories "
                f"({_difference(classes[first], found)}). "
                "Give both annotation files the same categories, with the same ids."
            )
        if expected and found != expected:
            raise InputError(
                f"MODEL.CODETR.CLASS_NAMES differs from the categories of the dataset {name!r} "
                f"({_difference(expected, found)}). "
                "Remove the option or give the names in the order of the category ids."
            )


def _check_polygons(loaded: dict[str, list[dict]]) -> None:
    """No mask is an RLE, but for crowds, which training leaves out."""
    for name, records in loaded.items():
        for annotation in itertools.chain.from_iterable(x["annotations"] for x in records):
            if isinstance(annotation["segmentation"], dict) and not annotation.get("iscrowd", 0):
                raise InputError(
                    f'{_annotation_json(name) or name}: the "segmentation" of bbox {annotation["bbox"]} is an RLE, '
                    "which INPUT.MASK_FORMAT polygon cannot hold. Set INPUT.MASK_FORMAT bitmask."
                )


def _difference(first: list[str], second: list[str]) -> str:
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} classes"
    return next(f"class {i} is {a!r} and {b!r}" for i, (a, b) in enumerate(zip(first, second)) if a != b)


def _check_categories(annotation_json: str, data: dict) -> dict[int, str]:
    """Category id -> name."""
    categories = {}
    for i, category in enumerate(data["categories"]):
        where = f"{annotation_json}: categories[{i}]"
        if not isinstance(category, dict) or not isinstance(category.get("id"), int) or "name" not in category:
            raise InputError(f'{where} needs an integer "id" and a "name", but is {category!r}.')
        if category["id"] in categories:
            raise InputError(f"{where} has the id {category['id']} of an earlier category. Give each an id of its own.")
        categories[category["id"]] = str(category["name"])
    if not categories:
        raise InputError(f'{annotation_json}: "categories" is empty. List the classes with their ids and names.')
    return categories


def _is_box(box) -> bool:
    return isinstance(box, (list, tuple)) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)


def _is_segmentation(segmentation, image_size: list[int]) -> bool:
    if isinstance(segmentation, dict) and segmentation:
        return "counts" in segmentation and segmentation.get("size") == image_size
    return not segmentation or (isinstance(segmentation, list) and all(isinstance(x, list) for x in segmentation))


def _check_annotations(annotation_json: str, data: dict) -> None:
    """Check what detectron2 and pycocotools take for granted in a COCO annotation file."""
    categories = _check_categories(annotation_json, data)
    images = {}  # id -> [height, width]
    for i, image in enumerate(data["images"]):
        where = f"{annotation_json}: images[{i}]"
        missing = (
            [x for x in ("id", "file_name", "width", "height") if x not in image] if isinstance(image, dict) else []
        )
        if not isinstance(image, dict) or missing:
            raise InputError(f"{where} lacks {', '.join(missing) or 'its keys'}. Add what is missing: {image!r}.")
        where += f" ({image['file_name']})"
        if not isinstance(image["id"], (int, str)) or not isinstance(image["file_name"], str):
            raise InputError(f'{where}: "id" must be a number and "file_name" a text, not {image!r}.')
        if not all(isinstance(image[x], int) and image[x] > 0 for x in ("width", "height")):
            raise InputError(
                f'{where}: "width" and "height" must be whole numbers of pixels above 0, not '
                f"{image['width']!r} and {image['height']!r}."
            )
        if image["id"] in images:
            raise InputError(f"{where} has the id {image['id']!r} of an earlier image. Give each an id of its own.")
        images[image["id"]] = [image["height"], image["width"]]
    if not images:
        raise InputError(f'{annotation_json}: "images" is empty, so there is nothing to read.')

    ids = set()
    for i, annotation in enumerate(data["annotations"]):
        where = f"{annotation_json}: annotations[{i}]"
        if not isinstance(annotation, dict):
            raise InputError(f"{where} is {annotation!r}, not an object.")
        missing = [x for x in ("id", "image_id", "category_id", "bbox") if x not in annotation]
        if missing:
            raise InputError(f"{where} lacks {', '.join(missing)}. Add what is missing or remove it.")
        if not isinstance(annotation["id"], (int, str)) or annotation["id"] in ids:
            raise InputError(f'{where}: "id" is {annotation["id"]!r}. Give each annotation an id of its own.')
        ids.add(annotation["id"])
        where += f" (id {annotation['id']})"
        if not isinstance(annotation["image_id"], (int, str)) or annotation["image_id"] not in images:
            raise InputError(
                f'{where}: image_id {annotation["image_id"]!r} is not the id of any entry of "images". '
                "Correct it, add the image, or remove the annotation."
            )
        if not isinstance(annotation["category_id"], int) or annotation["category_id"] not in categories:
            raise InputError(
                f'{where}: category_id {annotation["category_id"]!r} is not the id of any entry of "categories" '
                f"({', '.join(map(str, sorted(categories)[:10]))}{', ...' if len(categories) > 10 else ''}). "
                "Correct it or add the category."
            )
        if not _is_box(annotation["bbox"]):
            raise InputError(f'{where}: "bbox" is {annotation["bbox"]!r}, not [x, y, width, height] in pixels.')
        if not _is_segmentation(annotation.get("segmentation"), images[annotation["image_id"]]):
            raise InputError(
                f'{where}: "segmentation" must be a list of polygons, each [x, y, x, y, ...], or an RLE with "counts" '
                f'and the "size" {images[annotation["image_id"]]} of the image.'
            )
        if annotation.get("ignore", 0) != 0:
            raise InputError(f'{where}: "ignore" is not supported. Use "iscrowd": 1, or remove the annotation.')


def _load_coco(name: str, image_folder: str, annotation_json: str) -> list[dict]:
    """Load a COCO annotation file as detectron2 dataset dicts, checked and with usable boxes only."""
    data = read_annotation_json(annotation_json)
    _check_annotations(annotation_json, data)
    _faulty_masks[annotation_json] = _find_faulty_mask(annotation_json, data)
    scorable = "info" in data and all("area" in x and "iscrowd" in x for x in data["annotations"])
    del data  # the file of a large dataset takes gigabytes in memory, and is about to be read again
    dicts = load_coco_json(annotation_json, image_folder, name)
    metadata = MetadataCatalog.get(name)
    if not (_clean_boxes(annotation_json, dicts) and scorable) and metadata.get("json_file") == annotation_json:
        # pycocotools must score against the boxes that are used here, and needs keys that training does not. Without a
        # json_file, COCOEvaluator writes one from these dicts into its output folder.
        del metadata.json_file
    return dicts


def _clean_boxes(annotation_json: str, dicts: list[dict]) -> bool:
    """Drop boxes of no area, clip those that overhang, warn once. Return whether all were fine."""
    dropped, clipped = [], []
    for image in dicts:
        kept = []
        for annotation in image["annotations"]:
            x, y, w, h = box = annotation["bbox"]
            x1, y1 = min(x + w, image["width"]), min(y + h, image["height"])
            x0, y0 = max(x, 0), max(y, 0)
            if not (all(map(math.isfinite, box)) and w > 0 and h > 0 and x1 > x0 and y1 > y0):
                dropped.append((image["file_name"], box))
                continue
            if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > _OVERHANG:
                clipped.append((image["file_name"], box))
                annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            kept.append(annotation)
        image["annotations"] = kept
    if dropped or clipped:
        example, box = (dropped or clipped)[0]
        logger.warning(
            f"{annotation_json}: {len(dropped)} boxes are left out (no area, not a number, or outside their image) and "
            f"{len(clipped)} that overhang their image are clipped, for example {box} in {example}. "
            "Boxes are [x, y, width, height] in pixels."
        )
    return not (dropped or clipped)


def _is_mask(segmentation) -> bool:
    """Whether a readable one is a mask: polygons, one of them at least valid, or an RLE."""
    return isinstance(segmentation, dict) or any(
        len(x) >= 6 and len(x) % 2 == 0 and all(isinstance(c, (int, float)) for c in x) for x in segmentation or ()
    )


def _find_faulty_mask(annotation_json: str, data: dict) -> str | None:
    """What is wrong with the first annotation whose mask cannot be used; "{option}" stands for what needs it."""
    for i, annotation in enumerate(data["annotations"]):
        segmentation = annotation.get("segmentation")
        if not _is_mask(segmentation):
            found = "not a valid" if segmentation else "no"
            return (
                f'{annotation_json}: annotations[{i}] (id {annotation["id"]}) has {found} "segmentation", which '
                "{option} needs. Give it polygons ([[x, y, x, y, x, y, ...], ...] in pixels, three points or more) or "
                "an RLE, remove the annotation, or set {option} False."
            )
    return None


def _check_masks(option: str, loaded: dict[str, list[dict]]) -> None:
    """Every annotation of the datasets has the mask that an option needs."""
    for name, records in loaded.items():
        if (fault := _faulty_masks.get(_annotation_json(name))) is not None:
            raise InputError(fault.replace("{option}", option))
        for record in records:  # of datasets that were registered elsewhere
            if not all(x.get("segmentation") for x in record.get("annotations", [])):
                raise InputError(
                    f'An annotation of {record["file_name"]} (in {name}) has no "segmentation", which {option} needs. '
                    f"Add the masks to the dataset or set {option} False."
                )


def _check_images(name: str, dicts: list[dict]) -> None:
    """Every image file is there, can be opened and has the size that its annotation says."""
    files = [(d["file_name"], (d["width"], d["height"]) if "width" in d else None) for d in dicts]
    files = [x for x in files if x not in _checked_images]
    missing = [path for path, _ in files if not PathManager.isfile(path)]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(dicts)} images of {name} are missing, first {', '.join(missing[:3])}. "
            "Put them there, or correct the image folder in DATASETS.COCO_JSON or file_name in the annotation file."
        )
    with ThreadPoolExecutor(8) as pool:  # bound by the disk
        for _ in pool.map(lambda x: check_image_file(*x), files):
            pass
    _checked_images.update(files)
