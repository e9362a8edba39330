from fnmatch import fnmatchcase

import pytest
from detectron2.config import get_cfg

from codetr_d2 import add_codetr_config
from codetr_d2.config.config_file import options_of
from codetr_d2.config.honoured import HONOURED, REFUSED, REFUSED_BY_CODETR, check_honoured
from codetr_d2.errors import InputError

DECIDED = (*HONOURED, *REFUSED, *REFUSED_BY_CODETR)
OPTIONS = dict(options_of(get_cfg(), get_cfg()))
REFUSED_OPTIONS = [key for key in OPTIONS if any(fnmatchcase(key, x) for x in (*REFUSED, *REFUSED_BY_CODETR))]


def undecided(cfg):
    return [key for key, _ in options_of(cfg, cfg) if not any(fnmatchcase(key, pattern) for pattern in DECIDED)]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "CoDETR"
    return cfg


def another(value):
    """A value of the same type that is not the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x" if isinstance(value, str) else type(value)([*value, "x"])


def test_every_option_of_detectron2_is_decided_on():
    assert undecided(get_cfg()) == [], "decide on these new options of detectron2 in codetr_d2/config/honoured.py"
    cfg = get_cfg()
    cfg.SOLVER.LOOKAHEAD = cfg.SOLVER.CLIP_GRADIENTS.BY_LAYER = cfg.NEW = 3
    assert sorted(undecided(cfg)) == ["NEW", "SOLVER.CLIP_GRADIENTS.BY_LAYER", "SOLVER.LOOKAHEAD"]


def test_no_row_is_left_over():
    unused = {pattern for pattern in DECIDED if not any(fnmatchcase(key, pattern) for key in OPTIONS)}
    assert unused <= {"FLOAT32_PRECISION"}  # which detectron2 0.7 lacks


@pytest.mark.parametrize("key", REFUSED_OPTIONS)
def test_an_option_without_effect_is_refused_unless_it_has_its_default(cfg, key):
    cfg.merge_from_list([key, OPTIONS[key]])
    check_honoured(cfg)
    cfg.merge_from_list([key, another(OPTIONS[key])])
    with pytest.raises(InputError) as error:
        check_honoured(cfg)
    message = str(error.value)
    assert message.startswith(f"{key} is {another(OPTIONS[key])!r}, which has no effect: ")
    assert message.endswith(f". Leave it at {OPTIONS[key]!r}") and "\n" not in message


def test_other_detectors_read_what_codetr_does_not(cfg):
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.RPN.IN_FEATURES = ["p2"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.VIS_PERIOD = 7
    check_honoured(cfg)
    cfg.TEST.AUG.ENABLED = True
    with pytest.raises(InputError, match=r"TEST\.AUG\.ENABLED is True, which has no effect: .*augmentation"):
        check_honoured(cfg)


def test_options_wait_for_their_component(cfg):
    cfg.MODEL.CODETR.AUX_HEADS = []
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    cfg.MODEL.RPN.NMS_THRESH = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.3
    cfg.MODEL.RESNETS.DEPTH = 101
    cfg.MODEL.FPN.NORM = "GN"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = ((32,),)  # a tuple, as Python's configs have them
    check_honoured(cfg)
