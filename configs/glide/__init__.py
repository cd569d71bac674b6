"""GLIDE (arXiv 2112.10741): captions to 64 x 64, an upsampler to 256, no CLIP embedding."""
