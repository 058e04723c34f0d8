"""Fisher-Orthogonal Projection."""
__version__ = "0.1.0"
