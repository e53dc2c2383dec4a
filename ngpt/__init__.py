"""Models, data, optimizers and one train loop. Knows nothing about campaigns or Ray."""
