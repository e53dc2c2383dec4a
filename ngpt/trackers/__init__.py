"""Tracking tools that a run can log to: Weights & Biases, TensorBoard, MLflow and trackio."""
