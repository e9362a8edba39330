"""Co-DETR: a DETR trained together with auxiliary heads that assign one to many (paper, section 3)."""

import contextlib
import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, ResNet, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from .. import ops
from ..errors import InputError
from ..option_checks import one_of, positive, within
from .auxiliary import AUX_HEAD_REGISTRY, auxiliary_head_names, build_auxiliary_head
from .auxiliary_pyramid import auxiliary_level_class
from .backbones.resnet import CheckpointedResNet
from .facts import check_options, under
from .masks.refine import RefineMaskHead
from .neck import ChannelMapper
from .postprocess import detections_from_queries
from .pyramid import FeaturePyramid, build_pyramid
from .query_heads import QUERY_HEAD_REGISTRY
from .structures import DecoderOutput
from .training_pictures import TrainingPictures

__all__ = ["CoDETR"]


@META_ARCH_REGISTRY.register()
class CoDETR(nn.Module):
    """Collaborative DETR.

    In training every auxiliary head reads the encoder's output, adds its own losses and hands its candidates on to the
    query head as further decoder queries. Inference leaves the auxiliary heads out, unless ``eval_head`` names one or
    masks are asked of the ROI head's branch.

    Args:
        backbone: a detectron2 backbone.
        in_features: names of the backbone features, from fine to coarse.
        neck: backbone features -> levels, or None where these are the levels.
        strides: stride of each level in pixels.
        query_head: encoder, decoder and the losses of the queries.
        auxiliary_heads: by name, in the order of the query head's positive queries.
        auxiliary_weight: weight of the auxiliary heads' losses (lambda_2 times the decoder layers, eq. 6). With 0 the
            heads assign alone, and they and their coarser level are not trained.
        eval_head: "detr", or the name of the auxiliary head whose detections inference returns.
        mask_head: predicts masks of the detections, from the encoder's output; or None.
        roi_masks: whether the auxiliary head named "roi" does so.
        pixel_mean, pixel_std: for the normalisation of the images.
        size_divisibility: images are padded to multiples of so many pixels.
        canvas_size: side of the square, in pixels, that every image is put on at the top left and whose padding counts
            as a part of the image; 0 to pad images to the largest of their batch instead, and mask the padding.
        inference_dtype: torch.float32; torch.bfloat16 for autocast at inference; None for the one that is faster where
            the model is.
        compile: compile backbone, encoder and decoder for inference.
        canvas_value: value of the canvas's pixels before their normalisation.
        training_pictures: draws what the query head predicts in training; or None.
    """

    PUBLISHED_NAMES = [
        *under("backbone", CheckpointedResNet.PUBLISHED_NAMES),  # detectron2's, which cannot say so itself
        *under("neck", ChannelMapper.PUBLISHED_NAMES),
        ("query_head.downsample.{n}.{rest}", "auxiliary_level.{n}.{rest}"),
        *under("mask_head", RefineMaskHead.PUBLISHED_NAMES),
    ]
    OPTIONS_OF_SHAPES = {"backbone": "MODEL.BACKBONE", "": "MODEL.CODETR.EMBED_DIM"}
    OPTIONS_OF_NAMES = {
        "backbone": "MODEL.BACKBONE.NAME and its depth",
        "neck": "MODEL.CODETR.IN_FEATURES and NUM_FEATURE_LEVELS",
        "auxiliary_level": "MODEL.CODETR.NUM_FEATURE_LEVELS",
        "": "MODEL.CODETR.QUERY_HEAD",
    }
    OPTIONAL_PARTS = {
        "auxiliary_heads.*": "an auxiliary head that MODEL.CODETR.AUX_HEADS does not list",
        "auxiliary_level": "for auxiliary heads; MODEL.CODETR.AUX_HEADS is empty",
        "mask_head": "instance masks; MODEL.MASK_ON is False or MODEL.CODETR.MASK_HEAD another",
    }

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        """Check the options of the model, and let its heads check theirs; the backbone is built by itself."""
        options = cfg.MODEL.CODETR
        one_of(cfg, "MODEL.CODETR.QUERY_HEAD", [name for name, _ in QUERY_HEAD_REGISTRY])
        one_of(cfg, "MODEL.CODETR.AUX_HEADS", [name for name, _ in AUX_HEAD_REGISTRY])
        check_options(QUERY_HEAD_REGISTRY.get(options.QUERY_HEAD), cfg)
        for kind in dict.fromkeys(options.AUX_HEADS):
            check_options(AUX_HEAD_REGISTRY.get(kind), cfg)
        if cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone":  # detectron2's, which cannot say so itself
            one_of(cfg, "MODEL.CODETR.IN_FEATURES", cfg.MODEL.RESNETS.OUT_FEATURES)
        if not 0 < len(options.IN_FEATURES) <= options.NUM_FEATURE_LEVELS:
            raise InputError(
                f"MODEL.CODETR.IN_FEATURES names {len(options.IN_FEATURES)} features; it must be at least one, and at "
                f"most MODEL.CODETR.NUM_FEATURE_LEVELS ({options.NUM_FEATURE_LEVELS})"
            )
        one_of(cfg, "MODEL.CODETR.NECK", ["ChannelMapper", ""])
        one_of(cfg, "MODEL.CODETR.INFERENCE_DTYPE", ["auto", "float32", "bfloat16"])
        one_of(cfg, "MODEL.CODETR.EVAL_HEAD", ["detr", *auxiliary_head_names(options.AUX_HEADS)])
        if cfg.MODEL.MASK_ON:
            one_of(cfg, "MODEL.CODETR.MASK_HEAD", ["roi", "refine"])
            if options.MASK_HEAD == "refine":
                RefineMaskHead.check_options(cfg)
            elif "roi" not in options.AUX_HEADS:
                raise InputError(
                    'MODEL.CODETR.MASK_HEAD is "roi", which is a branch of the ROI auxiliary head: add "roi" to '
                    'MODEL.CODETR.AUX_HEADS, or choose the mask head "refine"'
                )
        if options.AUX_HEADS and not options.LAMBDA2 and not options.POSITIVE_QUERIES.ENABLED:
            raise InputError(
                "MODEL.CODETR.LAMBDA2 is 0 and MODEL.CODETR.POSITIVE_QUERIES.ENABLED is False, so that auxiliary heads "
                "would do nothing: set MODEL.CODETR.AUX_HEADS [] for the plain detector"
            )
        if cfg.MODEL.MASK_ON and options.MASK_HEAD == "roi" and not options.LAMBDA2:
            raise InputError(
                "MODEL.CODETR.LAMBDA2 is 0, so that masks of the ROI auxiliary head would not be trained: set it to "
                '2.0, or MODEL.CODETR.MASK_HEAD "refine"'
            )
        one_of(cfg, "MODEL.MS_DEFORM_ATTN", ["auto", "cpp", "triton", "eager"])
        positive(cfg, "MODEL.CODETR.NUM_CLASSES", "MODEL.CODETR.SIZE_DIVISIBILITY")
        within(cfg, 0, math.inf, "MODEL.CODETR.LAMBDA2", "MODEL.CODETR.CANVAS_SIZE")

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: list[str],
        neck: ChannelMapper | None,
        strides: list[int],
        query_head: nn.Module,
        auxiliary_heads: dict[str, nn.Module],
        auxiliary_weight: float,
        eval_head: str,
        mask_head: RefineMaskHead | None,
        roi_masks: bool,
        pixel_mean: list[float],
        pixel_std: list[float],
        size_divisibility: int = 1,
        canvas_size: int = 0,
        canvas_value: float = 114.0,
        inference_dtype: torch.dtype | None = None,
        compile: bool = False,
        training_pictures: TrainingPictures | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.in_features = in_features
        self.neck = neck
        self.strides = strides
        self.size_divisibility = size_divisibility
        self.canvas_size = canvas_size
        self.canvas_value = canvas_value
        self.inference_dtype = inference_dtype
        self.is_compiled = compile
        if compile:
            for module in (backbone, query_head.encoder, query_head.decoder):
                module.compile()
        self.query_head = query_head
        self.auxiliary_heads = nn.ModuleDict(auxiliary_heads)
        if auxiliary_heads:
            self.auxiliary_level = auxiliary_level_class(len(strides))(query_head.embed_dim)
            if auxiliary_weight == 0:
                for module in (self.auxiliary_heads, self.auxiliary_level):
                    module.requires_grad_(False)
        self.auxiliary_weight = auxiliary_weight
        self.eval_head = eval_head
        self.mask_head = mask_head
        self.roi_masks = roi_masks
        self.training_pictures = training_pictures
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        cls.check_options(cfg)
        options = cfg.MODEL.CODETR
        mask_kind = options.MASK_HEAD if cfg.MODEL.MASK_ON else None
        ops.check_backend(cfg.MODEL.MS_DEFORM_ATTN)
        backbone = build_backbone(cfg)
        if cfg.MODEL.RESNETS.ACTIVATION_CHECKPOINTING and isinstance(backbone, ResNet):
            backbone = CheckpointedResNet(backbone)
        shapes = backbone.output_shape()
        one_of(cfg, "MODEL.CODETR.IN_FEATURES", list(shapes))  # of backbones that know it only now
        input_shapes = [shapes[name] for name in options.IN_FEATURES]
        neck, strides = None, [shape.stride for shape in input_shapes]
        if any(a >= b for a, b in zip(strides, strides[1:])):
            raise InputError(
                f"MODEL.CODETR.IN_FEATURES is {options.IN_FEATURES}, with the strides {strides}; order them from fine "
                "to coarse"
            )
        if options.NECK:
            neck = ChannelMapper(input_shapes, options.EMBED_DIM, options.NUM_FEATURE_LEVELS)
            strides = neck.strides
        elif [shape.channels for shape in input_shapes] != [options.EMBED_DIM] * options.NUM_FEATURE_LEVELS:
            raise InputError(
                f"MODEL.CODETR.NECK is empty, but {options.IN_FEATURES} are not {options.NUM_FEATURE_LEVELS} features "
                f"of {options.EMBED_DIM} channels (MODEL.CODETR.NUM_FEATURE_LEVELS, EMBED_DIM); set it to ChannelMapper"
            )
        size_divisibility = math.lcm(options.SIZE_DIVISIBILITY, max(backbone.size_divisibility, 1))
        if options.CANVAS_SIZE % size_divisibility:
            raise InputError(
                f"MODEL.CODETR.CANVAS_SIZE is {options.CANVAS_SIZE}, but {cfg.MODEL.BACKBONE.NAME} (and "
                f"MODEL.CODETR.SIZE_DIVISIBILITY) ask for a multiple of {size_divisibility}"
            )
        auxiliary_strides = auxiliary_level_class(len(strides)).strides(strides)
        auxiliary_shapes = [ShapeSpec(channels=options.EMBED_DIM, stride=stride) for stride in auxiliary_strides]
        level_shapes = [ShapeSpec(channels=options.EMBED_DIM, stride=stride) for stride in strides]
        return {
            "backbone": backbone,
            "in_features": options.IN_FEATURES,
            "neck": neck,
            "strides": strides,
            "query_head": QUERY_HEAD_REGISTRY.get(options.QUERY_HEAD)(cfg),
            "auxiliary_heads": {
                name: build_auxiliary_head(kind, cfg, auxiliary_shapes)
                for name, kind in zip(auxiliary_head_names(options.AUX_HEADS), options.AUX_HEADS)
            },
            "auxiliary_weight": options.LAMBDA2 * options.DECODER.NUM_LAYERS,
            "eval_head": options.EVAL_HEAD,
            "mask_head": RefineMaskHead(cfg, level_shapes) if mask_kind == "refine" else None,
            "roi_masks": mask_kind == "roi",
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": size_divisibility,
            "canvas_size": options.CANVAS_SIZE,
            "canvas_value": options.CANVAS_VALUE,
            "inference_dtype": {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[
                options.INFERENCE_DTYPE
            ],
            "compile": options.COMPILE,
            "training_pictures": TrainingPictures(cfg.VIS_PERIOD, cfg.INPUT.FORMAT, options.CLASS_NAMES)
            if cfg.VIS_PERIOD > 0
            else None,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: detectron2's standard format: ``image`` [C, H, W], ``instances`` in training, and the
                ``height`` and ``width`` that detections are scaled to.

        Returns:
            Training: the losses by name. Inference: for each image ``{"instances": Instances}`` with ``pred_boxes``,
            ``scores`` and ``pred_classes``, and where the model has masks ``pred_masks`` ([N, height, width] bool).
        """
        images = self.preprocess(batched_inputs)
        if self.training:
            # Inference alone is compiled.
            with torch.compiler.set_stance("force_eager") if self.is_compiled else contextlib.nullcontext():
                return self.losses(images, batched_inputs)
        dtype = ops.inference_dtype(self.inference_dtype, self.device)
        is_half = dtype != torch.float32
        with torch.autocast(self.device.type, dtype) if is_half else contextlib.nullcontext():
            return self.inference(images, batched_inputs)

    def losses(self, images: ImageList, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """The losses of all heads, by name."""
        memory = self.encode(self.features(images))
        instances = [x["instances"].to(self.device) for x in batched_inputs]
        losses, samples = {}, {}
        if self.auxiliary_heads:
            auxiliary_pyramid = self.auxiliary_pyramid(memory)
        for name, head in self.auxiliary_heads.items():
            if self.auxiliary_weight == 0:
                candidates = head.candidates(auxiliary_pyramid, instances)
            else:
                head_losses, candidates = head(auxiliary_pyramid, instances)
                losses.update({f"{k}_{name}": v * self.auxiliary_weight for k, v in head_losses.items()})
            if self.query_head.positive_queries:
                samples[name] = candidates
        query_losses, output = self.query_head.losses(memory, samples, instances)
        losses.update(query_losses)
        logits, boxes, sizes = output.logits[-1].detach(), output.boxes[-1].detach(), memory.geometry.image_sizes
        if self.training_pictures is not None:
            self.training_pictures.put(batched_inputs, logits, boxes, sizes)
        if self.mask_head is not None:
            detections = detections_from_queries(logits, boxes, sizes, self.query_head.max_detections)
            losses.update(self.mask_head.losses(memory, detections, instances))
        return losses

    def features(self, images: ImageList) -> FeaturePyramid:
        """Normalised images -> the levels that the encoder reads."""
        features = self.backbone(images.tensor.contiguous(memory_format=map_layout(images.device)))
        levels = [features[name] for name in self.in_features]
        if self.neck is not None:
            levels = self.neck(levels)
        batch_shape = tuple(images.tensor.shape[-2:])
        sizes = [batch_shape] * len(images) if self.canvas_size > 0 else [tuple(x) for x in images.image_sizes]
        return build_pyramid(levels, self.strides, sizes, batch_shape, self.size_divisibility)

    def encode(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        """The levels -> the encoder's output."""
        return self.query_head.encode(pyramid)

    def predict(self, memory: FeaturePyramid) -> DecoderOutput:
        """The encoder's output -> raw predictions of every decoder layer."""
        return self.query_head.predict(memory)

    def finish(self, results: list[Instances], memory: FeaturePyramid, batched_inputs: list[dict]) -> list[dict]:
        """Detections in pixels of the network input -> with their masks, in the pixels that each input asks for."""
        # Before the masks: a mask fills its box, so it must be predicted for the box that it is pasted into.
        results = [clip_to_image(result, x["image"]) for result, x in zip(results, batched_inputs)]
        if self.mask_head is not None:
            results = self.mask_head.inference(memory, results)
        elif self.roi_masks:
            results = self.auxiliary_heads["roi"].predict_masks(self.auxiliary_pyramid(memory), results)
        return [{"instances": rescale(result, x)} for result, x in zip(results, batched_inputs)]

    def inference(self, images: ImageList, batched_inputs: list[dict]) -> list[dict]:
        """Detections of the head chosen by ``eval_head``: features -> encode -> predict -> finish."""
        memory = self.encode(self.features(images))
        if self.eval_head == "detr":
            results = self.query_head.finish(self.predict(memory), memory)
        else:
            results = self.auxiliary_heads[self.eval_head].inference(self.auxiliary_pyramid(memory))
        return self.finish(results, memory, batched_inputs)

    def raw_predictions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor core, for export and compilation: no lists, no ``Instances``, nothing that waits for the device.

        Args:
            images: [B, C, H, W] normalised images without padding, or on their canvas.

        Returns:
            [B, Q, K] class logits and [B, Q, 4] boxes (cxcywh, normalised by the image) of the last decoder layer.
        """
        sizes = [tuple(images.shape[-2:])] * len(images)
        output = self.predict(self.encode(self.features(ImageList(images, sizes))))
        return output.logits[-1], output.boxes[-1]

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images and pad them at the right and the bottom to one size.

        Raises:
            InputError: an image is larger than the canvas.
        """
        images = [x["image"].to(self.device, torch.float32) for x in batched_inputs]
        if self.canvas_size > 0:
            for image, x in zip(images, batched_inputs):
                if max(image.shape[-2:]) > self.canvas_size:
                    raise InputError(
                        f"{x.get('file_name', 'an image')} is {image.shape[-1]} x {image.shape[-2]} pixels, larger "
                        f"than MODEL.CODETR.CANVAS_SIZE ({self.canvas_size}); set INPUT.MAX_SIZE_TEST (in training "
                        "INPUT.MAX_SIZE_TRAIN) to that"
                    )
            square = {"square_size": self.canvas_size}
            canvas = ImageList.from_tensors(images, pad_value=self.canvas_value, padding_constraints=square)
            return ImageList((canvas.tensor - self.pixel_mean) / self.pixel_std, canvas.image_sizes)
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        constraints = {**self.backbone.padding_constraints, "size_divisibility": self.size_divisibility}
        return ImageList.from_tensors(images, padding_constraints=constraints)

    def auxiliary_pyramid(self, memory: FeaturePyramid) -> FeaturePyramid:
        """The encoder's output with the levels that the auxiliary heads alone see."""
        return self.auxiliary_level(memory)


def map_layout(device: torch.device) -> torch.memory_format:
    """The layout of feature maps: channels last on the CPU, where it is fast, and what tokens are in anyway."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def clip_to_image(result: Instances, image: Tensor) -> Instances:
    """Detections -> those inside their image [C, height, width], clipped to it: a canvas is larger than its image."""
    result = Instances(tuple(image.shape[-2:]), **result.get_fields())
    result.pred_boxes.clip(result.image_size)
    return result[result.pred_boxes.nonempty()]


def rescale(result: Instances, model_input: dict) -> Instances:
    """Detections in pixels of the network input -> in the pixels of the original image, where these are given."""
    height, width = result.image_size
    return detector_postprocess(result, model_input.get("height", height), model_input.get("width", width))
