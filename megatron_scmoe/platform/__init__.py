"""What the process runs on and how it speaks: CPU, launcher, log, command line, gaps of Megatron."""
