"""The timing road: prefill, decode, end to end and memory, measured apart from accuracy."""
