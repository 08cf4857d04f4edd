import copy
import importlib.util
import io
import subprocess
import sys
from itertools import chain

import pytest
import torch

from memloc_ext.models import NAMES, build, channel_dim, dropout_sites, layer_groups

without_torchvision = pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="needs torchvision")
MODELS = [pytest.param(name, marks=without_torchvision if name in ("resnet18", "resnet50") else ()) for name in NAMES]
LIGHT = [model for model in MODELS if model.values[0] != "resnet50"]


def logits(model, image_size=8, in_channels=3, batch=2):
    return model(torch.randn(batch, in_channels, image_size, image_size))


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("image_size", [8, 28, 32])
@pytest.mark.parametrize("name", LIGHT)
def test_returns_a_logit_per_class(name, image_size, in_channels):
    model = build(name, num_classes=7, in_channels=in_channels, image_size=image_size)
    assert logits(model, image_size, in_channels).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_takes_a_single_example_in_eval_mode(name):
    model = build(name, image_size=8).eval()
    with torch.inference_mode():
        assert logits(model, batch=1).shape == (1, 10)


@pytest.mark.parametrize("name", MODELS)
def test_layer_groups_partition_the_parameters(name):
    model = build(name, image_size=8)
    groups = layer_groups(model)
    assert len(groups) == {"lenet": 5, "resnet9": 9, "resnet18": 6, "resnet50": 6, "vit": 8}[name]
    assert sorted(chain(*groups.values())) == sorted(dict(model.named_parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_sites_have_their_channels_on_the_declared_dimension(name):
    model = build(name, image_size=8).eval()
    outputs = {}
    for site in dropout_sites(model):
        module = model.get_submodule(site)
        module.register_forward_hook(lambda _module, _args, output, site=site: outputs.update({site: output}))
    with torch.inference_mode():
        logits(model)
    channels = [outputs[site].shape[channel_dim(model)] for site in outputs]
    assert list(outputs) == dropout_sites(model)
    assert (
        channels
        == {
            "lenet": [120, 84],
            "resnet9": [64, 128, 128, 256, 256, 128],
            "resnet18": [64, 64, 128, 256, 512],
            "resnet50": [64, 256, 512, 1024, 2048],
            "vit": [512] * 6,
        }[name]
    )


@pytest.mark.parametrize("name", LIGHT)
def test_every_parameter_gets_a_gradient(name):
    model = build(name, image_size=8)
    logits(model).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("name", LIGHT)
def test_copies_and_pickles_compute_and_say_the_same(name):
    model = build(name, image_size=8).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), model(x))
            assert layer_groups(other) == layer_groups(model)
            assert dropout_sites(other) == dropout_sites(model)
            assert channel_dim(other) == channel_dim(model)


@pytest.mark.parametrize("name", LIGHT)
def test_traces_without_a_graph_break(name):
    model = build(name, image_size=8).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_refuses_an_unknown_name():
    with pytest.raises(ValueError, match=r"build: name must be one of lenet, resnet9, .*, got 'alexnet'"):
        build("alexnet")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "resnet9"])
def test_refuses_to_scale_other_models_than_resnet9(name):
    with pytest.raises(ValueError, match=rf"build: width must be 1 for {name}, .* got 0\.5"):
        build(name, width=0.5)


def test_imports_without_torchvision():
    code = "import sys; sys.modules['torchvision'] = None; import memloc_ext.models as m; m.build('lenet')"
    subprocess.run([sys.executable, "-c", code], check=True)
