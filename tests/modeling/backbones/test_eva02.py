import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from timm.layers import DropPath
from timm.models.eva import Eva

from codetr_d2 import add_codetr_config
from codetr_d2.errors import InputError
from codetr_d2.modeling.backbones import Eva02, Eva02Pyramid, rotary_tables
from codetr_d2.modeling.backbones.eva02 import Block

TINY = {
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 4,
    "patch_size": 4,
    "window_size": 3,
    "global_blocks": [1],
    "pretrain_image_size": 24,
}


def randomize(module):
    """Weights far from the initial ones, so that every bias counts."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def tiny(**options):
    return randomize(Eva02(**{**TINY, **options}))


def rotate(x, height, width):
    """Rotary positions by complex numbers: [..., height * width, D] -> the same shape."""
    dim = x.shape[-1]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (2, dim // 4, 2)))  # [..., tokens, row or column, pairs]
    turned = torch.empty_like(pairs)
    for token in range(height * width):
        for axis, position in enumerate((16 * (token // width) / height, 16 * (token % width) / width)):
            for j in range(dim // 4):
                angle = torch.tensor(position * 10000 ** (-2 * j / (dim / 2)), dtype=torch.float64)
                turned[..., token, axis, j] = pairs[..., token, axis, j] * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-3).type_as(x)


def naive_block(block, x, window_size):
    """A block of the ViT by the definition, one window and one head after the other; [1, h, w, C]."""
    attn, dim = block.attn, x.shape[-1]
    head_dim = dim // attn.num_heads
    y = F.layer_norm(x, (dim,), block.norm1.weight, block.norm1.bias, 1e-6)
    height, width = x.shape[1:3]
    y = F.pad(y, (0, 0, 0, -width % window_size, 0, -height % window_size))
    out = torch.zeros_like(y)
    for top in range(0, y.shape[1], window_size):
        for left in range(0, y.shape[2], window_size):
            place = (0, slice(top, top + window_size), slice(left, left + window_size))
            tokens = y[place].flatten(0, 1)
            for head in range(attn.num_heads):
                channels = slice(head * head_dim, (head + 1) * head_dim)
                q = tokens @ attn.q_proj.weight[channels].T + attn.q_bias[channels]
                k = tokens @ attn.k_proj.weight[channels].T
                v = tokens @ attn.v_proj.weight[channels].T + attn.v_bias[channels]
                q, k = rotate(q, window_size, window_size), rotate(k, window_size, window_size)
                result = (q @ k.T / head_dim**0.5).softmax(-1) @ v
                out[place][..., channels] = result.view(window_size, window_size, head_dim)
    x = x + (out @ attn.proj.weight.T + attn.proj.bias)[:, :height, :width]
    return x + block.mlp(F.layer_norm(x, (dim,), block.norm2.weight, block.norm2.bias, 1e-6))


@pytest.mark.parametrize("grid", [(6, 3), (4, 5)])  # whole windows, and padded ones
def test_windowed_blocks_follow_the_definition(grid):
    block = randomize(Block(dim=24, num_heads=2, window_size=3, drop_path=0.0)).double()
    x = torch.randn(1, *grid, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = naive_block(block, x, 3)
        # The tables are float32, of which angles of up to 16 have seven digits.
        torch.testing.assert_close(block(x, rotary_tables(3, 3, 12)), expected, rtol=1e-5, atol=1e-5)


def test_a_window_as_large_as_the_image_is_global_attention():
    windowed, whole = tiny(window_size=6, global_blocks=[]), tiny(global_blocks=[0, 1, 2])
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(windowed(images), whole(images))
    assert not torch.allclose(windowed(images), tiny(window_size=3, global_blocks=[])(images), atol=0.1)


@pytest.mark.parametrize("size", [(24, 24), (20, 36)])  # that of the position embedding, and another
def test_global_attention_equals_timm(size):
    ours = tiny(global_blocks=[0, 1, 2]).eval()
    theirs = Eva(
        img_size=size,
        patch_size=4,
        num_classes=0,
        global_pool="",
        class_token=False,
        **{"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 8 / 3},
        **{"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": 16},
    ).eval()
    theirs.norm.eps = 1e-5
    names = {"w1": "fc1_g", "w2": "fc1_x", "ffn_ln": "norm", "w3": "fc2", "out_norm": "norm"}
    names |= {"q_bias": "q_proj.bias", "v_bias": "v_proj.bias"}
    weights = {
        ".".join(names.get(part, part) for part in name.split(".")): value for name, value in ours.state_dict().items()
    }
    grid = (size[0] // 4, size[1] // 4)
    positions = weights["pos_embed"][:, 1:].unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    weights["pos_embed"] = F.interpolate(positions, grid, mode="bicubic").flatten(2).transpose(1, 2)
    theirs.load_state_dict(weights)
    images = torch.randn(2, 3, *size)
    expected = theirs(images).transpose(1, 2).unflatten(2, grid)
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)


def test_rotary_tables():
    cos, sin = rotary_tables(3, 5, 16)
    assert cos.shape == sin.shape == (15, 16)
    x = torch.randn(15, 16)
    a, b = x[:, ::2], x[:, 1::2]
    turned = torch.stack((a * cos[:, ::2] - b * sin[:, ::2], b * cos[:, 1::2] + a * sin[:, 1::2]), dim=-1).flatten(-2)
    torch.testing.assert_close(turned, rotate(x, 3, 5), rtol=1e-5, atol=1e-5)


def test_checkpointing_changes_neither_features_nor_gradients():
    images = torch.randn(2, 3, 24, 32)

    def run(net):
        kept = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            features = net.train()(images)
        features.square().sum().backward()
        return sum(kept), [features, *(p.grad for p in net.parameters())]

    kept, expected = run(tiny(drop_path_rate=0.5))
    kept_saving, results = run(tiny(drop_path_rate=0.5, activation_checkpointing=True))
    for a, b in zip(results, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert kept_saving < kept / 3


def test_stochastic_depth_rises_linearly_and_rests_in_evaluation():
    net = tiny(drop_path_rate=0.4)
    rates = [module.drop_prob for module in net.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.2, 0.4])
    torch.testing.assert_close(net.eval()(torch.ones(1, 3, 24, 24)), tiny()(torch.ones(1, 3, 24, 24)))


@pytest.mark.parametrize("freeze_at", range(5))
def test_the_first_parts_are_frozen(freeze_at):
    net = tiny(drop_path_rate=0.5, freeze_at=freeze_at)
    embeddings = ("patch_embed.", "pos_embed") if freeze_at else ()
    first = (*embeddings, *(f"blocks.{i}." for i in range(freeze_at - 1)))
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad != name.startswith(first), name
    # What is frozen gives the same features at each step.
    assert [block.drop_path.drop_prob > 0 for block in net.blocks] == [False, freeze_at < 3, freeze_at < 4]


def test_grey_images():
    grey, colours = tiny(in_channels=1).eval(), tiny().eval()
    weights = colours.state_dict()
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].sum(1, keepdim=True)
    grey.load_state_dict(weights)
    x = torch.randn(1, 1, 24, 36)
    torch.testing.assert_close(grey(x), colours(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_mixed_precision_stays_near():
    net = Eva02(**TINY).eval()
    images = torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        expected = net(images)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(net(images), expected, rtol=0, atol=0.1)


def test_images_of_another_size_than_the_one_asked_for_are_refused():
    net = tiny(image_size=24)
    net(torch.randn(1, 3, 24, 24))
    with pytest.raises(InputError, match=r"MODEL\.EVA02\.IMAGE_SIZE is 24, but an image of 24 x 32 pixels came"):
        net(torch.randn(1, 3, 24, 32))


def test_pyramid_levels_see_the_map_at_their_scale():
    torch.manual_seed(0)
    pyramid = Eva02Pyramid(Eva02(**{**TINY, "patch_size": 16, "pretrain_image_size": 64}), 8).eval()
    images = torch.randn(2, 3, 96, 160)
    features = pyramid(images)
    for i, (name, shape) in enumerate(pyramid.output_shape().items(), start=2):
        assert name == f"p{i}" and shape.stride == 2**i
        assert features[name].shape == (2, 8, *(-(-side // shape.stride) for side in (96, 160)))
        # The last layer of a level is a norm over the channels.
        torch.testing.assert_close(features[name].mean(1), torch.zeros_like(features[name][:, 0]), rtol=0, atol=1e-5)
    x = pyramid.net(images)
    p5 = F.max_pool2d(x, 3, 2, 1)
    for layer in list(pyramid.p5)[1:]:
        if isinstance(layer, torch.nn.Conv2d):
            p5 = F.conv2d(p5, layer.weight, padding=layer.weight.shape[-1] // 2)
        elif isinstance(layer, torch.nn.GELU):
            p5 = 0.5 * p5 * (1 + torch.erf(p5 / 2**0.5))
        else:
            p5 = (p5 - p5.mean(1, keepdim=True)) / (p5.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(features["p5"], p5, rtol=1e-4, atol=1e-5)
    nearest = pyramid.p2[0](x)
    torch.testing.assert_close(nearest, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_config_gives_the_published_model():
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_eva02_pyramid_backbone"
    cfg.MODEL.CODETR.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    shapes = {name: tuple(p.shape) for name, p in backbone.named_parameters()}
    assert sum(p.numel() for p in backbone.net.parameters()) == 304238528
    assert sum(p.numel() for p in backbone.parameters()) == 304238528 + 23995904
    assert shapes["net.blocks.23.mlp.w3.weight"] == (1024, 2730)
    assert shapes["p2.11.weight"] == (256, 256, 3, 3) and shapes["p6.1.weight"] == (1024, 1024, 3, 3)
    assert [i for i, block in enumerate(backbone.net.blocks) if not block.window_size] == [3, 7, 11, 15, 19, 23]
    assert backbone.size_divisibility == 32
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert set(shapes) - trained == {  # detectron2's default of MODEL.BACKBONE.FREEZE_AT is 2
        name for name in shapes if name.startswith(("net.patch_embed.", "net.pos_embed", "net.blocks.0."))
    }
    cfg.MODEL.EVA02.IMAGE_SIZE = 1536
    with torch.device("meta"):
        assert build_backbone(cfg).padding_constraints["square_size"] == 1536
    cfg.MODEL.CODETR.IN_FEATURES = ["res3"]
    with pytest.raises(InputError, match=r"MODEL\.CODETR\.IN_FEATURES is 'res3'; it may be: p2, p3"):
        build_backbone(cfg)


def test_only_the_levels_asked_for_are_built():
    pyramid = Eva02Pyramid(tiny(patch_size=16, pretrain_image_size=64), 8, ["p5", "p3"])
    assert {name for name, _ in pyramid.named_children()} == {"net", "p3", "p5"}
    assert {name: x.shape[2:] for name, x in pyramid(torch.randn(1, 3, 64, 32)).items()} == {"p3": (8, 4), "p5": (2, 1)}
