"""This machine: environment checks, measured throughput, GPU sharing, time estimates."""
