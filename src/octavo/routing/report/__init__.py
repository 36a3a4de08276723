"""One page that explains a model of experts: what was measured of its routing and its weights, as figures and text."""
