import copy
import pickle

import pytest
import torch
from torch import nn

import memloc_ext
from memloc_ext.models import build, channel_dim, dropout_sites, layer_groups
from memloc_ext.nn import ExampleTiedDropout, FixedDropout, insert_after, insert_example_tied_dropout
from memloc_ext.reference import example_tied_dropout as reference

IDS = torch.tensor([3, 1, 4])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 12)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(2)])
        self.head = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def masked(x: torch.Tensor, site: int) -> torch.Tensor:
    return reference.example_tied_dropout(x, IDS, 3, 0.5, 9, site)


def insert(model: nn.Module, after: list[str]) -> nn.Module:
    return insert_example_tied_dropout(model, after, p_gen=0.25, p_mem=0.5, seed=9)


def test_each_site_is_masked_once_under_its_own_number() -> None:
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    assert insert(model, ["stem", "blocks.0", "blocks.1.1"]) is model
    x = torch.randn(3, 4)
    hidden = masked(plain.stem(x), 0)
    hidden = masked(plain.blocks[0](hidden), 1)
    hidden = masked(plain.blocks[1](hidden), 2)
    with memloc_ext.example_ids(IDS):
        torch.testing.assert_close(model(x), plain.head(hidden))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(copied(x), model(x))
    assert [name for name, _ in model.named_parameters()] == names
    assert [m.site for m in model.modules() if isinstance(m, ExampleTiedDropout)] == [0, 1, 2]


def test_a_copy_has_dropouts_of_its_own() -> None:
    model = insert(Net(), ["stem"])
    copied = copy.deepcopy(model).eval()
    x = torch.randn(3, 4)
    assert model.stem.dropout_after.mode == "train"
    assert (copied.stem(x)[:, 3:] == 0).all()


def test_it_follows_training_mode_and_leaves_errors_without_a_trace() -> None:
    model = insert(Net().eval(), ["stem"])
    assert model.stem.dropout_after.mode == "drop"
    for after, message in (
        (["head", "tail"], "it has no 'tail'"),
        (["head", "head"], "already has a dropout"),
        (["head", "stem"], "already has a dropout"),
        (["head", "blocks"], "ModuleList that may run each of its children"),
    ):
        with pytest.raises(ValueError, match=message):
            insert(model, after)
    with pytest.raises(ValueError, match="p_mem must be in"):
        insert_example_tied_dropout(model, ["head"], p_mem=3)
    with pytest.raises(TypeError, match="list of module names"):
        insert(model, "head")
    assert not hasattr(model.head, "dropout_after")
    assert not model.head._forward_hooks


def test_sites_of_a_second_call_go_on_from_those_of_the_first() -> None:
    model = insert(insert(Net(), ["stem"]), ["blocks.0", "blocks.1"])
    assert [m.site for m in model.modules() if isinstance(m, ExampleTiedDropout)] == [0, 1, 2]


def test_a_state_dict_from_before_loads_strictly_and_keeps_the_settings() -> None:
    before = Net()
    model = insert(Net(), ["stem", "blocks.0"])
    model.load_state_dict(before.state_dict())
    assert torch.equal(model.head.weight, before.head.weight)
    assert model.stem.dropout_after.seed == 9
    state = before.state_dict()
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        model.load_state_dict(state)


def test_insert_after_takes_any_module() -> None:
    model = insert_after(Net(), ["stem", "blocks.0"], lambda site: nn.Dropout(0.1 * site))
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.0, 0.1]


def test_a_transformer_needs_the_dimension_of_its_channels() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    for site in ("linear1", "norm1", "self_attn.out_proj", ""):
        model = insert(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), [site])
        if site == "self_attn.out_proj":  # attention calls its function, not the module
            continue
        for training in (True, False):
            with pytest.raises(ValueError, match="channel_dim must be given"), memloc_ext.example_ids(IDS):
                model.train(training)(x)
    tokens = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    expected = reference.example_tied_dropout(tokens(x), IDS, 2, 0.5, 9, 0, -1)
    insert_example_tied_dropout(tokens, [""], p_gen=0.25, p_mem=0.5, seed=9, channel_dim=-1)
    with memloc_ext.example_ids(IDS):
        torch.testing.assert_close(tokens(x), expected)


def test_a_1d_convolution_tells_where_its_channels_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 12)
    conv, norm, transposed = nn.Conv1d(4, 12, 3), nn.BatchNorm1d(12), nn.ConvTranspose1d(12, 12, 3)
    hidden = masked(conv(x), 0)
    hidden = masked(norm(hidden), 1)
    expected = masked(transposed(hidden), 2)
    model = insert(nn.Sequential(conv, norm, transposed), ["0", "1", "2"])
    with memloc_ext.example_ids(IDS):
        torch.testing.assert_close(model(x), expected)
    model = insert(nn.Sequential(nn.Conv1d(4, 12, 3), nn.ReLU()), ["1"])  # a ReLU follows anything
    with pytest.raises(ValueError, match="channel_dim must be given"), memloc_ext.example_ids(IDS):
        model(x)
    fixed = nn.Sequential(nn.Conv1d(4, 12, 3), nn.ReLU())
    hidden = reference.example_tied_dropout(fixed[0](x), torch.zeros(3, dtype=torch.int64), 3, 0.5, 9, 0)
    insert_after(fixed, ["0"], lambda _: FixedDropout(0.25, 0.5, seed=9))
    torch.testing.assert_close(fixed(x), hidden.relu())
    insert_after(fixed, ["1"], lambda _: FixedDropout(0.25, 0.5, seed=9))
    with pytest.raises(ValueError, match="channel_dim must be given"):
        fixed(x)


@pytest.mark.parametrize("name", ["lenet", "resnet9", "resnet18", "vit"])
def test_models_of_ours_take_it_at_their_own_sites(name: str) -> None:
    model = build(name, in_channels=1, image_size=28, num_classes=5).eval()
    groups = layer_groups(model)
    x = torch.randn(3, 1, 28, 28)
    plain = model(x)
    insert_example_tied_dropout(model, dropout_sites(model), channel_dim=channel_dim(model))
    assert layer_groups(model) == groups
    memloc_ext.nn.set_dropout_mode(model, "train")
    with memloc_ext.example_ids(IDS):
        first, second = model(x), model(x)
    assert first.shape == (3, 5)
    torch.testing.assert_close(first, second)
    assert not torch.equal(first, plain)
