"""Memory cells and what is built from them."""
