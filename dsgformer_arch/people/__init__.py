"""What the command `dsgformer` runs."""
