"""Restoring images and videos: what `Deblurrer` and the command `dsgformer` run."""
