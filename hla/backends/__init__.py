"""Backends: thin adapters, each imported when first chosen. To add one, see the documentation."""
