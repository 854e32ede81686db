"""The frozen base in 4 bits: NF4Linear, quantize_model, and fingerprints of weights."""
