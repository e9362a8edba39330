"""Datasets on disk: registered in detectron2's catalogs, and checked before any long work starts."""

import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.utils.file_io import PathManager

from ..errors import InputError
from .annotations import AnnotatedImages, read_coco_json, read_dataset_dicts
from .images import check_image_file
from .shared import once_on_each_machine

__all__ = [
    "AnnotationFile",
    "annotated_images",
    "check_registered",
    "class_names",
    "load_datasets",
    "register_datasets",
    "register_metadata",
]

logger = logging.getLogger(__name__)

_registered: dict[str, tuple[str, str]] = {}  # dataset name -> (image folder, annotation json)
_read: dict[str, tuple[tuple, AnnotatedImages]] = {}  # dataset name -> what its file looked like, and what it holds
_checked_images: set[tuple] = set()  # what _check_images has passed in this process
_IMAGES_PER_TASK = 256


@dataclass(frozen=True)
class AnnotationFile:
    """A dataset in COCO's format, or one that derives from it. Called, it gives dataset dicts, as DatasetCatalog wants.

    Attributes:
        name: of the dataset.
        annotation_json: its file.
        image_folder: where its images lie.
        layout: how a file names its images below the folder: "coco" by "file_name"; "objects365" by the last two parts
            of it, as the archives unpack; "lvis" by the last two parts of "coco_url".
    """

    name: str
    annotation_json: str
    image_folder: str
    layout: Literal["coco", "objects365", "lvis"] = "coco"

    def __call__(self) -> list[dict]:
        return self.read().records

    def read(self) -> AnnotatedImages:
        """Read and check the file, and let the dataset's metadata name the classes.

        Raises:
            InputError: naming the file and the entry at fault.
        """
        required = {"coco": (), "objects365": (), "lvis": ("coco_url",)}[self.layout]
        dataset = read_coco_json(self.annotation_json, self._file_of, required)
        if self.layout == "lvis":
            for category in dataset.categories:
                if category.get("frequency") not in ("r", "c", "f"):
                    raise InputError(
                        f'{self.annotation_json}: the category {category["name"]!r} has no "frequency" (r, c or f), '
                        "so it is not LVIS's. Get the file anew, or describe it in DATASETS.COCO_JSON."
                    )
        self._mend_separators(dataset.records)
        metadata = MetadataCatalog.get(self.name)
        if metadata.get("thing_classes") is None:
            metadata.thing_classes = [x["name"] for x in dataset.categories]
        if len(metadata.thing_classes) != len(dataset.categories):
            raise InputError(
                f"The annotation file {self.annotation_json} has {len(dataset.categories)} categories, but the dataset "
                f"{self.name!r} is registered with {len(metadata.thing_classes)}. Put the file of that dataset there."
            )
        if metadata.get("thing_dataset_id_to_contiguous_id") is None:
            metadata.thing_dataset_id_to_contiguous_id = {x["id"]: i for i, x in enumerate(dataset.categories)}
        return dataset

    def _file_of(self, image: dict) -> str:
        if self.layout == "coco":
            return os.path.join(self.image_folder, image["file_name"])
        path = image["coco_url" if self.layout == "lvis" else "file_name"]
        return os.path.join(self.image_folder, *path.split("/")[-2:])

    def _mend_separators(self, records: list[dict]) -> None:
        """Names that were written on Windows."""
        mended = [x for x in records if "\\" in x["file_name"] and not PathManager.isfile(x["file_name"])]
        for record in mended:
            record["file_name"] = record["file_name"].replace("\\", "/")
        if mended:
            logger.warning(
                "%s: backslashes are taken for separators of folders in %d file names, like %s",
                self.annotation_json,
                len(mended),
                mended[0]["file_name"],
            )


def annotated_images(name: str, num_classes: int = 0) -> AnnotatedImages:
    """A dataset as it is trained and evaluated on. It is read once, unless its file changes.

    Files of detectron2's own COCO and LVIS datasets are read here, with the checks of all others. Dataset dicts of
    other code are checked as they come.

    Args:
        name: of a registered dataset.
        num_classes: how many classes there are where it does not name them; 0: unknown.

    Raises:
        InputError: the dataset is not registered, or at fault.
    """
    check_registered([name])
    file = _annotation_file(name)
    state = (DatasetCatalog[name],)
    if file is not None:
        stat = os.stat(PathManager.get_local_path(file.annotation_json))
        state = (file, stat.st_mtime_ns, stat.st_size)
    if name not in _read or _read[name][0] != state:
        if file is not None:
            dataset = file.read()
        else:
            names = MetadataCatalog.get(name).get("thing_classes") or ()
            dataset = read_dataset_dicts(name, DatasetCatalog.get(name), names, num_classes)
        _read[name] = state, dataset
    return _read[name][1]


def _annotation_file(name: str) -> AnnotationFile | None:
    """The annotation file of a dataset, where that is all it is made of."""
    make, metadata = DatasetCatalog[name], MetadataCatalog.get(name)
    if isinstance(make, AnnotationFile):
        return make
    if metadata.get("json_file") is None or metadata.get("image_root") is None:
        return None
    if metadata.get("evaluator_type") == "lvis":  # detectron2's own loader does not run with today's numpy
        return AnnotationFile(name, metadata.json_file, metadata.image_root, "lvis")
    if getattr(make, "__module__", "") == "detectron2.data.datasets.coco":  # its register_coco_instances
        return AnnotationFile(name, metadata.json_file, metadata.image_root)
    return None


def register_datasets(cfg: CfgNode) -> None:
    """Register the datasets of ``cfg.DATASETS.COCO_JSON``, (name, image folder, annotation json) triples.

    Registering a triple again changes nothing. Nothing is read before it is used: see :func:`check_registered`.

    Raises:
        InputError: an entry is no such triple, or its name is taken.
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
        if name not in _registered:
            DatasetCatalog.register(name, AnnotationFile(name, annotation_json, image_folder))
            MetadataCatalog.get(name).set(image_root=image_folder, evaluator_type="coco")
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

    def load() -> tuple[list, list[str]]:
        categories = annotated_images(names[0], cfg.MODEL.CODETR.NUM_CLASSES).categories
        return [], MetadataCatalog.get(names[0]).get("thing_classes") or [x["name"] for x in categories]

    return list(MetadataCatalog.get(names[0]).get("thing_classes") or once_on_each_machine(load)[1])


def load_datasets(cfg: CfgNode, names: Sequence[str], is_train: bool) -> Sequence[dict]:
    """Load datasets as detectron2 dataset dicts and check them, annotations and image files alike.

    For training, the test datasets of the config are checked too, so that nothing stops the evaluation later. What is
    used of each dataset, and what is left out, is logged in one line. Images without an object are kept unless
    ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``. With ``MODEL.MASK_ON`` every annotation must have a mask.

    Several processes must call this together: one of each machine loads, and shares the dicts with the others.

    Args:
        cfg: the config; its datasets must be registered (:func:`register_datasets`).
        names: names of the datasets to load, which are concatenated.
        is_train: whether to train on them.

    Returns:
        One dict for each image, see :class:`AnnotatedImages`; ``category_id`` count from 0 in the order of the ids in
        the file.

    Raises:
        InputError: naming the file and the key at fault.
    """
    names = list(names)
    if not names:
        raise InputError(f"DATASETS.{'TRAIN' if is_train else 'TEST'} is empty. Name a dataset there.")
    other_names = [x for x in cfg.DATASETS.TEST if x not in names] if is_train else []

    def load() -> tuple[list[dict], dict]:
        dicts = _load_here(cfg, names, other_names, is_train)
        return dicts, {name: MetadataCatalog.get(name).get("thing_classes") for name in names + other_names}

    dicts, classes = once_on_each_machine(load)
    for name, value in classes.items():
        if value is not None and MetadataCatalog.get(name).get("thing_classes") is None:
            MetadataCatalog.get(name).thing_classes = value
    return dicts


def _load_here(cfg: CfgNode, names: list[str], other_names: list[str], is_train: bool) -> list[dict]:
    """What :func:`load_datasets` does, in this process."""
    check_registered(names + other_names)
    num_classes = cfg.MODEL.CODETR.NUM_CLASSES
    others = {name: annotated_images(name, num_classes) for name in other_names}
    loaded = {name: annotated_images(name, num_classes) for name in names}
    _check_classes(cfg, {**loaded, **others})
    if cfg.MODEL.MASK_ON:
        _check_masks("MODEL.MASK_ON", {**others, **loaded})
    if is_train and cfg.INPUT.COPY_PASTE.ENABLED:
        _check_masks("INPUT.COPY_PASTE.ENABLED", loaded)
    elif is_train and cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        _check_polygons(loaded)
    dicts = [record for name in names for record in loaded[name].records]
    if is_train:
        _check_trainable(loaded)
        for name in set(names) - set(cfg.DATASETS.TEST):
            _read.pop(name, None)  # whoever asked for the dicts may not need them for long
    else:
        for name, dataset in loaded.items():
            _check_image_ids(name, dataset.records)
    for name, dataset in others.items():
        _check_image_ids(name, dataset.records)
    for name, dataset in {**others, **loaded}.items():  # last, as it takes longest
        _check_images(name, dataset.records)
    if is_train and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    return dicts


def _check_trainable(loaded: dict[str, AnnotatedImages]) -> None:
    """There is something to learn."""
    for dataset in loaded.values():
        if not dataset.is_annotated:
            raise InputError(f'{dataset.source} has no list "annotations", so there is nothing to learn from it.')
    crowds = [x["iscrowd"] for d in loaded.values() for record in d.records for x in record["annotations"]]
    if all(crowds):
        reason = (
            f'all {len(crowds)} are crowds ("iscrowd": 1), which are not trained on. Set it to 0 for objects'
            if crowds
            else "look at the boxes ([x, y, width, height] in pixels, width and height above 0) in the annotation file"
        )
        raise InputError(f"No image of {', '.join(loaded)} has a valid box, so there is nothing to learn: {reason}.")


def _check_image_ids(name: str, records: list[dict]) -> None:
    """Each image has an id of its own, which evaluation goes by."""
    seen = set()
    for record in records:
        if record.get("image_id") is None:
            raise InputError(
                f'The dataset {name!r}: {record["file_name"]} has no "image_id", which evaluation needs. Give each '
                "image one of its own."
            )
        if record["image_id"] in seen:
            raise InputError(
                f'The dataset {name!r}: {record["file_name"]} has the "image_id" {record["image_id"]!r} of another '
                "image. Give each image one of its own."
            )
        seen.add(record["image_id"])


def check_registered(names: Iterable[str]) -> None:
    """Every dataset is registered, and its files are there.

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
        if name in _registered:
            image_folder, annotation_json = _registered[name]
            hint = "Correct DATASETS.COCO_JSON (paths are relative to where the command is run)"
            if not PathManager.isdir(image_folder):
                raise InputError(
                    f"The image folder {image_folder} of dataset {name!r} does not exist. {hint} or put the images "
                    "there."
                )
            if not PathManager.isfile(annotation_json):
                raise InputError(
                    f"The annotation file {annotation_json} of dataset {name!r} does not exist. {hint} or put the file "
                    "there."
                )
            continue
        metadata = MetadataCatalog.get(name)
        for path in (metadata.get("json_file"), metadata.get("image_root")):
            if path is not None and not PathManager.exists(path):
                raise InputError(
                    f"{path} of the dataset {name!r} does not exist. Set the environment variable DETECTRON2_DATASETS "
                    "to the folder that holds detectron2's datasets (./datasets otherwise), or put the dataset there."
                )


def _check_classes(cfg: CfgNode, loaded: dict[str, AnnotatedImages]) -> None:
    """The datasets have the same classes, and as many as the model."""
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in loaded}
    classes = {name: list(x) for name, x in classes.items() if x is not None}
    expected = list(cfg.MODEL.CODETR.CLASS_NAMES)
    first = next(iter(classes), None)
    for name, found in classes.items():
        if len(found) != cfg.MODEL.CODETR.NUM_CLASSES:
            roots = loaded[name].root_categories
            if roots:
                mend = (
                    f"{', '.join(map(repr, roots))} has no annotations and is only the supercategory of others: remove "
                    f'it from "categories" in {loaded[name].source}, or train it as a class with '
                    f"MODEL.CODETR.NUM_CLASSES {len(found)}."
                )
            else:
                mend = f"Set MODEL.CODETR.NUM_CLASSES {len(found)}, or correct the categories in its annotation file."
            raise InputError(
                f"The dataset {name!r} has {len(found)} categories but MODEL.CODETR.NUM_CLASSES is "
                f"{cfg.MODEL.CODETR.NUM_CLASSES}. {mend}"
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


def _check_polygons(loaded: dict[str, AnnotatedImages]) -> None:
    """No mask is an RLE, but for crowds, which training leaves out."""
    for dataset in loaded.values():
        for annotation in itertools.chain.from_iterable(x["annotations"] for x in dataset.records):
            if isinstance(annotation["segmentation"], dict) and not annotation["iscrowd"]:
                raise InputError(
                    f'{dataset.source}: the "segmentation" of bbox {annotation["bbox"]} is an RLE, which '
                    "INPUT.MASK_FORMAT polygon cannot hold. Set INPUT.MASK_FORMAT bitmask."
                )


def _check_masks(option: str, loaded: dict[str, AnnotatedImages]) -> None:
    """Every annotation of the datasets has the mask that an option needs."""
    for dataset in loaded.values():
        if dataset.maskless:
            raise InputError(dataset.maskless.replace("{option}", option))


def _difference(first: list[str], second: list[str]) -> str:
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} classes"
    return next(f"class {i} is {a!r} and {b!r}" for i, (a, b) in enumerate(zip(first, second)) if a != b)


def _check_images(name: str, dicts: list[dict]) -> None:
    """Every image file is there, can be opened and has the size that its annotation says."""
    files = [(d["file_name"], (d["width"], d["height"]) if "width" in d else None) for d in dicts]
    files = [x for x in files if x not in _checked_images]
    missing = _missing([path for path, _ in files])
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(dicts)} images of {name} are missing, first {', '.join(missing[:3])}. "
            "Put them there, or correct the image folder in DATASETS.COCO_JSON or file_name in the annotation file."
        )

    def check(start: int) -> None:
        for path, size in files[start : start + _IMAGES_PER_TASK]:
            check_image_file(path, size)

    with ThreadPoolExecutor(8) as pool:  # bound by the disk
        for _ in pool.map(check, range(0, len(files), _IMAGES_PER_TASK)):
            pass
    _checked_images.update(files)


def _missing(paths: list[str]) -> list[str]:
    """Those that are no files. A folder is listed once, not asked for each of its files."""
    by_folder = defaultdict(list)
    for path in paths:
        by_folder[os.path.dirname(path)].append(path)
    missing = []
    for folder, in_folder in by_folder.items():
        if "://" in folder or len(in_folder) < _IMAGES_PER_TASK:
            missing += [x for x in in_folder if not PathManager.isfile(x)]
            continue
        try:
            with os.scandir(folder) as entries:
                names = {x.name for x in entries if x.is_file()}
        except OSError:
            names = set()
        missing += [x for x in in_folder if os.path.basename(x) not in names]
    return missing
