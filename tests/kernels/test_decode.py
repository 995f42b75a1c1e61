"""Decode attention against its float64 reference on the dequantised cache."""

import random

import pytest
import torch

from kernels import decode
from kernels.decode import reference
from kernels.decode.config import Split
from kernel_caches import BEST, CUDA, DEVICE, error, make_tier

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
LONG = 8 if CUDA else 1  # the interpreter takes a second per fifty tiles


def check(q, tiers, dtype=None, **options):
    """Compare every output of the Triton path with float64, with poisoned scratch."""
    scale = q.shape[-1] ** -0.5
    torch.manual_seed(0)
    got = decode.attend(q, tiers, scale, impl=BEST, **options)
    options.pop("want_entropy", None)
    options.pop("weights_as", None)
    out, lse, entropy, mass = reference.attend(q, tiers, scale, **options)
    limit = TOLERANCE[dtype or q.dtype]
    assert error(got.out, out) <= limit
    seen = torch.isfinite(lse)
    assert torch.equal(torch.isfinite(got.lse).cpu(), seen.cpu())
    if seen.any():
        assert (got.lse.double() - lse)[seen].abs().max() <= max(2 * limit, 1e-5) * max(1.0, lse[seen].abs().max())
    assert (got.out[~seen] == 0).all()
    if got.entropy is not None:
        assert (got.entropy.double() - entropy).abs().max() <= 0.02
    for g, w, t in zip(got.mass, mass, tiers):
        for s, n in zip(t.start.tolist(), t.length.tolist()):
            assert error(g[s : s + n], w[s : s + n]) <= 2 * limit or n == 0


def case(bits, lengths, dim, group, dtype=torch.float16, **kw):
    generator = torch.Generator().manual_seed(bits * 1000 + dim + group)
    tier = make_tier(bits, lengths, dim, dtype=dtype, device=DEVICE, generator=generator, **kw)
    q = torch.randn(1, len(lengths) * group, dim, generator=generator).to(DEVICE, dtype)
    return q, tier


@pytest.mark.parametrize("dtype,dim,group", [
    (dtype, *shape) for n, shape in enumerate([(64, 3), (80, 1), (96, 4), (128, 8), (256, 2)])
    for m, dtype in enumerate([torch.float16, torch.float32] + ([torch.bfloat16] if CUDA else [])) if CUDA or (n + m) % 2 == 0
])
def test_sixteen_bits(dtype, dim, group):
    q, tier = case(16, [67 * LONG, 0, 1], dim, group, dtype, spare=3)
    check(q, [tier])


@pytest.mark.parametrize("bits,dim,g,group", [
    (4, 128, 64, 4), (4, 128, 128, 1), (4, 128, 32, 8), (8, 128, 64, 4), (2, 128, 64, 4), (4, 64, 64, 3),
    (8, 64, 64, 3), (2, 64, 64, 3), (2, 64, 32, 3), (4, 80, 80, 5), (4, 96, 32, 2), (2, 256, 64, 4), (8, 256, 128, 2),
    (2, 80, 16, 1),
])
def test_affine_tokens(bits, dim, g, group):
    q, tier = case(bits, [37 * LONG, 0, 5], dim, group, channels=g)
    check(q, [tier])


@pytest.mark.parametrize("bits,dim", [(4, 128), (2, 64), (8, 128), (4, 96)])
@pytest.mark.parametrize("kind", ["block", "gather"])
def test_per_channel_keys(bits, dim, kind):
    q, tier = case(bits, [65 * LONG, 32, 0], dim, 4, kind=kind, channels=32)
    check(q, [tier])


@pytest.mark.parametrize("bits,kind", [(4, "levels"), (2, "levels"), (8, "fp8")])
@pytest.mark.parametrize("dim", [64, 128])
def test_tables_and_float8(bits, kind, dim):
    q, tier = case(bits, [50 * LONG, 17], dim, 4, kind=kind)
    check(q, [tier])


def test_float32_queries_are_exact():
    q, tier = case(4, [45, 20], 64, 2, torch.float32, channels=32)
    check(q, [tier])


def test_group_of_sixteen():
    q, tier = case(4, [45], 128, 16, channels=64)
    check(q, [tier])


def test_tiers_join_in_one_softmax():
    generator = torch.Generator().manual_seed(5)
    lengths = {16: [33 * LONG, 5, 0, 0], 8: [0, 40, 0, 3], 4: [65 * LONG, 31, 0, 1], 2: [100, 0, 0, 64]}
    tiers = [make_tier(b, n, 64, channels=32, spare=2, device=DEVICE, generator=generator) for b, n in lengths.items()]
    q = torch.randn(2, 6, 64, generator=generator).to(DEVICE, torch.float16)
    check(q, tiers, want_mass=True, want_entropy=True)
    check(q, tiers, torch.bfloat16, want_mass=True, want_entropy=True, weights_as="bytes")


def test_more_parts_than_a_merge_takes_at_once():
    """Output, entropy and mass, by 66 programs of one tile each; some of the second lane's have nothing to read."""
    pytest.importorskip("triton")
    from kernels.decode.launch import run

    q, tier = case(4, [2090, 40], 64, 2, channels=64)
    out, lse, entropy, mass = reference.attend(q, [tier], 0.125, want_mass=True)
    for kept in ("bytes", "halves"):
        got = run(q, [tier], 0.125, None, None, None, True, True, plans=[Split(32, 1, 1, None, 32)], weights_as=kept)
        assert error(got.out, out) <= 2e-3 and error(got.lse, lse) <= 1e-3 and error(got.entropy, entropy) <= 5e-3
        assert error(got.mass[0], mass[0]) <= 1e-2


@pytest.mark.parametrize("bits,lengths", [
    (16, [1, 0, 31, 70 * LONG]), (16, [1040, 3]), (4, [1, 0, 31, 33, 70 * LONG]), (4, [1040]),
])
def test_weights_kept_as_bytes(bits, lengths):
    """Within half a step of the largest weight of their tile, nothing lost where weights differ by many powers of two."""
    q, tier = case(bits, lengths, 64, 3, **({} if bits == 16 else {"channels": 64}))
    tier.bias = torch.linspace(-60, 60, tier.slots, device=DEVICE)
    check(q, [tier], torch.bfloat16, want_mass=True, weights_as="bytes")
    tier.bias = -tier.bias
    check(q, [tier], torch.bfloat16, want_mass=True, weights_as="bytes")
    if CUDA or tier.capacity < 1024:  # a threshold knows nothing of blocks of 1024
        check(q, [tier], torch.bfloat16, threshold=torch.full((3 * len(lengths),), 1e9, device=DEVICE), want_mass=True,
              weights_as="bytes")


@pytest.mark.parametrize("bits", [16, 4])
def test_options(bits):
    generator = torch.Generator().manual_seed(7)
    tier = make_tier(bits, [75, 0, 40], 64, channels=64, device=DEVICE, generator=generator)
    q = torch.randn(1, 9, 64, generator=generator).to(DEVICE, torch.float16)
    tier.bias = torch.randn(tier.slots, generator=generator).to(DEVICE)
    sink = torch.randn(9, generator=generator).to(DEVICE)
    check(q, [tier], softcap=2.0, sink=sink, want_mass=True, want_entropy=True)
    check(q, [tier], torch.bfloat16, softcap=2.0, sink=sink, want_mass=True, want_entropy=True, weights_as="bytes")
    tier.bias = torch.randn(3, tier.slots, generator=generator).to(DEVICE)
    check(q, [tier], threshold=torch.full((9,), 0.3, device=DEVICE))
    check(q, [tier], threshold=torch.full((9,), 1e9, device=DEVICE), want_mass=True)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("kept", ["bytes", "halves"])
def test_keys_that_a_bias_hides_for_good(bits, kept):
    """A logit of -inf has no weight, no mass, and no part in the entropy; a lane of nothing else reads nothing."""
    generator = torch.Generator().manual_seed(13)
    tier = make_tier(bits, [70, 40, 33], 64, channels=64, device=DEVICE, generator=generator)
    q = torch.randn(1, 9, 64, generator=generator).to(DEVICE, torch.float16)
    tier.bias = torch.randn(tier.slots, generator=generator).to(DEVICE)
    first, second, _ = tier.start.tolist()
    tier.bias[first + 20 : first + 65] = -torch.inf
    tier.bias[second : second + 40] = -torch.inf
    check(q, [tier], torch.bfloat16, want_mass=True, want_entropy=True, weights_as=kept)


@pytest.mark.parametrize("kept", [None, "bytes", "halves"])
def test_gated_heads(kept):
    """Outputs are multiplied, whichever launch merges them; nothing else changes."""
    q, tier = case(16, [40, 9], 64, 3)
    gate = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.0], device=DEVICE)
    more = dict(want_mass=kept is not None, weights_as=kept)
    plain = decode.attend(q, [tier], 0.125, impl="triton", **more)
    for impl in ("triton", "torch"):
        got = decode.attend(q, [tier], 0.125, impl=impl, gate=gate, **more)
        assert error(got.out, plain.out.float() * gate[:, None]) < 3e-3 and (got.out[:, [0, 5]] == 0).all()
        assert error(got.lse, plain.lse) < 1e-3


def test_rotated_tier_beside_a_plain_one():
    generator = torch.Generator().manual_seed(9)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0].to(DEVICE)
    rotated = make_tier(4, [40, 20], 64, kind="levels", device=DEVICE, generator=generator)
    rotated.rotation = turn
    plain = make_tier(16, [20, 3], 64, device=DEVICE, generator=generator)
    q = torch.randn(1, 4, 64, generator=generator).to(DEVICE, torch.float16)
    check(q, [plain, rotated])


def test_nothing_outside_the_lane_is_read_and_all_outputs_are_written():
    q, tier = case(16, [31, 0, 7], 64, 2, spare=40)  # NaN in every spare slot
    check(q, [tier], want_mass=True, want_entropy=True)


def test_large_values_survive_float16():
    q, tier = case(4, [40, 40], 128, 4, channels=64)
    check(q * 300, [tier])
    tier.v_scale *= 64
    tier.v_zero *= 64
    check(q / 300, [tier])


def test_torch_path_matches_reference():
    q, tier = case(4, [40, 0], 64, 2, torch.float32, channels=64)
    got = decode.attend(q, [tier], 0.125, impl="torch", want_mass=True, want_entropy=True)
    out, lse, entropy, mass = reference.attend(q, [tier], 0.125, want_mass=True)
    assert error(got.out, out) < 1e-5 and error(got.entropy, entropy) < 1e-5 and error(got.mass[0], mass[0]) < 1e-5


@pytest.mark.parametrize("trial", range(24 if CUDA else 2))
def test_random_shapes(trial):
    rng = random.Random(trial)
    dim, group = rng.choice([64, 80, 96, 128, 256]), rng.randint(1, 8)
    generator = torch.Generator().manual_seed(trial)
    lanes = rng.randint(1, 4)
    tiers = []
    for bits in rng.sample([16, 8, 4, 2], rng.randint(1, 3)):
        lengths = [rng.choice([0, 1, 15, 16, 17, 31, 127] + ([500, 2049] if CUDA else [])) for _ in range(lanes)]
        g = rng.choice([g for g in (16, 32, 64, dim) if dim % g == 0])
        tiers.append(make_tier(bits, lengths, dim, channels=g, device=DEVICE, generator=generator, spare=1))
    q = torch.randn(1, lanes * group, dim, generator=generator).to(DEVICE, torch.float16)
    check(q, tiers, want_mass=True, want_entropy=True)


def test_shapes_that_do_not_fit_are_refused():
    q, tier = case(4, [8, 8], 64, 2)
    with pytest.raises(ValueError, match="lanes"):
        decode.attend(q[:, :3], [tier], 1.0)
    with pytest.raises(ValueError, match="channels"):
        decode.attend(q[..., :32], [tier], 1.0)


@pytest.mark.gpu
def test_captured_graph_follows_lengths():
    q, tier = case(4, [500, 300], 128, 4, channels=64)
    decode.attend(q, [tier], 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode.attend(q, [tier], 0.1, want_mass=True)
    for lengths in ([500, 300], [17, 0], [250, 299]):
        tier.length.copy_(torch.tensor(lengths, dtype=torch.int32))
        got.out.fill_(torch.nan)
        graph.replay()
        assert error(got.out, reference.attend(q, [tier], 0.1)[0]) < 2e-3


@pytest.mark.gpu
def test_the_merge_waits_for_every_tier():
    """Launches of tiers overlap, and the last of them ends long before the first: with a query that changes between
    replays, a merge that started early would join parts of the replay before."""
    generator = torch.Generator().manual_seed(3)
    lengths = {16: [60000, 40000], 8: [7, 0], 4: [0, 3], 2: [1, 1]}
    tiers = [make_tier(b, n, 64, channels=64, device=DEVICE, generator=generator) for b, n in lengths.items()]
    q = torch.zeros(1, 8, 64, device=DEVICE, dtype=torch.float16)
    decode.attend(q, tiers, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode.attend(q, tiers, 0.125)
    for _ in range(5):
        q.copy_(torch.randn(q.shape, generator=generator))
        graph.replay()
        assert error(got.out, reference.attend(q, tiers, 0.125)[0]) < 2e-3


@pytest.mark.gpu
def test_bfloat16_queries_and_long_diffuse_attention():
    q, tier = case(4, [32768, 20000], 128, 4, channels=64)
    check(q.bfloat16(), [tier], want_mass=True, want_entropy=True)
    check(q, [tier])


@pytest.mark.parametrize("bits,kind", [(16, "token"), (4, "token"), (8, "fp8"), (2, "block")])
def test_lanes_of_several_samples_may_point_to_the_same_slots(bits, kind):
    """One prompt's entries held once: lanes of three samples alias them, and each has rows of its own besides."""
    samples, heads, dim, group = 3, 2, 64, 3
    extra = {} if bits == 16 else dict(kind=kind, channels=32)
    generator = torch.Generator().manual_seed(bits)
    prompt = make_tier(bits, [45, 64], dim, device=DEVICE, generator=generator, **extra)
    copies = torch.cat([torch.arange(s, s + n) for s, n in zip(prompt.start.tolist(), prompt.length.tolist())] * samples)
    k, v = reference.dequantise(prompt, copies.to(DEVICE), torch.float32)
    prompt.start, prompt.length = prompt.start.repeat(samples), prompt.length.repeat(samples)
    own = make_tier(16, [5, 0, 7, 1, 3, 2], dim, device=DEVICE, generator=generator)
    q = torch.randn(samples, heads * group, dim, generator=generator).to(DEVICE, torch.float16)
    check(q, [prompt, own])
    lengths = prompt.length.tolist()
    ends = torch.tensor(lengths).cumsum(0)
    apart = decode.TierView(
        16, k, v, (ends - torch.tensor(lengths)).int().to(DEVICE), prompt.length, max(lengths))
    got, want = (decode.attend(q.float(), tiers, 0.125, impl="torch") for tiers in ([prompt, own], [apart, own]))
    assert torch.allclose(got.out, want.out, atol=1e-5) and torch.allclose(got.lse, want.lse, atol=1e-5)
