"""psftrain: learns from a PSF store a conditional VAE that gives the PSF anywhere, at once."""
