"""The stages of tools/train_tiny_sd.py. Pictures, captions and optimiser are those of tiny_flux."""
