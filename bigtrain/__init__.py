"""bigtrain: raw text and a cluster in, a trained transformer language model out."""

__version__ = "0.1.0"
