"""How fast a model runs here, beside what the machine could do at most."""
