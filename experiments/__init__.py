"""Jobs built on implicitgrad: the main experiment, `python -m experiments.run`, and what it is made of."""
