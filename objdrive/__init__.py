"""objdrive: one-shot personalization of Stable Diffusion for whole product catalogs (arXiv 2401.15708)."""
