"""Karlo's unCLIP: embeddings keep CLIP's norm, prior and decoder read its text states; goes to diffusers."""
