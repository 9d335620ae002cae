"""`python -m bigtrain`, which is how torchrun starts it."""

from bigtrain.cli import script

script()
