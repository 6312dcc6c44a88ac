"""The command line of fmupsample: Typer and rich live here and nowhere else."""
