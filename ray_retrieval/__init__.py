"""Image retrieval by published methods, on Ray."""
