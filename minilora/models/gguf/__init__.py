"""llama.cpp's format, both ways. The core opens this room only when a .gguf file is met."""
