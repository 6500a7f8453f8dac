"""What watches over a training run: measurements, and what is done when one is bad."""
