import pytest
import torch
from torch import nn

from memloc_ext.models import Layout, build, channel_dim, dropout_sites, layer_groups
from memloc_ext.nn import insert_example_tied_dropout


class Foreign(nn.Module):
    """A model with parameters on its root, a tied one, and a child without any."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.act = nn.ReLU()
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.encoder[0].weight
        self.scale = nn.Parameter(torch.ones(()))


def with_layout(**layout):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.layout = Layout(**layout)
    return model


def test_a_model_without_layout_has_a_group_per_child():
    assert layer_groups(Foreign()) == {
        "(root)": ["scale"],
        "encoder": ["encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"],
        "decoder": ["decoder.bias"],
    }


class Block(nn.Module):
    """A layer with a module and perhaps a list of further ones inside."""

    def __init__(self, *inner):
        super().__init__()
        self.layer, self.inner = nn.Linear(1, 1), nn.ModuleList(inner)


def test_blocks_are_groups_at_any_depth():
    model = nn.Module()
    model.stem = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.LayerNorm(1))  # of leaf layers
    model.body = nn.Module()
    model.body.embedding = nn.Linear(1, 1)
    model.body.blocks = nn.ModuleList([nn.ModuleList([Block(), Block()]), Block(nn.Linear(1, 1), nn.ReLU())])
    model.stages = nn.Sequential(nn.Linear(1, 1), Block(), nn.Sequential(nn.Linear(1, 1), nn.ReLU()))
    model.scale = nn.Parameter(torch.ones(()))
    groups = layer_groups(model)
    assert {group: len(names) for group, names in groups.items()} == {
        "(root)": 1,
        "stem": 4,
        "body": 2,
        "body.blocks.0.0": 2,
        "body.blocks.0.1": 2,
        "body.blocks.1": 2,
        "body.blocks.1.inner.0": 2,
        "stages.0": 2,
        "stages.1": 2,
        "stages.2": 2,
    }
    assert groups["body.blocks.1"] == ["body.blocks.1.layer.weight", "body.blocks.1.layer.bias"]
    assert sorted(name for names in groups.values() for name in names) == sorted(
        name for name, _ in model.named_parameters()
    )


def test_what_is_added_to_a_leaf_layer_makes_it_no_block():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    insert_example_tied_dropout(model, ["0.0"])
    nn.utils.parametrizations.weight_norm(model[0][1])
    assert {group: len(names) for group, names in layer_groups(model).items()} == {"0": 5, "1": 2}


def test_groups_are_given_by_names_or_prefixes():
    model = Foreign()
    assert layer_groups(model, {"first": ["encoder.0", "scale"], "bias": ["encoder.1.bias"]}) == {
        "first": ["scale", "encoder.0.weight", "encoder.0.bias"],
        "bias": ["encoder.1.bias"],
    }
    assert layer_groups(model, {"all": "encoder."}) == layer_groups(model, {"all": ["encoder"]})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["encoder"], "b": ["encoder.1"]}, r"at most one group, got encoder\.1\.weight in a, b"),
        ({"a": ["enc"]}, "names of parameters of the model, .* got 'enc' in 'a'"),
        ({"a": ["act"]}, "got 'act' in 'a'"),
        ({"a": []}, "groups must hold parameters, got 'a' without"),
    ],
)
def test_refuses_groups_that_are_not_the_models(groups, message):
    with pytest.raises(ValueError, match=f"layer_groups: .*{message}"):
        layer_groups(Foreign(), groups)


def test_an_attribute_of_another_type_is_no_layout():
    model = Foreign()
    model.layout = "NCHW"
    assert list(layer_groups(model)) == ["(root)", "encoder", "decoder"]


def test_a_model_without_parameters_has_no_groups():
    assert layer_groups(nn.ReLU()) == {}


def test_groups_keep_the_order_of_the_layout_and_drop_the_empty():
    model = with_layout(groups={"last": ("1",), "none": ("2",), "first": ("0.weight", "0.bias")})
    assert list(layer_groups(model).items()) == [
        ("last", ["1.weight", "1.bias"]),
        ("first", ["0.weight", "0.bias"]),
    ]


def test_a_name_is_no_prefix_of_a_longer_one():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(11)))
    model.layout = Layout(groups={str(i): (str(i),) for i in range(11)})
    assert all(len(names) == 2 for names in layer_groups(model).values())


@pytest.mark.parametrize(
    ("groups", "message"),
    [({"a": ("0",)}, r"got 1\.weight in none"), ({"a": ("0", "1"), "b": ("1.bias",)}, r"got 1\.bias in a, b")],
)
def test_refuses_a_layout_that_is_no_partition(groups, message):
    with pytest.raises(ValueError, match=f"layer_groups: layout must put every parameter in .*, {message}"):
        layer_groups(with_layout(groups=groups))


def test_groups_survive_hooks_and_added_children():
    model = build("resnet9", image_size=8)
    before = layer_groups(model)
    model.conv1.register_forward_hook(lambda _module, _args, output: output)
    model.add_module("dropout", nn.Dropout())
    assert layer_groups(model) == before


@pytest.mark.parametrize("model", [Foreign(), with_layout(groups={"all": ("0", "1")})])
def test_a_model_that_names_no_sites_must_be_told(model):
    with pytest.raises(ValueError, match=r"dropout_sites: model must have .*; name the sites yourself"):
        dropout_sites(model)


def test_channels_come_second_unless_the_layout_says_otherwise():
    assert channel_dim(Foreign()) == 1
    assert channel_dim(with_layout(groups={}, channel_dim=-1)) == -1
