"""The frozen model: its files, prompts and tokens, and text, image and latent encoding."""
