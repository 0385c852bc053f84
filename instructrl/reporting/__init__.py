"""The report, and the comparison of two runs, from artifacts alone. Nothing is evaluated, and torch not imported."""
