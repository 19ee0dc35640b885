"""FLOPs, latency, memory and roofline."""
