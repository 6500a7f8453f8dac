"""Function-level names of the operations in ``cognexis.kernels``, as other code may know them."""
