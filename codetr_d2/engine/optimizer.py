"""Parameter groups, optimizer, gradient norm, and the schedule in epochs."""

import logging
import math
from functools import cache

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping, reduce_param_groups
from torch import Tensor, nn

from ..option_checks import option

__all__ = ["build_optimizer", "clip_full_model", "schedule_in_iterations"]

logger = logging.getLogger(__name__)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on all trainable parameters.

    The learning rate is ``SOLVER.BASE_LR``, scaled by :func:`batch_factor`, times the factor of the first entry of
    ``SOLVER.LR_MULTIPLIERS`` that is part of the parameter's name, and for biases times ``SOLVER.BIAS_LR_FACTOR``.
    ``SOLVER.WEIGHT_DECAY`` is on every parameter, as published, but for norms and biases where ``WEIGHT_DECAY_NORM``
    and ``WEIGHT_DECAY_BIAS`` are set; what is a norm or a bias, detectron2 decides.

    With ``SOLVER.LAYER_DECAY`` d < 1 the learning rate of ViT block i of n is also multiplied by d^(n - i), that of the
    patch and position embeddings by d^(n + 1), so that layers which are closer to the image change less; and vectors,
    which are norms and biases, have by themselves no weight decay.

    detectron2's own kinds of ``SOLVER.CLIP_GRADIENTS`` (norm, value: of each parameter) are part of the
    optimizer's step; ``full_model`` is :func:`clip_full_model`, called by the trainer.
    """
    base_rate = cfg.SOLVER.BASE_LR * batch_factor(cfg)
    if cfg.SOLVER.REFERENCE_BATCH_SIZE:
        logger.info(
            "The learning rate is %g: SOLVER.BASE_LR %g for SOLVER.IMS_PER_BATCH %d in place of %d images",
            *(base_rate, cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_BATCH_SIZE),
        )
    multipliers = [(part, float(factor)) for part, factor in cfg.SOLVER.LR_MULTIPLIERS]
    given_decays = {
        parameter: group["weight_decay"]
        for group in get_default_optimizer_params(
            model, weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM, weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS
        )
        for parameter in group["params"]
        if "weight_decay" in group
    }

    layer_decay = cfg.SOLVER.LAYER_DECAY
    if layer_decay < 1:
        depth = option(cfg, BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME).DEPTH_OPTION)

    def rate_of(name: str) -> float:
        rate = base_rate * next((factor for part, factor in multipliers if part in name), 1.0)
        if name.rpartition(".")[2] == "bias":
            rate *= cfg.SOLVER.BIAS_LR_FACTOR
        return rate * get_vit_lr_decay_rate(name, layer_decay, depth) if layer_decay < 1 else rate

    def decay_of(parameter: nn.Parameter) -> float:
        usual = 0.0 if layer_decay < 1 and parameter.ndim <= 1 else cfg.SOLVER.WEIGHT_DECAY
        return given_decays.get(parameter, usual)

    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part, _ in multipliers:
        if not any(part in name for name in parameters):
            logger.warning("SOLVER.LR_MULTIPLIERS: %r is part of no parameter's name", part)
    groups = reduce_param_groups(
        [
            {"params": [parameter], "lr": rate_of(name), "weight_decay": decay_of(parameter)}
            for name, parameter in parameters.items()
        ]
    )

    adamw = torch.optim.AdamW
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE != "full_model":
        adamw = maybe_add_gradient_clipping(cfg, adamw)
    try:
        optimizer = adamw(groups, lr=base_rate, fused=True)
    except RuntimeError:  # this torch has no fused kernel for this device
        optimizer = adamw(groups, lr=base_rate, foreach=True)
    names = {parameter: name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]
    optimizer.register_load_state_dict_pre_hook(_keep_options)
    return optimizer


def batch_factor(cfg: CfgNode) -> float:
    """What the learning rate is multiplied by, as the batch is not the one that ``SOLVER.BASE_LR`` is meant for.

    The linear rule (Goyal et al., Accurate, Large Minibatch SGD): a batch of k times as many images makes a k-th of the
    steps of an epoch, each with k times the learning rate.
    """
    reference = cfg.SOLVER.REFERENCE_BATCH_SIZE
    return cfg.SOLVER.IMS_PER_BATCH / reference if reference else 1.0


def _keep_options(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """The state of a checkpoint under the groups and options of this optimizer: learning rates, decays, the kernel.

    Raises:
        ValueError: the checkpoint is about other parameters.
    """
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if all("param_names" in group for group in saved):
        saved_names = [name for group in saved for name in group["param_names"]]
    elif [len(group["params"]) for group in groups] == [len(group["params"]) for group in saved]:
        saved_names = [name for group in groups for name in group["param_names"]]
    else:
        raise ValueError("it has no names of parameters, and groups of other sizes")
    index = dict(zip(saved_names, (i for group in saved for i in group["params"])))
    differing = index.keys() ^ {name for group in groups for name in group["param_names"]}
    if differing:
        raise ValueError(f"{sorted(differing)[0]} is trained by one of them alone")
    own = [{**group, "params": [index[name] for name in group["param_names"]]} for group in groups]
    return {**state_dict, "param_groups": own}


def clip_full_model(optimizer: torch.optim.Optimizer, cfg: CfgNode, in_step: bool = True) -> Tensor:
    """Scale all gradients together so that their total norm is at most ``CLIP_VALUE``, if the config asks for that.

    Args:
        optimizer: of the parameters.
        cfg: ``SOLVER.CLIP_GRADIENTS``.
        in_step: let a fused optimizer scale them in its next step, where it reads them anyway, if it does so. Not for
            one that a ``GradScaler`` steps: that one sets the same attribute, and what it makes of a value that it
            finds depends on torch's version.

    Returns:
        The total norm before clipping, a scalar on the device: of kind ``SOLVER.CLIP_GRADIENTS.NORM_TYPE``.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    clip = cfg.SOLVER.CLIP_GRADIENTS
    norm_type = float(clip.NORM_TYPE)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, norm_type)), norm_type)
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        # As torch.nn.utils.clip_grad_norm_ does: no look at the norm, which would wait for the device.
        divisor = torch.clamp((norm + 1e-6) / clip.CLIP_VALUE, min=1.0)
        if in_step and optimizer.defaults.get("fused") and _fused_step_divides(divisor.device):
            optimizer.grad_scale = divisor.float()
        else:
            torch._foreach_div_(gradients, divisor)
    return norm


@cache
def _fused_step_divides(device: torch.device) -> bool:
    """Whether a fused step divides gradients by the optimizer's ``grad_scale``: tried, as torch does not promise it."""
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.full_like(parameter, 6.0)
    optimizer = torch.optim.AdamW([parameter], betas=(0.0, 0.0), fused=True)
    optimizer.grad_scale = torch.full((), 3.0, device=device)
    optimizer.step()
    return optimizer.state[parameter]["exp_avg"].item() == 2.0


def schedule_in_iterations(cfg: CfgNode, num_images: int) -> CfgNode:
    """Turn ``SOLVER.MAX_EPOCHS`` and ``STEPS_EPOCHS``, where set, into ``MAX_ITER`` and ``STEPS`` of a new config.

    Args:
        cfg: the config, which stays as it is.
        num_images: images of an epoch, which is that many divided by ``SOLVER.IMS_PER_BATCH`` iterations.
    """
    if cfg.SOLVER.MAX_EPOCHS <= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    epoch = num_images / cfg.SOLVER.IMS_PER_BATCH
    cfg.SOLVER.MAX_ITER = math.ceil(cfg.SOLVER.MAX_EPOCHS * epoch)
    steps = {round(step * epoch) for step in cfg.SOLVER.STEPS_EPOCHS}  # few images may make two epochs one iteration
    cfg.SOLVER.STEPS = tuple(sorted(step for step in steps if step < cfg.SOLVER.MAX_ITER))
    logger.info(
        "%g epochs of %d images are %d iterations; the learning rate falls after %s",
        cfg.SOLVER.MAX_EPOCHS,
        num_images,
        cfg.SOLVER.MAX_ITER,
        cfg.SOLVER.STEPS,
    )
    return cfg
