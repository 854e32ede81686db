"""Text generation: sampling, batches, the continuous-batching engine, CUDA graphs."""
