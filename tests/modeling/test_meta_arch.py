import math

import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks

from codetr_d2.errors import InputError
from codetr_d2.modeling.auxiliary import auxiliary_head_names
from codetr_d2.modeling.query_heads import QUERY_HEAD_REGISTRY
from codetr_d2.ops import bfloat16
from tests.small_model import build, make_batch, train_step


@pytest.mark.slow
@pytest.mark.parametrize("aux_heads", [(), ("roi",), ("atss",), ("roi", "atss"), ("atss", "atss")])
@pytest.mark.parametrize("num_objects", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("query_head", ["CoDeformableDETRHead", "CoDINOHead"])
def test_every_parameter_is_trained(query_head, aux_heads, num_objects):
    """Any mix of heads, also without objects: finite losses, and a finite gradient for every parameter."""
    model = build("MODEL.CODETR.QUERY_HEAD", query_head, aux_heads=aux_heads)
    losses = train_step(model, make_batch(*num_objects))
    assert all(torch.isfinite(x) for x in losses.values())
    for name in auxiliary_head_names(list(aux_heads)):
        assert f"loss_cls_{name}" in losses and f"loss_giou_aux_{name}" in losses
    missing = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing


@pytest.mark.parametrize("query_head", [name for name, _ in QUERY_HEAD_REGISTRY])
def test_auxiliary_heads_leave_the_detector_as_it_is(query_head):
    """K = 0 with the weights of K = 2: the same losses of the detector itself, and the same detections."""
    torch.manual_seed(1)
    # Without noise, as the auxiliary heads draw random numbers before the denoising queries do.
    options = ["MODEL.CODETR.QUERY_HEAD", query_head]
    options += ["MODEL.CODETR.DENOISING.LABEL_NOISE", 0.0, "MODEL.CODETR.DENOISING.BOX_NOISE", 0.0]
    collaborative, plain = build(*options), build(*options, aux_heads=())
    shared = {k: v for k, v in collaborative.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(shared)
    batch = make_batch(3, 1)
    own = train_step(plain, batch)
    both = train_step(collaborative, batch)
    assert set(own) == {name for name in both if "roi" not in name and "atss" not in name}
    for name, value in own.items():
        torch.testing.assert_close(both[name], value)

    with torch.no_grad():  # inference reads no auxiliary parameter
        for name, parameter in collaborative.named_parameters():
            if name not in shared:
                parameter.fill_(float("nan"))
    for ours, theirs in zip(collaborative.eval()(batch), plain.eval()(batch)):
        torch.testing.assert_close(ours["instances"].scores, theirs["instances"].scores)
        torch.testing.assert_close(ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor)


def test_weights_of_the_losses():
    """lambda1 scales the positive queries' losses, lambda2 times the decoder layers the heads' own (eq. 6)."""
    batch = make_batch(3, 1)
    torch.manual_seed(1)
    model = build()
    state = model.state_dict()
    losses = train_step(model, batch)
    other = build("MODEL.CODETR.LAMBDA1", 0.5, "MODEL.CODETR.LAMBDA2", 1.0)
    other.load_state_dict(state)
    assert (model.auxiliary_weight, other.auxiliary_weight) == (4.0, 2.0)
    for name, value in train_step(other, batch).items():
        halved = "_aux_" in name or name.endswith(("_roi", "_atss"))
        torch.testing.assert_close(value, losses[name] * (0.5 if halved else 1.0))


SIX_HEADS = ("atss", "roi", "paa", "retinanet", "fcos", "gfl")


@pytest.mark.parametrize("query_head", ["CoDeformableDETRHead", "CoDINOHead"])
def test_positive_queries_alone(query_head):
    """Without lambda2 the heads have no losses and are not trained, and hand on what they hand on with it."""
    batch = make_batch(3, 1)
    options = ["MODEL.CODETR.QUERY_HEAD", query_head]
    model = build(*options, aux_heads=SIX_HEADS)
    losses = train_step(model, batch)
    alone = build(*options, "MODEL.CODETR.LAMBDA2", 0.0, aux_heads=SIX_HEADS)
    own = train_step(alone, batch)
    assert set(own) == {name for name in losses if not name.endswith(SIX_HEADS) or "_aux_" in name}
    for name, value in own.items():
        if "_dn" not in name:  # the heads draw as many random numbers, but in another order with this one
            torch.testing.assert_close(value, losses[name])
    for name, parameter in alone.named_parameters():
        is_of_a_head = name.startswith("auxiliary_")
        assert parameter.requires_grad != is_of_a_head
        assert (parameter.grad is None) == is_of_a_head, name


@pytest.mark.parametrize("query_head", ["CoDeformableDETRHead", "CoDINOHead"])
def test_auxiliary_heads_alone(query_head):
    """Without positive queries the losses of the heads and of the detector stay, and nothing waits for a gradient."""
    batch = make_batch(3, 1)
    options = ["MODEL.CODETR.QUERY_HEAD", query_head]
    both = build(*options)
    model = build(*options, "MODEL.CODETR.POSITIVE_QUERIES.ENABLED", False)
    model.load_state_dict({k: v for k, v in both.state_dict().items() if "positive_queries" not in k})
    losses = train_step(both, batch)
    own = train_step(model, batch)
    assert set(own) == {name for name in losses if "_aux_" not in name}
    for name, value in own.items():
        if "_dn" not in name:  # as above
            torch.testing.assert_close(value, losses[name])
    assert all(p.grad is not None for p in model.parameters())
    assert not any("positive_queries" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.CODETR.POSITIVE_QUERIES.ENABLED", False], r"would do nothing: set MODEL.CODETR.AUX_HEADS \[\]"),
        (["MODEL.MASK_ON", True], 'would not be trained: set it to 2.0, or MODEL.CODETR.MASK_HEAD "refine"'),
    ],
)
def test_heads_without_losses_have_something_to_do(options, message):
    with pytest.raises(InputError, match="MODEL.CODETR.LAMBDA2 is 0.*" + message):
        build("MODEL.CODETR.LAMBDA2", 0.0, *options)


@pytest.mark.parametrize(
    "options",
    [
        ("MODEL.CODETR.ACTIVATION_CHECKPOINTING", True),
        ("MODEL.TIMM.ACTIVATION_CHECKPOINTING", True),
        ("MODEL.CODETR.POSITIVE_QUERIES.PADDING", "mask"),
    ],
)
def test_options_that_do_not_change_the_detector(options):
    batch = make_batch(3, 1)
    torch.manual_seed(1)
    model = build()
    other = build(*options)
    other.load_state_dict(model.state_dict())
    losses, changed = train_step(model, batch), train_step(other, batch)
    assert set(losses) == set(changed)
    if options[1] is True:  # recomputing what the forward pass computed changes no digit
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(torch.equal(p.grad, gradients[name]) for name, p in other.named_parameters())
    for name, value in changed.items():
        if "aux" not in name or options[1] is True:
            torch.testing.assert_close(value, losses[name])
    # Filling up with negatives adds to the classification loss of the positive queries; their boxes have no loss.
    if options[1] == "mask":
        assert any(changed[f"loss_cls_aux_{head}"] < losses[f"loss_cls_aux_{head}"] for head in ("roi", "atss"))


def test_bfloat16_at_inference():
    """One option: inference computes under autocast, and training does not."""
    torch.manual_seed(1)
    model, half = build(), build("MODEL.CODETR.INFERENCE_DTYPE", "bfloat16")
    half.load_state_dict(model.state_dict())
    batch = make_batch(3, 1)
    losses = train_step(model, batch)
    for name, value in train_step(half, batch).items():
        assert torch.equal(value, losses[name])
    with torch.no_grad():
        exact = model.eval()(batch)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(batch)
        for detections, same, other in zip(half.eval()(batch), expected, exact):
            scores = detections["instances"].scores
            assert scores.dtype == torch.float32
            assert torch.equal(scores, same["instances"].scores) and not torch.equal(scores, other["instances"].scores)


@pytest.mark.parametrize("is_fast", [True, False])
def test_auto_is_bfloat16_where_that_is_faster(is_fast, monkeypatch):
    """Asked of where the model is, whenever it runs; training is as ever."""
    torch.manual_seed(1)
    model = build().eval()
    chosen = build("MODEL.CODETR.INFERENCE_DTYPE", "bfloat16" if is_fast else "float32").eval()
    chosen.load_state_dict(model.state_dict())
    asked = []
    monkeypatch.setattr(bfloat16, "fast_bfloat16", lambda device: (asked.append(device) or is_fast, "this is a test"))
    batch = make_batch(3)
    with torch.no_grad():
        [found], [expected] = model(batch), chosen(batch)
    assert torch.equal(found["instances"].scores, expected["instances"].scores)
    assert asked[0] == torch.device("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_the_shape_decides_what_is_kept():
    """Positions, reference points and priors are kept for a shape: other shapes before change nothing."""
    torch.manual_seed(1)
    model = build().eval()
    used = build().eval()
    used.load_state_dict(model.state_dict())
    padded = make_batch(1, 1)
    images = [padded, padded[:1], padded[1:], padded[::-1], padded]
    with torch.no_grad():
        for batch in images:
            found, expected = used(batch), build_copy(model)(batch)
            for a, b in zip(found, expected):
                assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)


def build_copy(model):
    """A model of the same weights that has seen no image."""
    fresh = build().eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.slow
def test_compiled_inference():
    """The compiled model gives the detections of the eager one, for a second shape too, and can still be trained."""
    torch.manual_seed(1)
    options = (
        "MODEL.TIMM.NAME",
        "resnet10t",
        "MODEL.CODETR.ENCODER.NUM_LAYERS",
        1,
        "MODEL.CODETR.DECODER.NUM_LAYERS",
        1,
    )
    model, compiled = build(*options).eval(), build(*options, "MODEL.CODETR.COMPILE", True).eval()
    compiled.load_state_dict(model.state_dict())
    assert set(compiled.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        for batch in (make_batch(1), make_batch(1, 1)[1:]):
            for a, b in zip(compiled(batch), model(batch)):
                torch.testing.assert_close(a["instances"].scores, b["instances"].scores)
    batch = make_batch(2)
    losses = train_step(model, batch)
    for name, value in train_step(compiled, batch).items():
        torch.testing.assert_close(value, losses[name])


def test_bfloat16():
    """Under autocast the losses stay float32 and near those in full precision, and detections come out."""
    # Every token becomes a query, and all with the same content: their order is no matter of the last digits.
    model, batch = build("MODEL.CODETR.NUM_QUERIES", 1000), make_batch(3, 1)
    torch.nn.init.zeros_(model.query_head.query_content.weight)
    losses = train_step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        low = train_step(model, batch)
        detections = model.eval()(batch)
    for name, value in low.items():
        assert value.dtype == torch.float32
        if "_aux_" not in name and "_roi" not in name:  # whose samples depend on the last digit of proposals
            assert math.isclose(value.item(), losses[name].item(), rel_tol=0.1, abs_tol=0.05), name
    assert all(x["instances"].pred_boxes.tensor.dtype == torch.float32 for x in detections)


@pytest.mark.parametrize("eval_head", ["detr", "roi", "atss"])
def test_detections_of_each_head(eval_head):
    model = build("MODEL.CODETR.EVAL_HEAD", eval_head).eval()
    batch = make_batch(3, 1)
    batch[0].update(height=192, width=256)  # the original image is twice as large
    with torch.no_grad():
        first, second = (x["instances"] for x in model(batch))
        [unscaled] = model([{"image": batch[0]["image"]}, batch[1]])[:1]
    assert first.image_size == (192, 256) and second.image_size == (112, 120)
    assert len(first) and (first.scores[:-1] >= first.scores[1:]).all()
    assert first.pred_classes.max() < 10
    torch.testing.assert_close(first.pred_boxes.tensor / 2, unscaled["instances"].pred_boxes.tensor)


def add_masks(batch: list[dict]) -> list[dict]:
    """The objects' boxes as their masks."""
    for x in batch:
        if len(x["instances"]):
            (x0, y0, x1, y1) = x["instances"].gt_boxes.tensor.unbind(1)
            polygons = torch.stack((x0, y0, x1, y0, x1, y1, x0, y1), dim=1)
            x["instances"].gt_masks = PolygonMasks([[polygon.numpy()] for polygon in polygons])
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("mask_head, aux_heads", [("roi", ("roi", "atss")), ("refine", ("roi",)), ("refine", ())])
@pytest.mark.parametrize("num_objects", [(3, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("query_head", ["CoDeformableDETRHead", "ConditionalDETRHead"])
def test_masks_are_trained(query_head, mask_head, aux_heads, num_objects):
    options = ("MODEL.CODETR.QUERY_HEAD", query_head, "MODEL.CODETR.MASK_HEAD", mask_head)
    model = build("MODEL.MASK_ON", True, *options, aux_heads=aux_heads)
    losses = train_step(model, add_masks(make_batch(*num_objects)))
    names = {x for x in losses if "mask" in x}
    expected = {f"loss_mask_{x}" for x in (14, 28, 56, 112, "iou")} if mask_head == "refine" else {"loss_mask_roi"}
    assert names == expected
    assert all(torch.isfinite(x) for x in losses.values())
    assert any(losses[x] > 0 for x in names) == any(num_objects)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    missing = [n for n, p in trained if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("mask_head", ["roi", "refine"])
@pytest.mark.parametrize(
    "query_head, eval_head",
    [*(("CoDeformableDETRHead", x) for x in ("detr", "roi", "atss")), ("DABDETRHead", "detr"), ("DABDETRHead", "roi")],
)
def test_masks_of_the_detections_of_each_head(mask_head, query_head, eval_head):
    options = ("MODEL.MASK_ON", True, "MODEL.CODETR.MASK_HEAD", mask_head, "MODEL.CODETR.EVAL_HEAD", eval_head)
    model = build("MODEL.CODETR.QUERY_HEAD", query_head, *options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mask_head.predictor.bias" in name or "stage_instance_logits" in name and "bias" in name:
                parameter.fill_(9.0)  # masks that fill their boxes
    batch = make_batch(3, 1)
    batch[0].update(height=192, width=256)
    with torch.no_grad():
        results = [x["instances"] for x in model(batch)]
    for found, size in zip(results, [(192, 256), (112, 120)]):
        assert found.pred_masks.shape == (len(found), *size) and found.pred_masks.dtype == torch.bool and len(found)
        assert found.has("mask_scores") == (mask_head == "refine")
        boxes = found.pred_boxes.tensor
        large = boxes[:, 2:] - boxes[:, :2] > 8
        large = large.all(1).nonzero().squeeze(1)
        covered = BitMasks(found.pred_masks[large]).get_bounding_boxes().tensor
        torch.testing.assert_close(covered, boxes[large], rtol=0, atol=1.01)


def test_masks_are_all_that_inference_reads_of_the_auxiliary_heads():
    model = build("MODEL.MASK_ON", True).eval()
    batch = make_batch(3, 1)
    with torch.no_grad():
        before = model(batch)
        for name, parameter in model.named_parameters():
            if name.startswith("auxiliary_") and ".mask_head." not in name:
                parameter.fill_(float("nan"))
        for x, y in zip(before, model(batch)):
            assert torch.equal(x["instances"].pred_masks, y["instances"].pred_masks)


def test_masks_of_the_roi_head_need_it():
    with pytest.raises(InputError, match='MASK_HEAD is "roi".*add "roi" to MODEL.CODETR.AUX_HEADS'):
        build("MODEL.MASK_ON", True, aux_heads=("atss",))


def test_denoising_leaves_the_matching_queries_as_they_are():
    """Co-DINO with and without denoising queries: the same losses of the matching ones."""
    torch.manual_seed(1)
    model = build("MODEL.CODETR.QUERY_HEAD", "CoDINOHead", aux_heads=())
    plain = build("MODEL.CODETR.QUERY_HEAD", "CoDINOHead", "MODEL.CODETR.DENOISING.NUM_QUERIES", 0, aux_heads=())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    batch = make_batch(3, 1)
    with_noise, without = train_step(model, batch), train_step(plain, batch)
    assert {name for name in with_noise if name not in without} == {
        f"loss_{kind}_dn{layer}" for kind in ("cls", "box", "giou") for layer in ("", "_0")
    }
    for name, value in without.items():
        torch.testing.assert_close(with_noise[name], value)


def test_canvas():
    """Images on a canvas equal images that were padded to it before, and detections lie in the image's own pixels."""
    model = build("MODEL.CODETR.CANVAS_SIZE", 160).eval()
    [sample] = make_batch(2)
    image = sample["image"]
    padded = torch.full((3, 160, 160), 114.0)
    padded[:, :96, :128] = image
    with torch.no_grad():
        pyramid = model.features(model.preprocess([sample]))
        again = model.features(model.preprocess([{"image": padded}]))
        assert torch.equal(pyramid.tokens, again.tokens) and not pyramid.geometry.padding_mask.any()
        geometry = pyramid.geometry
        assert geometry.image_sizes == geometry.padded_sizes == [(160, 160)]
        assert (geometry.valid_ratios == 1).all()
        [small] = model([{"image": image, "height": 192, "width": 256}])
        [raw] = model([{"image": padded}])
    small, raw = small["instances"], raw["instances"]
    assert small.image_size == (192, 256)
    raw.pred_boxes.scale(2, 2)
    raw.pred_boxes.clip((192, 256))
    raw = raw[raw.pred_boxes.nonempty()]
    torch.testing.assert_close(small.pred_boxes.tensor, raw.pred_boxes.tensor)
    with pytest.raises(InputError, match="128 x 170 pixels, larger than MODEL.CODETR.CANVAS_SIZE"):
        model([{"image": torch.zeros(3, 170, 128)}])


GREY = ["MODEL.PIXEL_MEAN", [127.0], "MODEL.PIXEL_STD", [128.0]]


@pytest.mark.parametrize("opts", [[], ["MODEL.CODETR.CANVAS_SIZE", 160]])
def test_grey_images(opts):
    """Grey images (INPUT.FORMAT L) for a backbone of one channel, and repeated for one of three."""
    batch = make_batch(2, 1)
    for sample in batch:
        sample["image"] = sample["image"][:1]
    model = build(*GREY, *opts)
    assert next(model.backbone.parameters()).shape[1] == 1
    assert all(loss.isfinite() for loss in train_step(model, batch).values())
    model = build(*opts).eval()
    repeated = [{**sample, "image": sample["image"].expand(3, -1, -1)} for sample in batch]
    with torch.no_grad():
        for grey, colours in zip(model(batch), model(repeated)):
            assert len(grey["instances"]) > 0
            assert torch.equal(grey["instances"].pred_boxes.tensor, colours["instances"].pred_boxes.tensor)


def test_images_are_padded_to_a_multiple():
    model = build("MODEL.CODETR.SIZE_DIVISIBILITY", 48)
    pyramid = model.features(model.preprocess(make_batch(1, 1)))  # 96 x 128 and 112 x 120 pixels
    geometry = pyramid.geometry
    assert geometry.shapes[0] == (144 // 8, 144 // 8)
    assert geometry.image_sizes == [(96, 128), (112, 120)] and geometry.padded_sizes == [(96, 144), (144, 144)]
    with pytest.raises(InputError, match="MODEL.CODETR.CANVAS_SIZE is 100.*a multiple of 48"):
        build("MODEL.CODETR.SIZE_DIVISIBILITY", 48, "MODEL.CODETR.CANVAS_SIZE", 100)


def test_a_neck_is_needed_where_features_are_no_levels():
    with pytest.raises(InputError, match="MODEL.CODETR.NECK is empty.*ChannelMapper"):
        build("MODEL.CODETR.NECK", "")


FPN = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.FPN.IN_FEATURES", ["stride8", "stride16"]]


@pytest.mark.parametrize(
    "features, opts, message",
    [
        (["p3", "p9"], FPN, "IN_FEATURES is 'p9'; it may be: p3, p4"),
        (["stride32", "stride8"], [], r"IN_FEATURES is .*\[32, 8\]; order them from fine to coarse"),
        (["stride8", "stride32"], [], r'IN_FEATURES gives levels of the strides \[8, 32.*leave "roi" out'),
    ],
)
def test_features_form_a_pyramid(features, opts, message):
    with pytest.raises(InputError, match=message):
        build("MODEL.CODETR.IN_FEATURES", features, *opts)


def test_names_of_heads():
    assert auxiliary_head_names(["roi", "atss", "roi", "roi"]) == ["roi", "atss", "roi2", "roi3"]


def test_unknown_head():
    with pytest.raises(InputError, match="MODEL.CODETR.AUX_HEADS.*'fcox'.*atss"):
        build(aux_heads=("fcox",))
