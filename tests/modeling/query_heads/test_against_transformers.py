"""Conditional DETR and DAB-DETR give what transformers' give with the same weights, at every decoder layer."""

import re

import pytest
import torch
from detectron2.config import get_cfg

from codetr_d2 import add_codetr_config
from codetr_d2.modeling.pyramid import build_pyramid
from codetr_d2.modeling.query_heads import QUERY_HEAD_REGISTRY

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

DIM, NUM_CLASSES, NUM_QUERIES, NUM_LAYERS = 32, 7, 11, 3


def our_name(name: str, is_dab: bool) -> str:
    """The name here of a parameter of transformers' model; the encoder's three projections keep theirs."""
    for pattern, replacement in (
        (r"^model\.", ""),
        # Of the layers.
        (r"(layers\.\d+)\.(self_attn|cross_attn|mlp)\.(\w+layer_norm)", r"\1.\3"),
        (r"self_attn_layer_norm", "norm1"),
        (r"(encoder_attn|cross_attn)_layer_norm", "norm2"),
        (r"encoder(\.layers\.\d+)\.final_layer_norm", r"encoder\1.norm2"),
        (r"decoder(\.layers\.\d+)\.final_layer_norm", r"decoder\1.norm3"),
        (r"(layers\.\d+)\.(?:mlp\.)?fc(\d)", r"\1.ffn.linear\2"),
        (r"(layers\.\d+)\.(?:mlp\.)?activation_fn", r"\1.ffn.prelu"),
        # Of attention.
        (r"\.encoder_attn\.", ".cross_attn."),
        (r"(self|cross)_attn\.(?:\1_attn\.)?(?:o|out|output)_proj", r"\1_attn.out_proj"),
        (r"(self|cross)_attn\.(?:\1_attn_)?(?:query|q)_(content|pos|pos_sine)_proj", r"\1_attn.query_\2"),
        (r"(self|cross)_attn\.(?:\1_attn_)?(?:key|k)_(content|pos)_proj", r"\1_attn.key_\2"),
        (r"(decoder.*)(self|cross)_attn\.(?:\2_attn_)?(?:value|v)_proj", r"\1\2_attn.value"),
        (r"_pos_sine\.", "_spatial."),
        (r"_pos\.", "_position."),
        # Around the layers.
        (r"encoder\.query_scale", "encoder.position_scale"),
        (r"decoder\.query_scale", "decoder.spatial_scale"),
        (r"decoder\.layernorm", "decoder.final_norm"),
        (r"decoder\.ref_point_head", "decoder.position_head" if is_dab else "point_head"),
        (r"decoder\.ref_anchor_head", "decoder.size_head"),
        (r"^(?:decoder\.bbox_embed|bbox_predictor)", "decoder.box_embed"),
        (r"^(?:class_labels_classifier|class_embed)", "decoder.class_embed"),
        (r"query_position_embeddings", "query_position"),
        (r"query_refpoint_embeddings", "query_boxes"),
    ):
        name = re.sub(pattern, replacement, name)
    # A perceptron's linear layers, which have activations between them here.
    return re.sub(r"(scale|head|box_embed)\.layers\.(\d)", lambda m: f"{m[1]}.{2 * int(m[2])}", name)


def our_weights(theirs: dict, is_dab: bool) -> dict:
    weights = {}
    for name, value in theirs.items():
        if name.startswith(("model.backbone.", "model.input_projection.")):
            continue
        weights[our_name(name, is_dab)] = value
    for layer in range(NUM_LAYERS):
        prefix = f"encoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{prefix}.{x}_proj.{kind}") for x in "qkv"]
            weights[f"{prefix}.in_proj_{kind}"] = torch.cat(parts)
    return weights


def their_model(is_dab: bool):
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    size = {"hidden_size" if is_dab else "d_model": DIM, "num_queries": NUM_QUERIES, "num_labels": NUM_CLASSES}
    for part in ("encoder", "decoder"):
        size |= {f"{part}_layers": NUM_LAYERS, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    kind = "DabDetr" if is_dab else "ConditionalDetr"
    config = getattr(transformers, f"{kind}Config")(backbone_config=backbone, **size)
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    for name, parameter in model.named_parameters():
        if not name.startswith("model.backbone."):
            std = 1.0 if "query_" in name and "embeddings" in name else 0.5 if "attn" in name else 0.15
            torch.nn.init.normal_(parameter, mean=1.0 if "norm.weight" in name else 0.0, std=std)
    return model


def our_head(is_dab: bool):
    cfg = get_cfg()
    add_codetr_config(cfg)
    options = cfg.MODEL.CODETR
    options.QUERY_HEAD = "DABDETRHead" if is_dab else "ConditionalDETRHead"
    options.NUM_FEATURE_LEVELS, options.EMBED_DIM, options.NUM_CLASSES = 1, DIM, NUM_CLASSES
    options.NUM_QUERIES, options.AUX_HEADS = NUM_QUERIES, []
    for part in (options.ENCODER, options.DECODER):
        part.NUM_LAYERS, part.NUM_HEADS, part.FFN_DIM = NUM_LAYERS, 4, 48
    return QUERY_HEAD_REGISTRY.get(options.QUERY_HEAD)(cfg).eval()


def inverse_sigmoid(x):
    return (x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5)).log()


@pytest.mark.parametrize("is_dab", [False, True], ids=["conditional_detr", "dab_detr"])
@torch.no_grad()
def test_every_layer(is_dab):
    theirs, ours = their_model(is_dab), our_head(is_dab)
    ours.load_state_dict(our_weights(theirs.state_dict(), is_dab))

    sizes, batch_shape = [(160, 224), (130, 140)], (160, 224)
    pixel_mask = torch.zeros(2, *batch_shape, dtype=torch.int64)
    for mask, (height, width) in zip(pixel_mask, sizes):
        mask[:height, :width] = 1
    recorded, states, features = {}, [], torch.randn(2, DIM, 5, 7)
    model = theirs.model
    model.input_projection.register_forward_hook(lambda *_: features)
    model.decoder.register_forward_hook(lambda module, args, x: recorded.update(decoder=x))
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda module, args, x: states.append(x[0] if is_dab else x))
    last = theirs(torch.randn(2, 3, *batch_shape), pixel_mask)

    # Their models predict from the last layer outside of training: the other layers' predictions by the same rules.
    states = model.decoder.layernorm(torch.stack(states))
    logits = (theirs.class_embed if is_dab else theirs.class_labels_classifier)(states)
    references = recorded["decoder"].reference_points  # [layers, B, Q, 4] boxes, or [Q, B, 2] points
    references = references if is_dab else references.transpose(0, 1)
    deltas = theirs.bbox_predictor(states)
    deltas[..., : references.shape[-1]] += inverse_sigmoid(references)
    torch.testing.assert_close((logits[-1], deltas[-1].sigmoid()), (last.logits, last.pred_boxes))

    pyramid = build_pyramid([features], [32], sizes, batch_shape)
    assert pyramid.geometry.padding_mask[1].sum() == 10  # the second image has 5 of 5 rows and 5 of 7 columns
    output = ours.predict(ours.encode(pyramid))
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.boxes, deltas.sigmoid(), rtol=0, atol=1e-4)
    for values in (output.boxes[..., :2], output.logits):  # queries differ by more than what is let pass
        assert values.std(dim=2).mean((1, 2)).min() > 2e-3
