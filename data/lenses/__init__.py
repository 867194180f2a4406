"""Lens prescriptions in the JSON schema of DeepLens, with source and checked numbers under `psfgen`."""
