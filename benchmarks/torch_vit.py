"""`nets.vit.PixelViT` in PyTorch, without conditions but the time: the peer of `benchmarks.compare`.

No package that the comparison installs has such a network. Attention is PyTorch's fused one.
"""

import math

import torch
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, scaled_dot_product_attention, silu

TIME_WIDTH = 256


def rotated(x, cos, sin):
    """x [B, H, N, D] with the pairs (i, i + D / 2) rotated; cos and sin [N, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    """adaLN-zero around attention with normed queries and keys, and around SwiGLU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, hidden = heads, 8 * width // 3
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.modulation, self.qkv = nn.Linear(width, 6 * width), nn.Linear(width, 3 * width)
        self.out, self.fc2 = nn.Linear(width, width), nn.Linear(hidden, width)
        self.fc_gate, self.fc1 = nn.Linear(width, hidden), nn.Linear(width, hidden)

    def forward(self, x, cond, cos, sin):
        """x [B, N, width], cond [B, width], cos and sin [N, D / 2] -> [B, N, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)[:, None].chunk(6, dim=-1)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, D]
        q, k = rotated(self.norm_q(q), cos, sin), rotated(self.norm_k(k), cos, sin)
        h = scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.out(h)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(silu(self.fc_gate(h)) * self.fc1(h))


class PixelViT(nn.Module):
    """x [B, 3, side, side] and times t [B] -> the prediction, of the shape of x."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        self.patch, entries = patch, 3 * patch**2
        self.time1, self.time2 = nn.Linear(TIME_WIDTH, width), nn.Linear(width, width)
        self.patches_in, self.patches_out = nn.Linear(entries, width), nn.Linear(width, entries)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation, self.norm = nn.Linear(width, 2 * width), nn.RMSNorm(width, eps=1e-6)
        quarter = width // heads // 4
        frequencies = 10_000.0 ** -(torch.arange(quarter) / quarter)
        at = torch.cartesian_prod(*[torch.arange(side // patch)] * 2)  # [N, 2]
        angles = (at[..., None] * frequencies).flatten(1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, x, t):
        """x [B, 3, side, side], t [B] -> [B, 3, side, side]."""
        half = TIME_WIDTH // 2
        args = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        emb = self.time2(silu(self.time1(torch.cat([args.cos(), args.sin()], dim=-1))))
        h, cond = pixel_unshuffle(x, self.patch), silu(emb)
        across = h.shape[-2:]
        h = self.patches_in(h.flatten(2).transpose(1, 2))  # [B, N, width]
        for block in self.blocks:
            h = block(h, cond, self.cos, self.sin)
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=-1)
        h = self.patches_out(self.norm(h) * (1 + scale) + shift)
        return pixel_shuffle(h.transpose(1, 2).unflatten(2, across), self.patch)
