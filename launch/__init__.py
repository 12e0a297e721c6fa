"""Launch commands: the only package that knows Slurm and submitit."""
