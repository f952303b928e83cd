"""What others may observe: signals, and the exporters that listen to them."""
