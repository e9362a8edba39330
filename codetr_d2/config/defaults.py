"""Every option that the project adds to detectron2's config, each with its meaning."""

from detectron2.config import CfgNode as CN


def add_codetr_config(cfg: CN) -> None:
    """Add the options of Co-DETR to a detectron2 config, in place.

    Options that detectron2 has already keep their names: ``MODEL.RPN``, ``MODEL.ROI_HEADS``, ``MODEL.ROI_BOX_HEAD`` and
    ``MODEL.ANCHOR_GENERATOR`` describe the ROI auxiliary head, ``MODEL.RETINANET`` the RetinaNet one,
    ``TEST.DETECTIONS_PER_IMAGE`` bounds the detections, ``SOLVER`` the optimisation. ``configs/_base_`` sets them as
    published.
    """
    _C = cfg
    _C.MODEL.CODETR = CN()
    _C.MODEL.CODETR.NUM_CLASSES = 80  # the number of object classes, for all heads; background is not counted
    # Names of the classes, for drawing; training fills them in from the dataset, so that a saved config carries them.
    _C.MODEL.CODETR.CLASS_NAMES = []
    # A name in QUERY_HEAD_REGISTRY: CoDeformableDETRHead, CoDINOHead, or with NUM_FEATURE_LEVELS 1
    # ConditionalDETRHead or DABDETRHead. NUM_POINTS, MODEL.MS_DEFORM_ATTN and DENOISING mean nothing to the last two.
    _C.MODEL.CODETR.QUERY_HEAD = "CoDeformableDETRHead"
    _C.MODEL.CODETR.IN_FEATURES = ["res3", "res4", "res5"]  # backbone outputs, from fine to coarse
    _C.MODEL.CODETR.NUM_FEATURE_LEVELS = 4  # levels of the transformer; those past IN_FEATURES are added by the neck
    # "" where the backbone's features are the levels already (ViT with its feature pyramid).
    _C.MODEL.CODETR.NECK = "ChannelMapper"
    _C.MODEL.CODETR.EMBED_DIM = 256
    _C.MODEL.CODETR.NUM_QUERIES = 300
    # > 0: every image lies at the top left of a square of so many pixels, whose rest has the value CANVAS_VALUE and
    # counts as a part of the image (large-scale jitter). 0: images are padded to the batch's largest, with a mask.
    _C.MODEL.CODETR.CANVAS_SIZE = 0
    _C.MODEL.CODETR.CANVAS_VALUE = 114.0
    # Images are padded to multiples of so many pixels, beside what the backbone asks for.
    _C.MODEL.CODETR.SIZE_DIVISIBILITY = 1

    # Auxiliary heads, in order: names in AUX_HEAD_REGISTRY. [] is the plain detector (K = 0); a name may repeat.
    _C.MODEL.CODETR.AUX_HEADS = ["roi", "atss"]
    _C.MODEL.CODETR.LAMBDA1 = 1.0  # weight of the decoder losses of the positive queries (eq. 6)
    # Weight of the auxiliary heads' own losses, once for each decoder layer (eq. 6). 0: the heads only assign, for the
    # positive queries; they have no losses and stay as they are.
    _C.MODEL.CODETR.LAMBDA2 = 2.0
    _C.MODEL.CODETR.POSITIVE_QUERIES = CN()
    _C.MODEL.CODETR.POSITIVE_QUERIES.ENABLED = True  # False: the auxiliary heads supervise the encoder alone
    _C.MODEL.CODETR.POSITIVE_QUERIES.MAX_PER_HEAD = 300  # more positives than this in an image: a random choice of them
    _C.MODEL.CODETR.POSITIVE_QUERIES.MIN_PER_HEAD = 9
    # An image with fewer positives than the batch's largest is filled up with "negatives" (background candidates that
    # are trained as background, as in the published code) or by "mask" (empty slots, as the paper says).
    _C.MODEL.CODETR.POSITIVE_QUERIES.PADDING = "negatives"
    # Contrastive denoising (Co-DINO): noised ground truth as further queries in training.
    _C.MODEL.CODETR.DENOISING = CN()
    _C.MODEL.CODETR.DENOISING.NUM_QUERIES = 100  # pairs of a positive and a negative query for each image; 0: none
    _C.MODEL.CODETR.DENOISING.LABEL_NOISE = 0.5  # half of this share of the labels is replaced by random ones
    _C.MODEL.CODETR.DENOISING.BOX_NOISE = 1.0  # corners move by up to this share of half the side (negatives: twice)
    # > 0: detections of the same class that overlap by at least so much lower each other's score (linear soft-NMS).
    _C.MODEL.CODETR.SOFT_NMS_THRESH = 0.0
    # Instance masks, with MODEL.MASK_ON: "roi" (the ROI auxiliary head's Mask R-CNN branch) or "refine" (Co-DINO-Inst).
    # MODEL.ROI_MASK_HEAD describes the former, MODEL.REFINE_MASK_HEAD the latter.
    _C.MODEL.CODETR.MASK_HEAD = "roi"
    _C.MODEL.CODETR.EVAL_HEAD = "detr"  # whose detections inference returns: detr, or an auxiliary head by its name

    _C.MODEL.CODETR.ENCODER = CN()
    _C.MODEL.CODETR.ENCODER.NUM_LAYERS = 6
    _C.MODEL.CODETR.ENCODER.NUM_HEADS = 8
    _C.MODEL.CODETR.ENCODER.NUM_POINTS = 4  # sampling points of each head and level
    _C.MODEL.CODETR.ENCODER.FFN_DIM = 2048
    _C.MODEL.CODETR.ENCODER.DROPOUT = 0.0
    _C.MODEL.CODETR.DECODER = CN()
    _C.MODEL.CODETR.DECODER.NUM_LAYERS = 6
    _C.MODEL.CODETR.DECODER.NUM_HEADS = 8
    _C.MODEL.CODETR.DECODER.NUM_POINTS = 4
    _C.MODEL.CODETR.DECODER.FFN_DIM = 2048
    _C.MODEL.CODETR.DECODER.DROPOUT = 0.0
    # Recompute each encoder and decoder layer in the backward pass: less memory, the same gradients. Backbones have
    # an option of their own for their blocks.
    _C.MODEL.CODETR.ACTIVATION_CHECKPOINTING = False
    _C.MODEL.RESNETS.ACTIVATION_CHECKPOINTING = False

    # Weights of the query head's matching costs and losses.
    _C.MODEL.CODETR.COST_CLS = 2.0
    _C.MODEL.CODETR.COST_BOX = 5.0
    _C.MODEL.CODETR.COST_GIOU = 2.0
    _C.MODEL.CODETR.LOSS_CLS = 2.0
    _C.MODEL.CODETR.LOSS_BOX = 5.0
    _C.MODEL.CODETR.LOSS_GIOU = 2.0

    # The ATSS auxiliary head. Loss weights are those of its own paper; LAMBDA2 comes on top.
    _C.MODEL.ATSS = CN()
    _C.MODEL.ATSS.NUM_CONVS = 1  # stacked convolutions before the predictors
    _C.MODEL.ATSS.ANCHOR_SCALE = 8.0  # side of the square anchor, in strides
    _C.MODEL.ATSS.TOPK = 9  # candidates of each ground truth and level
    _C.MODEL.ATSS.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    _C.MODEL.ATSS.LOSS_CLS = 1.0
    _C.MODEL.ATSS.LOSS_BOX = 2.0
    _C.MODEL.ATSS.LOSS_CENTERNESS = 1.0
    _C.MODEL.ATSS.SCORE_THRESH_TEST = 0.0  # class probability that a detection must exceed
    _C.MODEL.ATSS.PRE_NMS_TOPK_TEST = 1000  # of each level
    _C.MODEL.ATSS.NMS_THRESH_TEST = 0.6
    _C.MODEL.ATSS.SOFT_NMS = False  # lower the scores of what overlaps instead of dropping it
    # The RetinaNet auxiliary head, beside detectron2's options in MODEL.RETINANET.
    _C.MODEL.RETINANET.ANCHOR_SCALE = 4.0  # side of the smallest square anchor of a cell, in strides
    _C.MODEL.RETINANET.LOSS_CLS = 1.0
    _C.MODEL.RETINANET.LOSS_BOX = 2.0
    _C.MODEL.RETINANET.SOFT_NMS = False
    # The FCOS auxiliary head.
    _C.MODEL.FCOS = CN()
    _C.MODEL.FCOS.NUM_CONVS = 1  # stacked convolutions before the predictors
    _C.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5  # positive points lie so near the centre of their object, in strides
    _C.MODEL.FCOS.LOSS_CLS = 1.0
    _C.MODEL.FCOS.LOSS_BOX = 1.0
    _C.MODEL.FCOS.LOSS_CENTERNESS = 1.0
    _C.MODEL.FCOS.SCORE_THRESH_TEST = 0.05  # class probability, before it is multiplied by the centre-ness
    _C.MODEL.FCOS.PRE_NMS_TOPK_TEST = 1000  # of each level
    _C.MODEL.FCOS.NMS_THRESH_TEST = 0.6
    _C.MODEL.FCOS.SOFT_NMS = False
    # The GFL auxiliary head, which assigns as ATSS does.
    _C.MODEL.GFL = CN()
    _C.MODEL.GFL.NUM_CONVS = 1
    _C.MODEL.GFL.ANCHOR_SCALE = 8.0
    _C.MODEL.GFL.TOPK = 9
    _C.MODEL.GFL.REG_MAX = 16  # distances of a box's sides from the cell are predicted up to so many strides
    _C.MODEL.GFL.LOSS_CLS = 1.0
    _C.MODEL.GFL.LOSS_BOX = 2.0
    _C.MODEL.GFL.LOSS_DFL = 0.25
    _C.MODEL.GFL.SCORE_THRESH_TEST = 0.05
    _C.MODEL.GFL.PRE_NMS_TOPK_TEST = 1000
    _C.MODEL.GFL.NMS_THRESH_TEST = 0.6
    _C.MODEL.GFL.SOFT_NMS = False
    # The PAA auxiliary head. The weighted losses of class and box also choose its positives.
    _C.MODEL.PAA = CN()
    _C.MODEL.PAA.NUM_CONVS = 1
    _C.MODEL.PAA.ANCHOR_SCALE = 8.0
    _C.MODEL.PAA.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    _C.MODEL.PAA.IOU_THRESHOLD = 0.1  # an anchor that overlaps an object by less is background (but the best ones)
    _C.MODEL.PAA.TOPK = 9  # candidates of each ground truth and level: those of the smallest loss
    _C.MODEL.PAA.LOSS_CLS = 1.0
    _C.MODEL.PAA.LOSS_BOX = 1.3
    _C.MODEL.PAA.LOSS_IOU = 0.5
    _C.MODEL.PAA.SCORE_THRESH_TEST = 0.05  # of the score: the root of class probability times predicted IoU
    _C.MODEL.PAA.PRE_NMS_TOPK_TEST = 1000  # anchors of each level, with all their classes
    _C.MODEL.PAA.NMS_THRESH_TEST = 0.6
    _C.MODEL.PAA.SOFT_NMS = False
    _C.MODEL.PAA.SCORE_VOTING = True  # each detection's box is the mean of all those that overlap it
    _C.MODEL.ROI_HEADS.SOFT_NMS = False
    _C.MODEL.RPN.NMS_THRESH_TEST = 0.7  # of the proposals at inference; MODEL.RPN.NMS_THRESH is that of training

    # The mask head of Co-DINO-Inst.
    _C.MODEL.REFINE_MASK_HEAD = CN()
    _C.MODEL.REFINE_MASK_HEAD.POSITIVES_PER_IMAGE = 128  # boxes trained on: those that overlap an object by half
    _C.MODEL.REFINE_MASK_HEAD.LOSS_WEIGHT = 12.0
    _C.MODEL.REFINE_MASK_HEAD.IOU_LOSS_WEIGHT = 6.0  # of the mask's predicted quality

    # auto, float32 or bfloat16. bfloat16: inference computes in it what does not need more (autocast), in a fraction of
    # the time on CPUs that have it in hardware: evaluation (of a training too), prediction and deployment alike. auto:
    # bfloat16 on CPUs with AMX and on GPUs from compute capability 8.0, float32 elsewhere. What it costs in AP is in
    # docs/performance.md; for the last digit of a number, say float32. SOLVER.AMP is for training alone.
    _C.MODEL.CODETR.INFERENCE_DTYPE = "auto"
    # Compile backbone, encoder and decoder for inference (torch.compile): worth the minute that the first images take
    # where thousands follow. It needs a C++ compiler, on a GPU Triton.
    _C.MODEL.CODETR.COMPILE = False

    # Deformable attention: auto, cpp, triton or eager. auto takes the fastest one that works where the tensors are.
    _C.MODEL.MS_DEFORM_ATTN = "auto"

    # Where the loaded weights have other classes: "" starts the classifiers anew; the name of the dataset that the
    # weights were trained on (coco_2017_train, lvis_v1_train, ...) takes over the rows of classes that both name.
    _C.MODEL.CODETR.REUSE_CLASSES = ""

    # Swin Transformer: MODEL.BACKBONE.NAME "build_swin_backbone", with the features p0, p1, p2, p3 at strides 4 to 32.
    _C.MODEL.SWIN = CN()
    _C.MODEL.SWIN.EMBED_DIM = 96
    _C.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    _C.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    _C.MODEL.SWIN.WINDOW_SIZE = 7
    _C.MODEL.SWIN.DROP_PATH_RATE = 0.2
    _C.MODEL.SWIN.ACTIVATION_CHECKPOINTING = False

    # EVA-02 ViT with its simple feature pyramid: MODEL.BACKBONE.NAME "build_eva02_pyramid_backbone", with the features
    # p2 to p6 at strides 4 to 64, of MODEL.FPN.OUT_CHANNELS channels; only those in MODEL.CODETR.IN_FEATURES are built.
    _C.MODEL.EVA02 = CN()
    _C.MODEL.EVA02.EMBED_DIM = 1024
    _C.MODEL.EVA02.DEPTH = 24
    _C.MODEL.EVA02.NUM_HEADS = 16
    _C.MODEL.EVA02.PATCH_SIZE = 16
    _C.MODEL.EVA02.WINDOW_SIZE = 24  # patches
    _C.MODEL.EVA02.GLOBAL_BLOCKS = [3, 7, 11, 15, 19, 23]  # these attend to the whole image, the others to windows
    _C.MODEL.EVA02.PRETRAIN_IMAGE_SIZE = 512  # pixels; of the absolute position embedding
    # > 0: images are squares of so many pixels, which the rotary positions of the global blocks are made for.
    # 0: rotary positions fit the size of each image.
    _C.MODEL.EVA02.IMAGE_SIZE = 0
    _C.MODEL.EVA02.DROP_PATH_RATE = 0.4
    _C.MODEL.EVA02.ACTIVATION_CHECKPOINTING = False

    # Any timm backbone: MODEL.BACKBONE.NAME "build_timm_backbone".
    _C.MODEL.TIMM = CN()
    _C.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    _C.MODEL.TIMM.FREEZE_BATCH_NORM = True  # use the running statistics and don't train them, as published for ResNet
    _C.MODEL.TIMM.ACTIVATION_CHECKPOINTING = False
    _C.MODEL.TIMM.PRETRAINED = False  # let timm download its own weights

    # Data, beside detectron2's INPUT options. Large-scale jitter: the image is scaled at random and cropped to a square
    # of MODEL.CODETR.CANVAS_SIZE.
    _C.INPUT.LARGE_SCALE_JITTER = CN()
    _C.INPUT.LARGE_SCALE_JITTER.ENABLED = False
    _C.INPUT.LARGE_SCALE_JITTER.MIN_SCALE = 0.1
    _C.INPUT.LARGE_SCALE_JITTER.MAX_SCALE = 2.0
    # Copy-paste: objects of a second image are pasted onto the first by their masks.
    _C.INPUT.COPY_PASTE = CN()
    _C.INPUT.COPY_PASTE.ENABLED = False
    _C.INPUT.COPY_PASTE.MAX_NUM_PASTED = 100

    # Training, beside detectron2's SOLVER options.
    # None: norms decay like everything else, as published; detectron2 has 0 here, and None for WEIGHT_DECAY_BIAS.
    _C.SOLVER.WEIGHT_DECAY_NORM = None
    # > 0: BASE_LR is meant for batches of so many images, and the learning rate is BASE_LR * IMS_PER_BATCH / this.
    # detectron2's REFERENCE_WORLD_SIZE changes the batch itself with the number of processes, and excludes this one.
    _C.SOLVER.REFERENCE_BATCH_SIZE = 0
    # (part of a parameter's name, factor of its learning rate) pairs; the first that fits counts.
    _C.SOLVER.LR_MULTIPLIERS = []
    # < 1: the learning rate of ViT block i of n is multiplied by this to the power of n - i, and biases and norms have
    # no weight decay, unless WEIGHT_DECAY_NORM or WEIGHT_DECAY_BIAS gives them one.
    _C.SOLVER.LAYER_DECAY = 1.0
    # The schedule in epochs: > 0 sets MAX_ITER and STEPS from the size of the training set. Periods stay in iterations.
    _C.SOLVER.MAX_EPOCHS = 0
    _C.SOLVER.STEPS_EPOCHS = ()
    _C.SOLVER.ACCUMULATE_STEPS = (
        1  # an optimizer step for every so many micro-batches of IMS_PER_BATCH / ACCUMULATE_STEPS
    )
    _C.SOLVER.AMP.DTYPE = "bfloat16"  # bfloat16, or float16 (GPU only, with loss scaling)
    _C.SOLVER.EMA = CN()
    _C.SOLVER.EMA.ENABLED = False
    _C.SOLVER.EMA.DECAY = 0.9999  # of the moving average, reached gradually from 0
    _C.SOLVER.EMA.WARMUP_ITERS = 2000
    # Where losses, learning rate and results go, beside the terminal and log.txt: json (metrics.json), tensorboard,
    # wandb (Weights & Biases), mlflow. The last two need the package of that name.
    _C.SOLVER.WRITERS = ["json", "tensorboard"]
    # Keep model_best.pth by this entry of the evaluation results; "" keeps none.
    _C.TEST.BEST_CHECKPOINT_METRIC = "bbox/AP"
    # > 0: the training ends after so many evaluations in a row without a better BEST_CHECKPOINT_METRIC; 0: never early.
    _C.TEST.EARLY_STOPPING_PATIENCE = 0
    # > 0: at each evaluation, which query each object of so many images of the first test dataset is matched with, in
    # matches.json: what tools/analyze.py stability draws. The images stay in memory.
    _C.TEST.STABILITY_IMAGES = 0

    # Datasets on disk: (name, image folder, annotation json) triples, registered before training.
    _C.DATASETS.COCO_JSON = []
