"""What a framework must provide: one linearisation point and sweeps over it. Torch lives in `_torch`."""
