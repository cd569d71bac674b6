"""CLIP's image towers; the ResNet against one written in torch.nn with the names of the released weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax.models.nets import platforms
from dalle2_jax.models.nets.vision import FrozenBatchNorm, ModifiedResNet, Patches, ViT

KEY = jax.random.key(0)


def test_vit_sees_every_patch_and_its_place():
    net = ViT(patch_size=4, width=8, depth=1, num_heads=2, embed_dim=5)
    draw = np.random.default_rng(0)
    image = draw.standard_normal((2, 8, 8, 3)).astype(np.float32)
    shapes = jax.eval_shape(net.init, KEY, image)["params"]
    params = jax.tree.map(lambda x: draw.standard_normal(x.shape).astype(np.float32), shapes)
    assert params["position"]["embedding"].shape == (5, 8)  # four patches and the class token
    assert "bias" not in params["patch_embedding"] and "bias" not in params["proj"]
    apply = functools.partial(jax.jit(net.apply), {"params": params})
    embed = apply(image)
    assert embed.shape == (2, 5) and embed.dtype == jnp.float32
    for y in (0, 4):
        for x in (0, 4):
            other = image.copy()
            other[:, y : y + 4, x : x + 4] = draw.standard_normal((2, 4, 4, 3))
            assert np.abs(embed - apply(other)).max() > 1e-4
    assert np.abs(embed - apply(np.roll(image, 4, axis=1))).max() > 1e-4


def test_the_gradient_by_the_patches_kernel_is_not_transposed_on_cpus():
    """It is a product of `nets.cpu`, and what it was: a convolution."""
    patches, draw = Patches(size=4, width=8), np.random.default_rng(0)
    image = draw.standard_normal((2, 8, 12, 3)).astype(np.float32)
    shapes = jax.eval_shape(patches.init, KEY, image)
    params = jax.tree.map(lambda x: draw.standard_normal(x.shape).astype(np.float32), shapes)

    def products(target):
        with platforms.assumed(platforms.Target(target)):
            return str(jax.make_jaxpr(lambda p: patches.apply(p, image))(params)).count("custom_vjp_call")

    assert (products("cpu"), products("tpu")) == (1, 0)
    kernel = params["params"]["kernel"]
    expected = jax.lax.conv_general_dilated(
        image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    found = jax.jit(patches.apply)(params, image)
    np.testing.assert_allclose(found, expected.reshape(2, 6, 8), atol=1e-5)


@pytest.mark.parametrize("depths, positions", [((1,), 64), ((1, 1, 1), 4)])
def test_resnet_takes_any_number_of_stages(depths, positions):
    net = ModifiedResNet(width=8, depths=depths, num_heads=2, embed_dim=5)
    abstract = jax.eval_shape(net.init, KEY, jnp.zeros((1, 32, 32, 3)))["params"]
    assert abstract["pool"]["position"]["embedding"].shape == (positions + 1, 4 * 8 * 2 ** (len(depths) - 1))


def test_an_unknown_norm_is_refused():
    net = ModifiedResNet(width=8, depths=(1,), num_heads=2, embed_dim=5, norm="batch")
    with pytest.raises(ValueError, match="norm 'batch' is unknown; choose 'group'"):
        jax.eval_shape(net.init, KEY, jnp.zeros((1, 8, 8, 3)))


def test_frozen_statistics_receive_no_gradient():
    norm = FrozenBatchNorm()
    x = np.random.default_rng(0).standard_normal((4, 2, 2, 3)).astype(np.float32)
    params = jax.jit(norm.init)(KEY, x)["params"]
    grads = jax.jit(jax.grad(lambda p: jnp.square(norm.apply({"params": p}, x)).sum()))(params)
    assert all(np.abs(grads[name]).max() > 0 for name in ("scale", "bias"))
    assert all(np.abs(grads[name]).max() == 0 for name in ("mean", "var"))


def torch_resnet(torch, width, depths, heads, embed_dim, image_size):
    """The ResNet of the CLIP paper in torch.nn, named as OpenAI's checkpoints are; random, in eval mode."""
    nn = torch.nn

    class Bottleneck(nn.Module):
        def __init__(self, inputs, planes, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
            self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
            self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
            self.pool = nn.AvgPool2d(stride)
            self.downsample = None
            if stride > 1 or inputs != 4 * planes:
                skip = nn.Conv2d(inputs, 4 * planes, 1, bias=False)
                self.downsample = nn.Sequential(nn.AvgPool2d(stride), skip, nn.BatchNorm2d(4 * planes))

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = self.pool(torch.relu(self.bn2(self.conv2(y))))
            y = self.bn3(self.conv3(y))
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            half = width // 2
            self.conv1, self.bn1 = (
                nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(half),
            )
            self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
            self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.stages, inputs = nn.ModuleList(), width
            for stage, depth in enumerate(depths):
                planes, blocks = width * 2**stage, nn.ModuleList()
                for j in range(depth):
                    blocks.append(Bottleneck(inputs, planes, 2 if stage and not j else 1))
                    inputs = 4 * planes
                self.stages.append(blocks)
            side = image_size // 2 ** (len(depths) + 1)
            self.position = nn.Parameter(torch.randn(side**2 + 1, inputs))
            self.attention = nn.MultiheadAttention(inputs, heads)
            self.c_proj = nn.Linear(inputs, embed_dim)

        def forward(self, x):
            for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
                x = torch.relu(bn(conv(x)))
            x = nn.functional.avg_pool2d(x, 2)
            for blocks in self.stages:
                for block in blocks:
                    x = block(x)
            x = x.flatten(2).permute(2, 0, 1)
            x = torch.cat([x.mean(dim=0, keepdim=True), x]) + self.position[:, None]
            # c_proj takes the place of the attention's own output projection, which is the identity.
            return self.c_proj(self.attention(x[:1], x, x)[0][0])

    torch.manual_seed(0)
    model = ResNet().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.weight.normal_()
                module.bias.normal_()
        model.attention.in_proj_bias.normal_()
        model.attention.out_proj.weight.copy_(torch.eye(model.c_proj.in_features))
    return model


def from_torch(model):
    def numpy(x):
        return x.detach().numpy()

    def conv(layer):
        return {"kernel": numpy(layer.weight).transpose(2, 3, 1, 0)}

    def bn(layer):
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        return {ours: numpy(getattr(layer, theirs)) for ours, theirs in names.items()}

    def three(module):
        convs = {f"conv{i}": conv(getattr(module, f"conv{i}")) for i in (1, 2, 3)}
        return convs | {f"norm{i}": bn(getattr(module, f"bn{i}")) for i in (1, 2, 3)}

    params = three(model)
    for stage, blocks in enumerate(model.stages):
        for j, block in enumerate(blocks):
            params[f"stage_{stage}_block_{j}"] = three(block)
            if block.downsample is not None:
                skip = {"conv_skip": conv(block.downsample[1]), "norm_skip": bn(block.downsample[2])}
                params[f"stage_{stage}_block_{j}"] |= skip
    width = model.c_proj.in_features
    weight, bias = numpy(model.attention.in_proj_weight).T, numpy(model.attention.in_proj_bias)
    params["pool"] = {
        "position": {"embedding": numpy(model.position)},
        "q": {"kernel": weight[:, :width], "bias": bias[:width]},
        "kv": {"kernel": weight[:, width:], "bias": bias[width:]},
        "out": {"kernel": numpy(model.c_proj.weight).T, "bias": numpy(model.c_proj.bias)},
    }
    return params


def test_resnet_equals_torch():
    torch = pytest.importorskip("torch", reason="the oracle is written in torch.nn")
    model = torch_resnet(torch, width=4, depths=(2, 1), heads=4, embed_dim=5, image_size=16)
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(image.transpose(0, 3, 1, 2))).numpy()
    net = ModifiedResNet(width=4, depths=(2, 1), num_heads=4, embed_dim=5, norm="frozen_batch")
    actual = jax.jit(net.apply)({"params": from_torch(model)}, image)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=1e-4)
