"""The CUDA kernels against the plain form: emulated on a CPU, and on a GPU where there is one.

The emulation runs the same sources and launch code; it finds wrong indices, missing barriers and
reads outside shared memory, and says nothing about speed.
"""

import ctypes
import mmap
import shutil

import emulation
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmupsample.layers.moments import group_moments, upsampled_group_moments
from fmupsample.ops import backend, cuda, plain, reassemble
from fmupsample.upsamplers.resfu import ReSFU, ReSFUConfig, fused
from fmupsample.upsamplers.resfu.scores import PairedCDC, Workspace

# (B, V, h, w, H, W, K, fractional): whole ratios, odd, unequal, broken and 1:1 ones, single cells,
# every kernel size, channels that do not fill a warp or a tile.
CASES = [
    (2, 5, 3, 4, 42, 56, 3, True),
    (2, 5, 3, 4, 21, 12, 3, False),
    (1, 3, 5, 6, 7, 9, 3, True),
    (1, 2, 4, 5, 4, 5, 5, True),
    (1, 2, 1, 1, 14, 9, 3, True),
    (1, 2, 1, 1, 1, 1, 1, True),
    (1, 20, 3, 5, 24, 40, 7, True),
    (1, 20, 3, 5, 24, 40, 7, False),
    (1, 20, 3, 5, 24, 40, 5, True),
    (1, 33, 3, 5, 24, 40, 5, False),
    (1, 3, 3, 5, 24, 40, 1, False),
    (1, 70, 3, 4, 33, 43, 3, True),
    (1, 140, 2, 3, 32, 48, 3, False),
    (1, 4, 2, 2, 80, 66, 3, True),
]
ROUNDING = {
    torch.float64: 2**-48,
    torch.float32: 2**-19,
    torch.float16: 2**-9,
    torch.bfloat16: 2**-6,
}


@pytest.fixture(scope="session")
def emulated(request):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the CPU with")
    return emulation.Emulation(emulation.build(request.config.cache.mkdir("emulated")))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Makes the operators use the kernels; a device for the tensors."""
    if request.param == "cuda":
        assert backend.compiled(torch.device("cuda")), "the extension does not load"
        yield torch.device("cuda")
        return
    emulator = request.getfixturevalue("emulated")
    monkeypatch.setattr(cuda, "_NAMESPACE", emulation.NAMESPACE)
    monkeypatch.setattr("fmupsample.ops.reassembly.implementation", lambda device: cuda)
    yield torch.device("cpu")
    emulator.set_order(0)
    emulator.set_capability(90)


def draw(case, dtype, device):
    b, v, h, w, height, width, k, _ = case
    generator = torch.Generator().manual_seed(sum(case))
    value = torch.randn(b, v, h, w, generator=generator, dtype=torch.float64)
    weights = torch.randn(b, k * k, height, width, generator=generator, dtype=torch.float64)
    grad = torch.randn(b, v, height, width, generator=generator, dtype=torch.float64)
    weights = weights.softmax(1).to(dtype if dtype == torch.float64 else torch.float32)
    return value.to(device, dtype), weights.to(device), grad.to(device, dtype)


def assert_near(got, want, dtype):
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max()
    assert error <= ROUNDING[dtype] * max(1.0, want.abs().max().item()), error


def check(case, dtype, device):
    value, weights, grad = draw(case, dtype, device)
    *_, h, w, _, _, k, fractional = case
    exact = (value.double(), weights.double(), grad.double())
    want = plain.reassemble(*exact[:2], fractional)
    assert_near(cuda.reassemble(value, weights, fractional), want, dtype)
    last = value.to(memory_format=torch.channels_last)
    if not last.is_contiguous():
        got = cuda.reassemble(last, weights, fractional)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_near(got, want, dtype)
    got = cuda.grad_value(grad, weights, h, w, fractional)
    assert got.dtype == dtype
    assert_near(got, plain.grad_value(exact[2], exact[1], h, w, fractional), dtype)
    got = cuda.grad_weights(grad, value, k, fractional)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    want = plain.grad_weights(exact[2], exact[0], k, fractional)
    assert_near(got, want, torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_kernels_match_the_plain_form(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("case", CASES[:3] + CASES[-2:], ids=str)
def test_the_order_of_threads_does_not_show(case, order, device, emulated):
    emulated.set_order(order)
    check(case, torch.float32, device)
    check(case, torch.bfloat16, device)


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.floats(1, 18), st.floats(1, 18)),
    st.sampled_from([1, 3, 5, 7]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_size_and_ratio(emulated, cells, ratio, k, fractional, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_NAMESPACE", emulation.NAMESPACE)
        size = tuple(max(n, round(n * r)) for n, r in zip(cells, ratio, strict=True))
        check((1, 3, *cells, *size, k, fractional), dtype, torch.device("cpu"))


def test_devices_without_the_tensor_core_instructions(device, emulated):
    emulated.set_capability(75)
    for case in (CASES[0], CASES[7], CASES[11]):
        check(case, torch.float16, device)


def test_tensor_cores_round_like_plain_products(device):
    """Same inputs in bfloat16: at most twice the error of the plain form, both against float64."""
    case = (1, 64, 4, 4, 56, 56, 3, True)
    value, weights, _ = draw(case, torch.bfloat16, device)
    exact = plain.reassemble(value.double(), weights.double(), True)
    ours, theirs = (
        (f(value, weights, True).double() - exact).square().mean().sqrt()
        for f in (cuda.reassemble, plain.reassemble)
    )
    assert ours <= 2 * theirs


def test_gradients_through_the_public_operator(device):
    value, weights, grad = draw((1, 2, 1, 2, 2, 4, 3, True), torch.float64, device)
    inputs = value.requires_grad_(), weights.requires_grad_()
    assert torch.autograd.gradcheck(reassemble, inputs)
    out = reassemble(*inputs)
    firsts = torch.autograd.grad(out, inputs, grad.requires_grad_(), create_graph=True)
    seconds = torch.autograd.grad(sum(t.square().sum() for t in firsts), (*inputs, grad))
    assert all(torch.isfinite(t).all() for t in seconds)


def test_strides_do_not_matter(device):
    value, weights, grad = draw(CASES[0], torch.float32, device)
    for other in (
        torch.stack([value, value], -1)[..., 1],
        value.flip(3).flip(3),
        value.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        torch.testing.assert_close(
            cuda.reassemble(other, weights, True),
            cuda.reassemble(value, weights, True),
            atol=0,
            rtol=0,
        )
    spread = weights.to(memory_format=torch.channels_last)
    shown = grad.to(memory_format=torch.channels_last)
    for got, want in (
        (cuda.reassemble(value, spread, True), cuda.reassemble(value, weights, True)),
        (cuda.grad_value(shown, spread, 3, 4, True), cuda.grad_value(grad, weights, 3, 4, True)),
        (cuda.grad_weights(shown, value, 3, True), cuda.grad_weights(grad, value, 3, True)),
    ):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


def guarded(tensor):
    """A copy that ends where a page begins that must not be touched."""
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    length = -(-size // page) * page
    memory = mmap.mmap(-1, length + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + length), page, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, offset=length - size, count=tensor.numel())
    return copy.view_as(tensor).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_read_outside_the_maps(dtype, device):
    if device.type == "cuda":
        pytest.skip("compute-sanitizer does this on a GPU")
    for case in CASES:
        value, weights, grad = (guarded(t) for t in draw(case, dtype, device))
        cuda.reassemble(value, weights, case[-1])
        cuda.grad_value(grad, weights, case[2], case[3], case[-1])
        cuda.grad_weights(grad, value, case[-2], case[-1])


def test_empty_and_unserved_cases(device):
    weights = torch.rand(0, 9, 4, 6, device=device)
    value = torch.rand(0, 3, 2, 3, device=device)
    assert cuda.reassemble(value, weights, True).shape == (0, 3, 4, 6)
    assert cuda.grad_value(weights[:, :3], weights, 2, 3, True).shape == (0, 3, 2, 3)
    none = torch.rand(2, 0, 2, 3, device=device)
    weights = torch.rand(2, 9, 4, 6, device=device)
    assert cuda.grad_weights(none.new_empty(2, 0, 4, 6), none, 3, True).abs().sum() == 0
    check((1, 2, 3, 3, 12, 12, 9, True), torch.float32, device)  # K = 9: plain PyTorch


@pytest.mark.parametrize(
    ("value", "weights"),
    [((1, 3, 4, 4), (2, 9, 8, 8)), ((1, 3, 4, 4), (1, 8, 8, 8)), ((1, 3, 9, 4), (1, 9, 8, 8))],
)
def test_what_would_read_outside_is_refused(value, weights, device):
    with pytest.raises(RuntimeError, match="fmupsample"):
        cuda.reassemble(torch.rand(value, device=device), torch.rand(weights, device=device), True)


@pytest.mark.gpu
def test_results_repeat_bit_for_bit():
    value, weights, grad = draw((2, 48, 9, 9, 126, 126, 3, True), torch.float32, "cuda")
    first, second = (
        (
            cuda.reassemble(value, weights, True),
            cuda.grad_value(grad, weights, 9, 9, True),
            cuda.grad_weights(grad, value, 3, True),
        )
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_other_streams():
    value, weights, _ = draw((1, 64, 16, 16, 224, 224, 3, True), torch.float32, "cuda")
    want = cuda.reassemble(value, weights, True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = value * 1  # not ready before the sleep is over
        got = cuda.reassemble(late, weights, True)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
def test_more_elements_than_32_bits_count(last):
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free memory")
    value = torch.randn(1, 2304, 70, 70, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(1, 9, 980, 980, device="cuda").softmax(1)
    if last:
        value = value.to(memory_format=torch.channels_last)
    out = cuda.reassemble(value, weights, True)
    assert out.numel() > 2**31
    tail = plain.reassemble(value[:, -8:].contiguous(), weights, True)
    assert_near(out[:, -8:], tail, torch.bfloat16)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("size", [(21, 37), (14, 14), (5, 130)])
def test_fused_scores_match_the_strips(size, order, device, emulated, monkeypatch):
    emulated.set_order(order)
    torch.manual_seed(0)
    pair = PairedCDC(32, 128, 4, 8, 3).requires_grad_(False)
    for parameter in pair.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    pair = pair.to(device)
    query, key = torch.randn(2, 2, 32, *size, device=device)
    low = torch.randn(2, 32, *(max(1, n // 7) for n in size), device=device)
    for keys in (
        pair.full_keys(key, group_moments(key, 8), (7, 5)),
        pair.upsampled_keys(low, upsampled_group_moments(low, size, 8), size),
    ):
        answers = []
        for answer in (False, True):
            monkeypatch.setattr(fused, "serves", lambda *_, answer=answer: answer)
            answers.append(pair(keys, query, Workspace()))
        torch.testing.assert_close(*answers, atol=2e-5, rtol=1e-5)


def test_whole_head_through_the_kernels(device, monkeypatch):
    """A ReSFU with the kernels wherever they serve, against float64 without them."""
    torch.manual_seed(0)
    head = ReSFU(ReSFUConfig(channels=24)).to(device).requires_grad_(False)
    x = torch.randn(1, 24, 3, 4, device=device)
    image = torch.randn(1, 3, 42, 56, device=device)
    monkeypatch.setattr(fused, "serves", lambda *_: False)
    exact = head.double()(x.double(), image.double())
    calls = []
    monkeypatch.setattr(fused, "serves", lambda *a: calls.append(a) or fused.fits(a[0], a[2]))
    got = head.float()(x, image)
    assert len(calls) == 2
    assert (got.double() - exact).abs().max() < 2e-5


def test_shapes_without_a_fused_kernel_are_refused(device):
    query = torch.rand(1, 16, 4, 4, device=device)
    low = torch.rand(1, 128, 4, 4, device=device)
    rest = [torch.rand(3, device=device)] * 5
    with pytest.raises(RuntimeError, match="fmupsample"):
        cuda.partial_scores(query, None, (1, 1), low, None, *rest)
