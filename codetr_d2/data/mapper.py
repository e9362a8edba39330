"""From a dataset dict to the model's input: reading, augmenting, boxes."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from PIL import Image

from .copy_paste import CutOuts, choose_objects, paste_objects
from .images import read_image
from .transforms import ResizeShortestEdge

__all__ = ["CoDETRDatasetMapper", "annotation_boxes", "build_augmentations"]

# Short sides that an image is resized to before it is cropped (DETR, arXiv 2005.12872, section 4), and the longest side
# that it may have then.
CROP_SHORT_SIDES = (400, 500, 600)
CROP_MAX_SIZE = 4200
MIN_BOX_SIDE = 0.01  # pixels; what an augmentation leaves smaller is dropped


class _RandomScale(T.Augmentation):
    """Resize so that the longer side is ``side`` times a random factor of ``min_scale`` to ``max_scale``.

    detectron2's ``ResizeScale``, which gives thin pictures a side of no pixels.
    """

    def __init__(self, side: int, min_scale: float, max_scale: float):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        h, w = image.shape[:2]
        scale = np.random.uniform(self.min_scale, self.max_scale) * self.side / max(h, w)
        return T.ResizeTransform(h, w, max(1, round(h * scale)), max(1, round(w * scale)))


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations of the config, in order.

    detectron2's: resize the shorter side (``INPUT.MIN_SIZE_*``, ``INPUT.MAX_SIZE_*``), then flip.

    In training ``INPUT.CROP.ENABLED`` adds DETR's crop: with probability 1/2 the image is first resized to a shorter
    side of 400, 500 or 600 pixels and a random part of it cut out, of ``INPUT.CROP.TYPE`` and ``INPUT.CROP.SIZE`` (as
    published: "absolute_range", [384, 600]). ``INPUT.LARGE_SCALE_JITTER`` takes the place of the resizing: the longer
    side becomes ``MODEL.CODETR.CANVAS_SIZE`` times a random factor, what exceeds a square of that side is cut off at
    random, and what is missing is filled up at the right and the bottom with ``MODEL.CODETR.CANVAS_VALUE``.
    """
    augmentations = [
        ResizeShortestEdge(x.short_edge_length, x.max_size, x.sample_style, x.interp)
        if isinstance(x, T.ResizeShortestEdge)
        else x
        for x in utils.build_augmentation(cfg, is_train)
    ]
    jitter = cfg.INPUT.LARGE_SCALE_JITTER
    if is_train and jitter.ENABLED:
        side = cfg.MODEL.CODETR.CANVAS_SIZE
        # Not FixedSizeCrop's own crop, which draws one number for both directions; and flipped before it is filled up,
        # so that the picture lies at the top left as in the test.
        return [
            _RandomScale(side, jitter.MIN_SCALE, jitter.MAX_SCALE),
            T.RandomCrop("absolute", (side, side)),
            *augmentations[1:],
            T.FixedSizeCrop((side, side), pad_value=cfg.MODEL.CODETR.CANVAS_VALUE, seg_pad_value=0),
        ]
    if is_train and cfg.INPUT.CROP.ENABLED:
        resize = ResizeShortestEdge(CROP_SHORT_SIDES, CROP_MAX_SIZE, sample_style="choice")
        crop = T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)
        augmentations.insert(0, T.RandomApply(T.AugmentationList([resize, crop]), prob=0.5))
    return augmentations


class _Picture(T.AugInput):
    """An image whose pixels lie in memory channel by channel once they are resized, as the model takes them.

    Resized by torch, which has Pillow's antialiasing filter and gives the same but for a level or two in few pixels, in
    a third of the time.
    """

    def transform(self, tfm: T.Transform) -> None:
        for part in tfm.transforms if isinstance(tfm, T.TransformList) else [tfm]:
            if isinstance(part, T.ResizeTransform) and part.interp == Image.BILINEAR:
                self.image = _resize(self.image, part.new_h, part.new_w)
            elif isinstance(part, T.PadTransform):
                self.image = _pad(self.image, part)
            else:
                self.image = part.apply_image(self.image)


def _unflipped(image: np.ndarray) -> np.ndarray:
    """An array that torch takes: flips are negative strides, even along an axis of one pixel."""
    return image.copy() if any(x < 0 for x in image.strides) else image


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W, C] uint8 -> [height, width, C]."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(_unflipped(image)).permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _pad(image: np.ndarray, padding: T.PadTransform) -> np.ndarray:
    """What ``padding.apply_image`` does."""
    (height, width, channels), x, y = image.shape, padding.x0, padding.y0
    padded = np.full((channels, y + height + padding.y1, x + width + padding.x1), padding.pad_value, image.dtype)
    padded = padded.transpose(1, 2, 0)
    padded[y : y + height, x : x + width] = image
    return padded


def annotation_boxes(annotations: Sequence[dict]) -> np.ndarray:
    """Boxes of annotations, of any ``bbox_mode``, as [N, 4] xyxy float64."""
    boxes = np.zeros((len(annotations), 4))
    modes = [x["bbox_mode"] for x in annotations]
    for mode in set(modes):
        chosen = [i for i, x in enumerate(modes) if x == mode]
        converted = np.array([annotations[i]["bbox"] for i in chosen], dtype=np.float64)
        boxes[chosen] = BoxMode.convert(converted, mode, BoxMode.XYXY_ABS)
    return boxes


class CoDETRDatasetMapper(DatasetMapper):
    """detectron2's :class:`DatasetMapper` for pictures of any kind, with DETR's crop, large-scale jitter, copy-paste.

    Called with a dataset dict, it returns that dict with ``image`` ([C, H, W] uint8, channels as ``INPUT.FORMAT``) and,
    in training, ``instances`` in place of ``annotations``: ``gt_boxes`` (xyxy in pixels of ``image``), ``gt_classes``
    and, with ``MODEL.MASK_ON``, ``gt_masks`` (of the type that ``INPUT.MASK_FORMAT`` says, ``BitMasks`` where there is
    copy-paste). Crowd boxes and those that a crop cuts away are dropped; an image that keeps none is still used.
    Crops clip boxes, but large-scale jitter with masks draws them anew around what is left of these.

    Args:
        is_train: whether to augment and to return ``instances``.
        max_num_pasted: paste up to so many objects of another image (:mod:`codetr_d2.data.copy_paste`); every object
            needs a mask then. 0: none.
        records: the dataset dicts of which copy-paste draws its second image. Everything random is drawn from numpy's
            global generator.
        options: those of ``DatasetMapper``.

    Raises:
        InputError: the image is missing, damaged, or of another size than its annotation says.
    """

    @configurable
    def __init__(self, is_train: bool, *, max_num_pasted: int, records: Sequence[dict] = (), **options):
        super().__init__(is_train, **options)
        self.max_num_pasted = max_num_pasted if is_train else 0
        self.records = records
        if self.max_num_pasted and not len(records):
            raise ValueError("INPUT.COPY_PASTE needs the dataset: CoDETRDatasetMapper(cfg, records=dataset_dicts)")

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        options = super().from_config(cfg, is_train)
        options["augmentations"] = build_augmentations(cfg, is_train)
        options["max_num_pasted"] = cfg.INPUT.COPY_PASTE.MAX_NUM_PASTED if cfg.INPUT.COPY_PASTE.ENABLED else 0
        # DETR's crop clips boxes, also where there are masks; only the jitter draws them anew around what is left.
        options["recompute_boxes"] = options["use_instance_mask"] and cfg.INPUT.LARGE_SCALE_JITTER.ENABLED
        return options

    def __call__(self, dataset_dict: dict) -> dict:
        dataset_dict = dict(dataset_dict)  # modified below; its annotations are not
        image, transforms = self._read(dataset_dict)
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif self.max_num_pasted or ("annotations" in dataset_dict and self._draws_masks):
            annotations = dataset_dict.pop("annotations", [])
            objects = CutOuts.from_annotations(annotations, transforms, image.shape[:2])
            if self.max_num_pasted:
                image, objects = self._copy_paste(image, objects)
            dataset_dict["instances"] = objects.to_instances(self.use_instance_mask)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        # One tensor goes between processes through shared memory; anything else would be pickled.
        dataset_dict["image"] = torch.from_numpy(_unflipped(np.ascontiguousarray(image.transpose(2, 0, 1))))
        return dataset_dict

    @property
    def _draws_masks(self) -> bool:
        """Whether boxes are drawn around bit masks."""
        return self.recompute_boxes and self.instance_mask_format == "bitmask"

    def _read(self, dataset_dict: dict) -> tuple[np.ndarray, T.Transform]:
        """Read and augment one image [H, W, C]."""
        size = (dataset_dict["width"], dataset_dict["height"]) if "width" in dataset_dict else None
        image = read_image(dataset_dict["file_name"], self.image_format, size)
        utils.check_image_size(dataset_dict, image)  # fills in the size where the dataset has none
        picture = _Picture(image)
        transforms = self.augmentations(picture)
        return picture.image, transforms

    def _copy_paste(self, image: np.ndarray, objects: CutOuts) -> tuple[np.ndarray, CutOuts]:
        """Paste objects of a random image of the dataset, which is augmented as any other."""
        source = dict(self.records[np.random.randint(len(self.records))])
        source_image, transforms = self._read(source)
        source_objects = CutOuts.from_annotations(source.get("annotations", []), transforms, source_image.shape[:2])
        return paste_objects(image, objects, source_image, choose_objects(source_objects, self.max_num_pasted))

    def _transform_annotations(self, dataset_dict: dict, transforms: T.Transform, image_shape: tuple[int, int]) -> None:
        annotations = [x for x in dataset_dict.pop("annotations") if x.get("iscrowd", 0) == 0]
        boxes = annotation_boxes(annotations)
        if not self.use_instance_mask:
            height, width = image_shape
            boxes = transforms.apply_box(boxes).clip(0, (width, height, width, height))
            classes = np.array([x["category_id"] for x in annotations], dtype=np.int64)
            kept = (boxes[:, 2:] - boxes[:, :2] > MIN_BOX_SIDE).all(axis=1)
            dataset_dict["instances"] = Instances(
                image_shape, gt_boxes=Boxes(boxes[kept]), gt_classes=torch.from_numpy(classes[kept])
            )
            return
        if not annotations:  # detectron2 leaves the masks out where there is no object, and then looks for them
            instances = utils.annotations_to_instances([], image_shape)
            is_polygon = self.instance_mask_format == "polygon"
            instances.gt_masks = PolygonMasks([]) if is_polygon else BitMasks(torch.zeros(0, *image_shape))
        else:
            # Of their own, as detectron2 changes them, and of floats, as it transforms whole numbers to whole numbers.
            annotations = [{**x, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS} for x, box in zip(annotations, boxes)]
            for annotation in annotations:
                if isinstance(annotation["segmentation"], list):
                    annotation["segmentation"] = [np.array(x, dtype=np.float64) for x in annotation["segmentation"]]
            dataset_dict["annotations"] = annotations
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            instances = dataset_dict["instances"]
        dataset_dict["instances"] = instances[instances.gt_boxes.nonempty(MIN_BOX_SIDE)]
