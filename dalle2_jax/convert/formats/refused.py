"""Known formats that are not read, and the reason: layers that our networks do not have."""

REASONS = {
    "kandinsky-decoder": (
        "Kandinsky 2.2's decoder draws the latents of a VQ-GAN, not pictures. Its prior is read: kandinsky"
    ),
    "dalle2-pytorch": (
        "DALLE2-pytorch's prior has rotary positions, relative biases, normalised queries and keys and gated "
        "MLPs, and its U-Nets cross-attention and Perceiver tokens; no layer of ours holds their tensors"
    ),
}


def refuse(name: str) -> None:
    """Raise ValueError with the reason."""
    raise ValueError(f"weights of the format {name!r} cannot be read: {REASONS[name]}")
