"""Torch modules with the parameters' names and the arithmetic of OpenAI's ADM code: small oracles.

Written from the papers (ADM, arXiv 2105.05233, appendix; GLIDE, arXiv 2112.10741) and the list of tensors in
released files. Attention has queries, keys and values head by head, those of the context first.
"""

import math

import torch
from torch import nn

HEAD_DIM = 64


def sinusoids(t, dim):
    half = dim // 2
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def group_norm(channels):
    return nn.GroupNorm(32, channels)


class Res(nn.Module):
    def __init__(self, before, after, emb, scale_shift, resample=""):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(group_norm(before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, after * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            group_norm(after), nn.SiLU(), nn.Dropout(0), nn.Conv2d(after, after, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def resampled(self, x):
        if self.resample == "up":
            return nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        return nn.functional.avg_pool2d(x, 2) if self.resample else x

    def forward(self, x, emb, context):
        h = self.in_layers[2](self.resampled(self.in_layers[:2](x)))
        added = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            scale, shift = added.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + added)
        return self.skip_connection(self.resampled(x)) + h


def heads_of(x, parts, dim=HEAD_DIM, blocks=False):
    """[B, H * parts * D, N] as `parts` tensors [B, H, D, N]; `blocks`: [B, parts * H * D, N]."""
    if blocks:
        return [part.unflatten(1, (-1, dim)) for part in x.chunk(parts, dim=1)]
    return x.reshape(len(x), -1, parts, dim, x.shape[-1]).unbind(2)


def attend(q, k, v):
    weights = (torch.einsum("bhdn,bhdm->bhnm", q, k) / q.shape[2] ** 0.5).softmax(-1)
    return torch.einsum("bhnm,bhdm->bhdn", weights, v).flatten(1, 2)


class Attention(nn.Module):
    def __init__(self, channels, context_width, num_heads=0, blocks=False):
        super().__init__()
        self.dim, self.blocks = channels // num_heads if num_heads else HEAD_DIM, blocks
        self.norm, self.qkv = group_norm(channels), nn.Conv1d(channels, 3 * channels, 1)
        if context_width:
            self.encoder_kv = nn.Conv1d(context_width, 2 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, emb, context):
        flat = x.flatten(2)
        q, k, v = heads_of(self.qkv(self.norm(flat)), 3, self.dim, self.blocks)
        if context is not None:
            text_k, text_v = heads_of(self.encoder_kv(context), 2, self.dim, self.blocks)
            k, v = torch.cat([text_k, k], -1), torch.cat([text_v, v], -1)
        return x + self.proj_out(attend(q, k, v)).reshape(x.shape)


class Halve(nn.Module):
    """Improved DDPM's: a convolution of stride 2."""

    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb, context):
        return self.op(x)


class Double(nn.Module):
    """Improved DDPM's: nearest neighbours, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb, context):
        return self.conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))


class Block(nn.Sequential):
    def forward(self, x, emb, context):
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb, context)
        return x


class UNet(nn.Module):
    """guided-diffusion's UNetModel; `attends`: levels with attention, `context_width`: of what they read.

    num_heads: in the place of heads of HEAD_DIM; blocks: queries, keys and values in blocks; classes: added;
    by_convs: convolutions halve and double the side.
    """

    def __init__(
        self,
        c_in,
        c_out,
        channels,
        mult,
        depth,
        attends=(),
        scale_shift=True,
        context_width=0,
        num_heads=0,
        blocks=False,
        classes=0,
        by_convs=False,
    ):
        super().__init__()
        self.channels, emb = channels, 4 * channels
        if classes:
            self.label_emb = nn.Embedding(classes, emb)
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        mult = [int(channels * factor) for factor in mult]
        now = mult[0]
        self.input_blocks, skips = nn.ModuleList([Block(nn.Conv2d(c_in, now, 3, padding=1))]), [now]

        def layers(before, after, level):
            attention = [Attention(after, context_width, num_heads, blocks)] if level in attends else []
            return [Res(before, after, emb, scale_shift), *attention]

        for level, after in enumerate(mult):
            for _ in range(depth):
                self.input_blocks.append(Block(*layers(now, after, level)))
                now = after
                skips.append(now)
            if level < len(mult) - 1:
                down = Halve(now) if by_convs else Res(now, now, emb, scale_shift, "down")
                self.input_blocks.append(Block(down))
                skips.append(now)
        middle = [Attention(now, context_width, num_heads, blocks)] if attends else []
        self.middle_block = Block(Res(now, now, emb, scale_shift), *middle, Res(now, now, emb, scale_shift))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(mult))):
            for j in range(depth + 1):
                own = layers(now + skips.pop(), mult[level], level)
                now = mult[level]
                if level and j == depth:
                    own.append(Double(now) if by_convs else Res(now, now, emb, scale_shift, "up"))
                self.output_blocks.append(Block(*own))
        self.out = nn.Sequential(group_norm(now), nn.SiLU(), nn.Conv2d(now, c_out, 3, padding=1))

    def embed(self, t):
        return self.time_embed(sinusoids(t, self.channels))

    def forward(self, x, t, added=0, context=None):
        """x [B, C, H, W], added [B, 4 channels], context [B, D, K] -> [B, C_out, H, W]."""
        emb = self.embed(t) + added
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), emb, context)
        return self.out(x)


class TextBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_qkv": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x):
        qkv = heads_of(self.attn["c_qkv"](self.ln_1(x)).transpose(1, 2), 3)
        x = x + self.attn["c_proj"](attend(*qkv).transpose(1, 2))
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Glide(UNet):
    """GLIDE's networks: what is seen is joined by the caller, the caption read without an attention mask."""

    def __init__(self, c_in, channels, mult, depth, attends, vocab, length, width, text_depth):
        super().__init__(c_in, 6, channels, mult, depth, attends, context_width=width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(TextBlock(width) for _ in range(text_depth)))
        self.token_embedding, self.final_ln = nn.Embedding(vocab, width), nn.LayerNorm(width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.padding_embedding = nn.Parameter(torch.randn(length, width))
        self.transformer_proj = nn.Linear(width, 4 * channels)

    def forward(self, x, t, tokens, mask):
        words = self.token_embedding(tokens) + self.positional_embedding
        words = torch.where(mask[..., None], words, self.padding_embedding)
        states = self.final_ln(self.transformer.resblocks(words))
        return super().forward(x, t, self.transformer_proj(states[:, -1]), states.transpose(1, 2))


class Pool(nn.Module):
    """Attention pooling as in CLIP's ResNet, with one projection; heads are within each of q, k, v."""

    def __init__(self, channels, positions, c_out):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.qkv_proj, self.c_proj = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, c_out, 1)

    def forward(self, x):
        x = x.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positional_embedding
        parts = self.qkv_proj(x).chunk(3, dim=1)
        q, k, v = (part.reshape(len(x), -1, HEAD_DIM, x.shape[2]) for part in parts)
        return self.c_proj(attend(q, k, v))[:, :, 0]


class Classifier(UNet):
    """guided-diffusion's EncoderUNetModel with pooling by attention."""

    def __init__(self, side, c_out, channels, mult, depth, attends):
        super().__init__(3, c_out, channels, mult, depth, attends)
        del self.output_blocks
        last = channels * mult[-1]
        pool = Pool(last, (side // 2 ** (len(mult) - 1)) ** 2, c_out)
        self.out = nn.Sequential(group_norm(last), nn.SiLU(), pool)

    def forward(self, x, t):
        emb = self.embed(t)
        for block in self.input_blocks:
            x = block(x, emb, None)
        return self.out(self.middle_block(x, emb, None))
