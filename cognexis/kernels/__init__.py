"""Operations on plain tensors, each in up to three forms: reference, vectorised, Triton."""
