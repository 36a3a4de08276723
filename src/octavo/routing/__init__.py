"""See inside a sparse model: who was routed where, how the experts differ, what happens without them."""
