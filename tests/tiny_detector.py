"""A detector of a few hundred parameters that trains like any detectron2 model, and a dataset for it."""

import json

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

NUM_CLASSES = 3


@META_ARCH_REGISTRY.register()
class TinyDetector(nn.Module):
    """One box for each image. Its losses are means over the images, however a batch is split."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU())
        self.dropout = nn.Dropout(cfg.MODEL.CODETR.ENCODER.DROPOUT)
        self.class_embed = nn.Linear(8, cfg.MODEL.CODETR.NUM_CLASSES)
        self.box_embed = nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, inputs):
        device = self.seen.device
        features = torch.stack([self.backbone(x["image"].to(device).float() / 255).mean((1, 2)) for x in inputs])
        features = self.dropout(features)
        logits, boxes = self.class_embed(features).float(), self.box_embed(features).float().sigmoid()
        if self.training:
            self.seen += 1
            sizes = [torch.tensor(x["image"].shape[:0:-1] * 2, device=device) for x in inputs]  # (w, h, w, h)
            targets = [x["instances"].gt_boxes.tensor.to(device).mean(0) / size for x, size in zip(inputs, sizes)]
            labels = torch.stack([x["instances"].gt_classes[0].to(device) for x in inputs])
            return {
                "loss_cls": F.cross_entropy(logits, labels),
                "loss_box": F.l1_loss(boxes, torch.stack(targets)),
            }
        results = []
        for x, logit, box in zip(inputs, logits, boxes):
            height, width = x["height"], x["width"]
            box = box * torch.tensor([width, height, width, height], device=device)
            score, label = logit.softmax(0).max(0)
            fields = {"pred_boxes": Boxes(box[None]), "scores": score[None], "pred_classes": label[None]}
            results.append({"instances": Instances((height, width), **fields)})
        return results


def write_dataset(folder, name, num_images, seed):
    """Random pictures, wide and high ones, with two boxes each. Returns the entry for DATASETS.COCO_JSON."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / name).mkdir()
    for i in range(num_images):
        width, height = ((40, 30), (30, 40), (44, 32))[i % 3]
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name / f"{i:02d}.png")
        images.append({"id": i, "file_name": f"{i:02d}.png", "width": width, "height": height})
        for j in range(2):
            x, y = (int(v) for v in rng.integers(0, 12, 2))
            box = {"bbox": [x, y, 10 + i % 5, 12], "area": 12.0 * (10 + i % 5), "iscrowd": 0}
            right, bottom = x + 10 + i % 5, y + 12
            box["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
            annotations.append({"id": 2 * i + j + 1, "image_id": i, "category_id": (i + j) % NUM_CLASSES, **box})
    categories = [{"id": k, "name": f"class{k}"} for k in range(NUM_CLASSES)]
    data = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(data))
    return [name, str(folder / name), str(folder / f"{name}.json")]
