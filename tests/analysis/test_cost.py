import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from codetr_d2 import add_codetr_config
from codetr_d2.analysis.cost import PARTS, build_with_random_weights, measure_cost, parts_of
from codetr_d2.analysis.flops import count_flops
from codetr_d2.engine import load_config
from codetr_d2.layers import MultiScaleDeformableAttention
from tests.small_model import build
from tests.tiny_run import CONFIGS

SIZE = (64, 96)


def of_conv_and_linear_modules(model: nn.Module) -> dict[str, int]:
    """Multiplications of the convolutions and linear layers that are called as modules in one run, by name."""
    counts = {}

    def hook(module, inputs, output):
        weights = module.weight[0].numel()  # one output number takes so many
        counts[names[module]] = counts.get(names[module], 0) + output.numel() * weights

    names = {m: name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    handles = [module.register_forward_hook(hook) for module in names]
    with torch.no_grad():
        model([{"image": torch.zeros(3, *SIZE), "height": SIZE[0], "width": SIZE[1]}])
    for handle in handles:
        handle.remove()
    return counts


def test_flops_equal_a_hand_count():
    model = build().eval()
    cost = measure_cost(model, SIZE, repeat=1)
    modules = of_conv_and_linear_modules(model)

    def modules_in(part):
        return sum(x for name, x in modules.items() if name.startswith(part))

    for part in ("backbone", "neck", "query_head.proposals", "query_head.box_proj"):
        assert cost.modules[part].flops == modules_in(part) > 0

    attention = model.query_head.encoder.layers[0].self_attn
    tokens = sum(SIZE[0] // stride * (SIZE[1] // stride) for stride in model.strides)
    dim, hidden, queries, layers = 64, 64, 20, 2
    samples = attention.num_heads * attention.num_levels * attention.num_points

    def deformable_attention(num_queries):
        projections = tokens * dim * dim + num_queries * dim * dim
        locations = num_queries * dim * samples * 2 + num_queries * dim * samples
        taps = num_queries * samples * 4 * (dim // attention.num_heads)
        return projections + locations + taps

    def feed_forward(num_queries):
        return num_queries * dim * hidden + num_queries * hidden * dim

    encoder = layers * (deformable_attention(tokens) + feed_forward(tokens))
    assert cost.modules["query_head.encoder"].flops == encoder

    self_attention = 4 * queries * dim * dim + 2 * queries * queries * dim
    classes, box = queries * dim * 10, queries * (dim * dim + dim * dim + dim * 4)
    decoder = layers * (self_attention + deformable_attention(queries) + feed_forward(queries) + classes + box)
    assert cost.modules["query_head.decoder"].flops == decoder

    outside = sum(x for name, x in modules.items() if not name.startswith(("query_head.encoder", "query_head.decoder")))
    assert cost.total.flops == outside + encoder + decoder
    assert cost.total.flops == sum(part.flops for part in parts_of(cost).values())


def test_eager_deformable_attention_costs_the_same():
    model = build().eval()
    flops = measure_cost(model, SIZE, repeat=1).total.flops
    for module in model.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            module.backend = "eager"
    assert measure_cost(model, SIZE, repeat=1).total.flops == flops


def test_activations_are_the_outputs_of_the_operators():
    model = build().eval()
    cost = measure_cost(model, SIZE, repeat=1)
    outputs = []
    handles = [x.register_forward_hook(lambda *a: outputs.append(a[2].numel())) for x in model.neck.modules()
               if isinstance(x, nn.Conv2d)]  # fmt: skip
    of_conv_and_linear_modules(model)
    for handle in handles:
        handle.remove()
    assert cost.modules["neck"].activations == sum(outputs)
    layer = cost.modules["query_head.encoder.layers.0.ffn"]
    tokens = sum(SIZE[0] // stride * (SIZE[1] // stride) for stride in model.strides)
    assert layer.activations == tokens * (64 + 64)


def test_parameters():
    """Inference reads nothing of what only training adds."""
    model = build().eval()
    cost = measure_cost(model, SIZE, repeat=3)
    count = {name: sum(x.numel() for x in module.parameters()) for name, module in model.named_modules()}
    assert cost.total.parameters == count[""]
    training_only = ("auxiliary_heads", "auxiliary_level", "query_head.positive_queries")
    for name in training_only:
        assert (cost.modules[name].parameters, cost.modules[name].parameters_at_inference) == (count[name], 0)
    assert cost.total.parameters_at_inference == count[""] - sum(count[name] for name in training_only)
    assert cost.auxiliary_parameters == {
        name: count[f"auxiliary_heads.{name}"] + count[f"query_head.positive_queries.{name}"]
        for name in ("roi", "atss")
    }
    assert len(cost.seconds) == 3 and min(cost.seconds) > 0
    assert set(cost.down_to(1)) == {"", "backbone", "neck", "query_head", "auxiliary_heads", "auxiliary_level"}
    assert set(cost.down_to(1)) < set(cost.down_to(2)) < set(cost.modules)


@pytest.mark.parametrize(
    "options",
    [
        ["MODEL.CODETR.QUERY_HEAD", "CoDINOHead"],
        ["MODEL.CODETR.QUERY_HEAD", "ConditionalDETRHead"],
        ["MODEL.CODETR.QUERY_HEAD", "DABDETRHead"],
        ["MODEL.MASK_ON", True],
        ["MODEL.CODETR.EVAL_HEAD", "roi"],
    ],
    ids=["co-dino", "conditional", "dab", "masks", "a branch"],
)
def test_every_kind_of_model(options):
    model = build(*options).eval()
    cost = measure_cost(model, SIZE, repeat=1)
    parts = parts_of(cost)
    needed = {"backbone", "encoder"} | ({"auxiliary heads"} if options[0] != "MODEL.CODETR.QUERY_HEAD" else {"decoder"})
    assert all(parts[name].flops > 0 and parts[name].parameters_at_inference > 0 for name in needed)
    assert all(name in PARTS or name == "rest" for name in parts)
    assert cost.total.flops == sum(part.flops for part in parts.values())


def test_roi_align_counts_its_samples():
    func = torch.ops.torchvision.roi_align.default
    maps, rois = torch.zeros(1, 3, 8, 8), torch.tensor([[0.0, 0.0, 0.0, 8.0, 16.0], [0.0, 2.0, 2.0, 4.0, 4.0]])
    # Two bins a side at half the scale: samples for 2 x 4 cells and for 1 x 1 cell of a bin; 3 channels, 4 taps.
    args = (maps, rois, 0.5, 2, 2, 0, True)
    assert count_flops(func, args, {}, None, [maps, rois]) == 2 * 4 * 3 * (2 * 2) * (2 * 4 + 1)
    args = (maps, rois, 0.5, 2, 2, 3, True)
    assert count_flops(func, args, {}, None, [maps, rois]) == 2 * 4 * 3 * (2 * 2) * (2 * 3 * 3)


def test_a_config_needs_no_files():
    cfg = load_config(str(CONFIGS / "quick_start" / "co_deformable_detr_efficientnet_lite0_digits.yaml"), [])
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", "/no/such/file"
    assert not build_with_random_weights(cfg).training and cfg.MODEL.WEIGHTS == "/no/such/file"


@pytest.mark.slow
def test_the_published_order_of_magnitude():
    """Deformable DETR with ResNet-50: 173 GFLOPs and 40 M parameters in its paper, whose feed-forward networks have
    1024 channels and whose pictures are COCO's, mostly 3 by 4."""
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "co_deformable_detr" / "deformable_detr_r50_1x_coco.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.CODETR.ENCODER.FFN_DIM", 1024])
    cfg.MODEL.CODETR.DECODER.FFN_DIM = 1024
    cost = measure_cost(build_with_random_weights(cfg), (800, 1066), repeat=1)
    assert cost.total.flops == pytest.approx(173e9, rel=0.1)
    assert cost.total.parameters == pytest.approx(40e6, rel=0.1)
