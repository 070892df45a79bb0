"""The benchmark: grids of cells, evaluated through lm-eval, stored, compared and reported."""
