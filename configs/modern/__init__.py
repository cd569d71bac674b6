"""unCLIP with a transformer on pixel patches that predicts x0 with the loss in v (JiT, arXiv 2511.13720)."""
