"""The learned halting signal: measure what loops gain, fit a value head to that, calibrate it, report its worth."""
