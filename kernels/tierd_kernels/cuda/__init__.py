"""What the CUDA kernels share: the record's layout on the device, compiling, and launching."""
