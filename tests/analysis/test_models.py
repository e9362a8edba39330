import pytest
import torch

from codetr_d2.analysis.models import ModelSpec, images, load_model, load_models
from codetr_d2.errors import InputError


def test_what_the_command_line_says_of_a_model():
    assert ModelSpec.parse("plain=run/config.yaml") == ModelSpec("plain", "run/config.yaml")
    assert ModelSpec.parse("a b=c.yaml,d=1.pth") == ModelSpec("a b", "c.yaml", "d=1.pth")
    for text in ("config.yaml", "=config.yaml", "name=", "name=,weights.pth"):
        with pytest.raises(InputError, match="NAME=CONFIG"):
            ModelSpec.parse(text)


def test_a_name_with_an_equals_sign(tmp_path):
    (tmp_path / "k=2.yaml").touch()
    for files in ("k=2.yaml", "k=2.yaml,e=1.pth"):
        config, _, weights = files.partition(",")
        expected = ModelSpec("K = 2", str(tmp_path / config), weights)
        assert ModelSpec.parse(f"K = 2={tmp_path / files}") == expected


def spec(name, files):
    return ModelSpec.parse(f"{name}={files}")


@pytest.mark.slow
class TestModels:
    def test_has_its_weights_and_is_in_eval_mode(self, write_run, write_data, tmp_path):
        config, weights = write_run("run", write_data()).split(",")
        analysed = load_model("ours", config, weights, ["MODEL.CODETR.COMPILE", "True"])
        saved = torch.load(weights)["model"]
        assert analysed.name == "ours" and not analysed.model.training
        assert all(torch.equal(x, saved[name]) for name, x in analysed.model.state_dict().items())
        # Without weights the config's own; hooks need a model that is not compiled.
        again = load_model("ours", config, opts=["MODEL.WEIGHTS", weights])
        assert again.cfg.MODEL.WEIGHTS == weights
        assert not analysed.cfg.MODEL.CODETR.COMPILE

    def test_every_config_is_read_before_the_first_model_is_built(self, write_run, write_data):
        files = write_run("run", write_data())
        with pytest.raises(InputError, match="no_such.yaml"):
            load_models([spec("a", files), spec("b", "no_such.yaml")])

    def test_names_must_differ(self, write_run, write_data):
        files = write_run("run", write_data())
        with pytest.raises(InputError, match="--model: the names a, a are not all different"):
            load_models([spec("a", files), spec("a", files)])

    def test_datasets_must_not_differ(self, write_run, write_data):
        a, b = (spec(name, write_run(name, write_data())) for name in "ab")
        with pytest.raises(InputError, match="different test datasets.*DATASETS.TEST"):
            load_models([a, b])

    def test_images_are_resized_as_for_testing_and_have_their_objects(self, write_run, write_data):
        files = write_run("run", write_data(), "INPUT.MIN_SIZE_TEST", 80, "INPUT.MAX_SIZE_TEST", 100)
        analysed = load_model("a", *files.split(","))
        found = list(images(analysed, 2))
        assert [tuple(x["image"].shape) for x in found] == [(3, 67, 100), (3, 100, 67)]
        expected = torch.tensor([[10, 10, 30, 20], [30, 20, 38, 36]]) * torch.tensor([100 / 60, 67 / 40] * 2)
        torch.testing.assert_close(found[0]["instances"].gt_boxes.tensor, expected)
        assert found[0]["instances"].gt_classes.tolist() == [0, 0]
        assert not found[0]["instances"].has("gt_masks")

    def test_images_have_masks_where_the_dataset_has(self, write_run, write_data):
        analysed = load_model("a", *write_run("run", write_data(masks=True)).split(","))
        instances = images(analysed, 1)[0]["instances"]
        scale = instances.image_size[1] / 60
        assert instances.gt_masks.tensor.shape == (2, *instances.image_size)
        area = instances.gt_masks.tensor.sum((1, 2)) / scale**2
        assert area.tolist() == pytest.approx([100, 64], rel=0.2)

    @pytest.mark.parametrize("options", [{"boxes": False}, {"annotated": False}])
    def test_a_dataset_without_boxes(self, write_run, write_data, options):
        data = write_data(**options)
        analysed = load_model("a", *write_run("run", data).split(","))
        with pytest.raises(InputError, match="has no boxes"):
            images(analysed, 1)
