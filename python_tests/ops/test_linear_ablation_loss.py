import pytest
import torch
from accuracy import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memloc_ext.ops.ablation import linear_ablation_loss
from memloc_ext.reference import linear_ablation_loss as reference

op = torch.ops.memloc_ext.linear_ablation_loss
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def example(
    batch: int, count: int, classes: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, each: bool = False
) -> Arguments:
    features, weight = torch.randn(batch, count).to(dtype), (scale * torch.randn(classes, count)).to(dtype)
    baseline = torch.randn(batch, count) if each else torch.randn(count)
    return features, weight, torch.randn(classes).to(dtype), torch.randint(classes, (batch,)), baseline.to(dtype)


def moved(arguments: Arguments, to: torch.device | str | torch.dtype) -> Arguments:
    keep = isinstance(to, torch.dtype)
    tensors = [t if t is None or (keep and not t.is_floating_point()) else t.to(to) for t in arguments]
    return tensors[0], tensors[1], tensors[2], tensors[3], tensors[4]  # pyright: ignore[reportReturnType]


def largest_logits(
    features: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor, baseline: Tensor, absolute: bool
) -> Tensor:
    """Return the largest logit of each feature and example, of the absolute values of all terms or as they are."""
    value = (lambda t: t.abs()) if absolute else (lambda t: t)
    moves = value(baseline - features).t()[..., None] * value(weight).t()[:, None]  # [features, batch, classes]
    whole = value(features) @ value(weight).t() + (0 if bias is None else value(bias))
    return (whole + moves).abs().amax(2)


def check(arguments: Arguments, device: torch.device) -> None:
    loss, predicted = linear_ablation_loss(*moved(arguments, device))
    features = arguments[0]
    computed = torch.float64 if features.dtype == torch.float64 else torch.float32
    assert (loss.dtype, loss.device.type, predicted.dtype) == (computed, device.type, torch.int64)
    exact, logits_agree = reference.linear_ablation_loss(*moved(arguments, torch.float64))
    # a logit's own terms are added up in float64, and it is rounded to what the loss is computed in
    magnitude = 1 + largest_logits(*moved(arguments, torch.float64), absolute=computed == torch.float64)
    assert_accurate(loss.cpu(), exact, magnitude, len(arguments[1]) + 4)
    assert predicted.shape == loss.shape
    if len(arguments[1]) < 20:  # or logits can be so close that rounding decides
        assert torch.equal(predicted.cpu(), logits_agree)


# reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (1, 64, 10), (37, 65, 10), (5, 200, 3), (33, 9, 1000)])
def test_matches_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    for each in (False, True):
        check(example(*shape, dtype, each=each), device)
    features, weight, _, targets, baseline = example(*shape, dtype)
    check((features, weight, None, targets, torch.zeros_like(baseline)), device)


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_and_steep_losses(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    check(example(9, 70, 12, dtype, scale), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_exact_to_a_few_units_of_its_last_place(dtype: torch.dtype, device: torch.device) -> None:
    rounding = 4 * torch.finfo(dtype).eps
    gap = torch.linspace(0, 800, 4001, dtype=dtype, device=device)[:, None]
    weight = torch.tensor([[0.0], [1.0]], dtype=dtype, device=device)
    for target in (0, 1):  # of logits 0 and gap
        targets = torch.full((4001,), target, device=device)
        loss, _ = linear_ablation_loss(torch.zeros_like(gap), weight, None, targets, gap)
        exact = torch.log1p(torch.exp(-gap[:, 0].double())) + (1 - target) * gap[:, 0].double()
        torch.testing.assert_close(loss[0].double(), exact, rtol=rounding, atol=rounding)
    for classes in range(1, 1000, 7):
        zero = torch.zeros(classes, 1, dtype=dtype, device=device)
        loss, _ = linear_ablation_loss(zero[:1], zero, None, torch.zeros(1, device=device).long(), zero[0])
        torch.testing.assert_close(loss.double(), torch.full_like(loss, classes).double().log(), rtol=rounding, atol=0)


def test_strides(device: torch.device) -> None:
    torch.manual_seed(0)
    features, weight, bias, targets, baseline = example(18, 40, 14, each=True)
    assert bias is not None
    view = (features[::2, 1:31].t().contiguous().t(), weight[2:12, 5:35], bias[::2][:1].expand(10), targets[::2] % 10)
    check((*view, baseline[1::2, ::2][:, :1].expand(9, 30)), device)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(0, 5),
    count=st.integers(0, 130),
    classes=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    each=st.booleans(),
)
def test_property_equals_reference(batch: int, count: int, classes: int, dtype: torch.dtype, each: bool) -> None:
    check(example(batch, count, classes, dtype, each=each), torch.device("cpu"))


def test_a_feature_that_outweighs_the_others_leaves_their_digits(device: torch.device) -> None:
    torch.manual_seed(0)
    arguments = example(6, 20, 10)
    arguments[0][:, 7] = 1e7
    arguments[4][7] = 0
    check(arguments, device)
    loss, _ = linear_ablation_loss(*moved(arguments, device))
    exact, _ = reference.linear_ablation_loss(*moved(arguments, torch.float64))
    assert ((loss.cpu()[7] - exact[7]) / exact[7]).abs().max() < 1e-5


def test_equal_logits_give_the_first_class(device: torch.device) -> None:
    features, weight, _, targets, baseline = example(8, 30, 1)
    _, predicted = linear_ablation_loss(*moved((features, weight.expand(9, 30), None, targets, baseline), device))
    assert (predicted == 0).all()


def test_an_impossible_class_has_no_share(device: torch.device) -> None:
    features, weight, bias, targets, baseline = example(8, 30, 5)
    assert bias is not None
    bias[[0, 3]] = -float("inf")
    arguments = features, weight, bias, targets % 2 + 1, baseline
    loss, predicted = linear_ablation_loss(*moved(arguments, device))
    expected, classes = reference.linear_ablation_loss(*moved(arguments, torch.float64))
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(predicted.cpu(), classes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_gives_what_the_classifier_gives(
    value: float, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    features, weight, bias, targets, baseline = example(6, 70, 10, dtype, each=True)
    features[1, 3] = value  # one, which its baseline replaces
    features[2, [0, 69]] = value  # two, of which one stays
    features[3] = value
    baseline[4, 5] = value
    weight[0, 0] = -abs(weight[0, 0])
    arguments = features, weight, bias, targets, baseline
    loss, predicted = linear_ablation_loss(*moved(arguments, device))
    expected, classes = reference.linear_ablation_loss(*arguments)
    assert torch.equal(loss.cpu().isnan(), expected.isnan())
    assert expected[3, 1].isfinite()
    assert (~expected.isnan()).sum() == 70 * 2 + 1 + 69
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    finite = ~expected.isnan()
    assert torch.equal(predicted.cpu()[finite], classes[finite])
    if value != value:
        assert torch.equal(predicted.cpu(), classes)


def test_threads_agree() -> None:
    arguments = example(9, 300, 40)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(linear_ablation_loss(*arguments))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_logits_of_all_features_are_never_stored() -> None:
    arguments = example(16, 256, 100)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op(*arguments)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    inputs = 8 * (16 * 256 + 100 * 256 + 256 + 100 + 16 * 100)
    assert allocated <= inputs + 12 * 16 * 256 + 4096


def test_the_results_are_detached(device: torch.device) -> None:
    features, weight, bias, targets, baseline = moved(example(3, 4, 5), device)
    features.requires_grad_()
    weight.requires_grad_()
    for function in (linear_ablation_loss, op):
        assert not any(result.requires_grad for result in function(features, weight, bias, targets, baseline))


@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck(batch: int, device: torch.device) -> None:
    features, weight, bias, targets, baseline = moved(example(batch, 6, 5), device)
    torch.library.opcheck(op.default, (features, weight, bias, targets, baseline))
    torch.library.opcheck(op.default, (features.half(), weight.half(), None, targets, features.half()))
    torch.library.opcheck(op.default, (features.clone().requires_grad_(), weight, bias, targets, baseline))
    wide = [t.double() for t in (features, weight, baseline)]
    torch.library.opcheck(op.default, (wide[0], wide[1], None, targets, wide[2]))


def test_compile_fullgraph(device: torch.device) -> None:
    torch._dynamo.reset()
    features, weight, bias, targets, baseline = moved(example(4, 6, 5), device)

    def f(x: Tensor) -> Tensor:
        return linear_ablation_loss(x * 2, weight, bias, targets, baseline)[0].exp()

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(features), f(features))


# errors

GOOD = dict(zip(("features", "weight", "bias", "targets", "baseline"), example(4, 6, 3), strict=True))
BAD = [
    ({"features": torch.ones(4, 6).long()}, TypeError, "features must have dtype float16, .*, got Long"),
    ({"features": torch.ones(4, 6, 1)}, ValueError, r"features must be \[batch, features\], got shape \[4, 6, 1\]"),
    ({"features": None}, TypeError, "features must be a tensor"),
    ({"weight": torch.ones(3, 6).double()}, TypeError, "weight must have dtype Float like features, got Double"),
    ({"weight": torch.ones(3, 5)}, ValueError, r"weight must have shape \[classes, 6\], got \[3, 5\]"),
    ({"weight": torch.ones(3, 6, device="meta")}, ValueError, "weight must be on the device of features"),
    ({"bias": torch.ones(3).half()}, TypeError, "bias must have dtype Float like features, got Half"),
    ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \[3\], got \[4\]"),
    ({"bias": torch.ones(3, 1)}, ValueError, r"bias must have shape \[3\], got \[3, 1\]"),
    ({"targets": torch.ones(4)}, TypeError, "targets must have dtype int64, got Float"),
    ({"targets": None}, TypeError, "targets must be a tensor"),
    ({"targets": torch.arange(3)}, ValueError, r"targets must have shape \[4\], got \[3\]"),
    ({"targets": torch.tensor([0, 1, 3, 2])}, ValueError, r"targets must be in \[0, 3\), got 3"),
    ({"targets": torch.tensor([0, 1, -1, 2])}, ValueError, r"targets must be in \[0, 3\), got -1"),
    ({"weight": torch.ones(0, 6), "bias": None}, ValueError, r"targets must be in \[0, 0\)"),
    ({"baseline": torch.ones(6).double()}, TypeError, "baseline must have dtype Float like features, got Double"),
    ({"baseline": torch.ones(4)}, ValueError, r"baseline must have shape \[6\] or \[4, 6\], got \[4\]"),
    ({"baseline": torch.ones(1, 6)}, ValueError, r"got \[1, 6\]"),
    ({"baseline": 0.0}, TypeError, "baseline"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_refused(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_ablation_loss(**{**GOOD, **change})


@pytest.mark.cuda
def test_cuda_gives_nan_for_a_target_out_of_range() -> None:
    features, weight, bias, targets, baseline = moved(example(4, 6, 3), "cuda")
    expected, classes = linear_ablation_loss(features, weight, bias, targets, baseline)
    bad = targets.clone()
    bad[1], bad[2] = 3, -1
    loss, predicted = linear_ablation_loss(features, weight, bias, bad, baseline)
    assert loss[:, [1, 2]].isnan().all()
    assert torch.equal(loss[:, [0, 3]], expected[:, [0, 3]])
    assert torch.equal(predicted, classes)


@pytest.mark.cuda
def test_cuda_refuses_targets_elsewhere() -> None:
    features, weight, bias, targets, baseline = moved(example(4, 6, 3), "cuda")
    with pytest.raises(ValueError, match="targets must be on the device of features"):
        linear_ablation_loss(features, weight, bias, targets.cpu(), baseline)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu_on_a_side_stream_and_in_a_graph(dtype: torch.dtype) -> None:
    arguments = example(64, 130, 10, dtype)
    expected, classes = linear_ablation_loss(*arguments)
    on_device = moved(arguments, "cuda")
    first = linear_ablation_loss(*on_device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = linear_ablation_loss(*on_device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = linear_ablation_loss(*on_device)
    graph.replay()
    torch.cuda.synchronize()
    for loss, predicted in (first, aside, captured):
        torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(predicted.cpu(), classes)
        assert torch.equal(loss, first[0])
