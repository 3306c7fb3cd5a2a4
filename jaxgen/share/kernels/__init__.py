"""The kernels of ``hashed_matmul``: plain XLA, and Pallas for TPUs and GPUs."""
