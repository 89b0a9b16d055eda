"""Glue for people who come from another library: its classes under its names and signatures, computed by this package, and metrics in its training loops."""
