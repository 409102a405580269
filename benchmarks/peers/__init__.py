"""What other libraries do, for benchmarks: each file builds one peer's training step. Never imported by the package."""
