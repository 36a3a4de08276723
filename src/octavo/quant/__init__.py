"""Low-bit weights: the formats, quantising to them and back, and which tensor gets which."""
