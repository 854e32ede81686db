"""The frozen base in 4 bits: NF4Linear and quantize_model."""
